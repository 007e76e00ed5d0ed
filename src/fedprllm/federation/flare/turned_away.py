"""Whom a server turns away although its certificate is in date: revoked participants, replaced keys."""

from __future__ import annotations

import threading
from typing import Any

from cryptography import x509

from fedprllm.federation.flare.policy import Party, party, root
from fedprllm.federation.keys.revoked import RevokedFile

__all__ = ["TurnedAway", "close_soon", "serial_of"]

# A connection lives this much longer, so that its owner hears why.
_CLOSE_AFTER_S = 1.0
_MARK = "fedprllm_turned_away"


class TurnedAway:
    """Decides about the connections of one server.

    Args:
        revoked: The server's list.
    """

    def __init__(self, revoked: RevokedFile) -> None:
        self._revoked = revoked

    def reason(self, endpoint: str, connection: Any) -> str | None:
        """Why nothing is taken from this connection; None if it is not turned away.

        Args:
            endpoint: Address at the other end, which the certificate of the connection must fit.
            connection: FLARE's connection.
        """
        if party(endpoint) not in (Party.SITE, Party.SITE_JOB):
            return None
        revoked = self._revoked.read()
        name = root(endpoint)
        if name in revoked.names:
            return f"participant '{name}' was revoked on {revoked.names[name][:10]}; ask the coordinator"
        if not revoked.serials:
            return None
        serial = serial_of(connection)
        if serial is None:
            return "the certificate of this connection cannot be read"
        if serial in revoked.serials:
            return (
                f"participant '{name}' has a newer key; accept the newest kit, or ask the coordinator for it"
            )
        return None


def serial_of(connection: Any) -> str | None:
    """Serial number of the certificate at the other end of a connection, in hexadecimal.

    Each of FLARE's drivers keeps the certificate elsewhere.
    """
    context = getattr(connection, "context", None)
    if context is not None:  # gRPC
        (certificate,) = context.auth_context().get("x509_pem_cert") or [None]
        return f"{x509.load_pem_x509_certificate(certificate).serial_number:x}" if certificate else None
    for part in ("writer", "websocket"):
        stream = getattr(connection, part, None)
        if stream is not None:
            return _serial(stream.get_extra_info("peercert"))
    socket = getattr(connection, "sock", None)
    return None if socket is None else _serial(socket.getpeercert())


def _serial(peer: dict[str, Any] | None) -> str | None:
    return f"{int(peer['serialNumber'], 16):x}" if peer else None


def close_soon(connection: Any) -> None:
    """Close a connection that was turned away, once its owner has been told."""
    if getattr(connection, _MARK, False):
        return
    setattr(connection, _MARK, True)
    timer = threading.Timer(_CLOSE_AFTER_S, connection.close)
    timer.daemon = True
    timer.start()
