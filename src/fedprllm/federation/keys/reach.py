"""Why a server cannot be reached: the steps of a connection, taken one by one with the kit's certificate."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from fedprllm.errors import RunError
from fedprllm.federation.flare.configuration import address_of

__all__ = ["check_host", "obstacle"]

_TIMEOUT_S = 5.0
_LISTEN_S = 1.5  # a server that does not accept a certificate says so after the handshake


def check_host(kit: Path) -> None:
    """Check that the name of a kit's server can be resolved here.

    Raises:
        RunError: It cannot.
    """
    host, port = _target(kit)
    words = _unknown(host, port)
    if words:
        raise RunError(words)


def obstacle(kit: Path, timeout_s: float = _TIMEOUT_S) -> str:
    """What keeps a participant from its server; empty if a connection with its certificate is accepted.

    Args:
        kit: The participant's kit.
        timeout_s: Seconds that each step may take.
    """
    host, port = _target(kit)
    words = _unknown(host, port)
    if words:
        return words
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            return _handshake(kit, host, connection)
    except ConnectionRefusedError:
        return f"{host}:{port} refuses the connection: the server is not running, or its port is closed"
    except TimeoutError:
        return f"{host}:{port} does not answer: the machine is off, or a firewall is in between"
    except OSError as error:
        return f"{host}:{port} cannot be reached: {error.strerror or error}"


def _target(kit: Path) -> tuple[str, int]:
    host, _, port = address_of(kit)["target"].rpartition(":")
    return host, int(port)


def _unknown(host: str, port: int) -> str:
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return (
            f"the host {host} is unknown here: compare the name with the coordinator, and check this "
            "machine's network and name service"
        )
    return ""


def _handshake(kit: Path, host: str, connection: socket.socket) -> str:
    startup = kit / "startup"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(startup / "rootCA.pem")
    context.load_cert_chain(startup / "client.crt", startup / "client.key")
    if address_of(kit)["scheme"] == "grpc":
        context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            secured.settimeout(_LISTEN_S)
            try:
                return "" if secured.recv(1) else _refused(host, "it closed the connection at once")
            except TimeoutError:
                return ""
    except ssl.SSLCertVerificationError as error:
        return (
            f"the certificate of the server at {host} is not accepted ({error.verify_message}): it is of "
            "another federation, or something in between opens the encryption"
        )
    except ssl.SSLError as error:
        reason = (error.reason or "no reason").lower().replace("_", " ")
        return _refused(host, reason)


def _refused(host: str, reason: str) -> str:
    return (
        f"the server at {host} does not accept this participant's certificate, or does not speak TLS "
        f"({reason}): ask the coordinator whether it is revoked or of another federation"
    )
