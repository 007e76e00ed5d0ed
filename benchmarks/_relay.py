"""A pass-through TCP relay that counts the bytes between sites and server."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

_CHUNK_BYTES = 2**18


class Relay:
    """Listens on a loopback port and forwards everything to another. TLS remains end to end.

    Attributes:
        up: Bytes from the sites to the server so far.
        down: Bytes from the server to the sites so far.
    """

    def __init__(self, port: int, target: int) -> None:
        self.up = self.down = 0
        self._target = target
        self._lock = threading.Lock()
        self._listener = socket.create_server(("localhost", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop accepting connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                site, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("localhost", self._target))
                except OSError:  # the server is not up yet; the site will retry
                    site.close()
                    continue
                for source, sink, name in ((site, server, "up"), (server, site, "down")):
                    threading.Thread(target=self._pass_on, args=(source, sink, name), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        buffer = bytearray(_CHUNK_BYTES)
        with suppress(OSError):
            while n_bytes := source.recv_into(buffer):
                sink.sendall(memoryview(buffer)[:n_bytes])
                with self._lock:
                    setattr(self, name, getattr(self, name) + n_bytes)
        for side in (source, sink):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
