"""The addresses that a daemon listens on itself, and its certificate: made, or refused with the remedy."""

import socket
import ssl

from kvstore.config import Config, parse_endpoint
from kvstore.errors import ConfigError


def listen_http(address: str, name: str = "http") -> socket.socket:
    """A socket bound there; `name` is what the address is called.

    Raises:
        ConfigError: the address is taken, or none of this machine's.
    """
    host, port = parse_endpoint(address, name)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, UnicodeError) as exc:
        sock.close()
        reason = getattr(exc, "strerror", None) or exc
        raise ConfigError(f"{name} address {address}: {reason}; give another, or port 0") from exc
    return sock


def endpoint(sock: socket.socket) -> str:
    """HOST:PORT of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def tls(config: Config) -> ssl.SSLContext | None:
    """What the data port speaks TLS with, if it does.

    Raises:
        ConfigError: the certificate or its key cannot be used.
    """
    if not config.tls_certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_certificate, config.tls_key)
    except OSError as exc:
        raise ConfigError(f"tls_certificate {config.tls_certificate}: {exc}") from exc
    return context
