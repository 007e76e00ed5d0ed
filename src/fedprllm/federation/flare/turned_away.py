"""Turn away revoked participants and replaced keys, even if the certificate is in date."""

from __future__ import annotations

import threading
from typing import Any

from cryptography import x509

from fedprllm.federation.flare.policy import Party, party, root
from fedprllm.federation.keys.revoked import RevokedFile

__all__ = ["TurnedAway", "close_soon", "serial_of"]

# A connection stays open this much longer, so that the participant receives the reason.
_CLOSE_AFTER_S = 1.0
_MARK = "fedprllm_turned_away"


class TurnedAway:
    """Decides which connections a server turns away.

    Args:
        revoked: The server's list of revoked participants and replaced certificates.
    """

    def __init__(self, revoked: RevokedFile) -> None:
        self._revoked = revoked

    def reason(self, endpoint: str, connection: Any) -> str | None:
        """The reason a connection is turned away; None if it is accepted.

        Args:
            endpoint: Address at the other end, which must match the connection's certificate.
            connection: FLARE's connection.

        Raises:
            RunError: The server's list is damaged.
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
    """Serial number of the peer's certificate, in hexadecimal; None if it has none.

    Each of FLARE's drivers keeps the certificate in a different place.
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
    """Close a connection after the participant has had time to receive the reason."""
    if getattr(connection, _MARK, False):
        return
    setattr(connection, _MARK, True)
    timer = threading.Timer(_CLOSE_AFTER_S, connection.close)
    timer.daemon = True
    timer.start()
