"""A daemon that an index may follow, and who may know of some. `kvstore.index.membership` asks them."""

import ipaddress
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Protocol

from kvstore.errors import ConfigError

logger = logging.getLogger(__name__)

MEMBERS_MAX: Final = 8192
_PORT_MAX: Final = 65_535


@dataclass(frozen=True, slots=True)
class Member:
    """A daemon: where its feed is ("HOST:PORT", HOST an IP address), and its name where that is known."""

    address: str
    name: str | None = None


class Source(Protocol):
    """Somebody who knows of daemons; asked every `period_s`."""

    label: str
    period_s: float
    rubbish: int

    async def members(self) -> Collection[Member]:
        """All that it knows.

        Raises:
            OSError: it cannot say now, or says that there are none.
        """

    async def close(self) -> None:
        """Ask it no more."""


def checked_address(address: str, told: str = "") -> str:
    """The address of a feed as it is compared, HOST an IP address, in brackets where it is IPv6.

    Raises:
        ConfigError: it is none.
    """
    host, port = host_and_port(address, told or address)
    try:
        return address_of(host, port)
    except ValueError as exc:
        raise ConfigError(
            f"{(told or address)!r:.80} has no IP address; give one, or dns://{host}:{port}"
        ) from exc


def host_and_port(text: str, told: str) -> tuple[str, int]:
    """The parts of HOST:PORT; `told` is what a person has written.

    Raises:
        ConfigError: it is none.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= _PORT_MAX:
        raise ConfigError(f"{told!r:.80} is no place of a daemon's feed; give HOST:PORT or dns://HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def address_of(host: str, port: int) -> str:
    """The address of a port at an IP address. Raises ValueError where `host` is none."""
    number = ipaddress.ip_address(host)
    return f"[{number}]:{port}" if number.version == 6 else f"{number}:{port}"


class Outage:
    """Says once that something is away, and once that it is back. `reason` is empty while it is not."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.count = 0
        self.reason = ""

    def failed(self, error: OSError) -> None:
        """It is away."""
        reason = str(error) or "no answer in time"
        self.count += 1
        if not self.reason:
            logger.warning("%s fails: %s", self._what, reason)
        self.reason = reason

    def over(self) -> None:
        """It is not, or no longer."""
        if self.reason:
            logger.info("%s is back", self._what)
        self.reason = ""
