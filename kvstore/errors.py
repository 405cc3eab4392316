"""The errors of the store: one root, few children, each also a builtin that callers already catch.

A block that is not there is a shorter hit, never an exception. An error's text holds the fact, the
numbers and the remedy. `code` is how an error crosses the wire (see `kvstore.protocol.Failure`).
"""

from typing import ClassVar


class KVStoreError(Exception):
    """Root of all errors raised by the store, its client and its connectors."""

    code: ClassVar[str] = "internal"


class InvalidRequest(KVStoreError, ValueError):
    """An argument is out of its limits; nothing was changed."""

    code = "invalid"


class UnknownNamespace(InvalidRequest):
    """The daemon has forgotten a namespace for others used since. The client names it anew and asks again."""

    code = "namespace"


class TooManyRequests(InvalidRequest):
    """More a second than this caller may make; nothing was done. It can be asked again a little later."""

    code = "rate"


class LeaseError(KVStoreError):
    """The lease has ended, belongs to someone else, or cannot do what was asked."""

    code = "lease"


class ProtocolError(KVStoreError):
    """The other side does not speak this protocol, or not this version; the connection ends."""

    code = "protocol"


class Unauthorized(KVStoreError, PermissionError):
    """The token is missing or wrong."""

    code = "unauthorized"


class Unavailable(KVStoreError, ConnectionError):
    """The daemon is away. The client reconnects by itself; calls fail at once until it has."""

    code = "unavailable"


class DeadlineExceeded(KVStoreError, TimeoutError):
    """The call's time is over. What it had asked for may still happen, and is then undone."""

    code = "deadline"


class TransferTooSlow(DeadlineExceeded):
    """Blocks' bytes took longer than they may over TCP, though they flowed: it is no sign of an absence."""


class ConfigError(KVStoreError, ValueError):
    """The configuration names something unknown or out of range."""

    code = "config"


class TierError(KVStoreError, OSError):
    """A tier cannot give or take bytes now."""

    code = "tier"
