"""Where the hosts of engines are: names are looked up beside the loop, again and again. It connects to none.

libzmq would look names up in its only thread, where one slow answer stops the events of all engines.
"""

import asyncio
import logging
import math
import re
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.errors import ConfigError
from kvstore.index.member import address_of

logger = logging.getLogger(__name__)

_ENDPOINT: Final = re.compile(r"tcp://(.+):(\d{1,5})")
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,253}")
_PORT_MAX: Final = 65535
# Names looked up at once: each takes a thread of those that the loop has for all, which are six or more.
_AT_ONCE: Final = 4
# A name that cannot be looked up is asked for again after twice this, and less and less often.
_RETRY_S: Final = 1.0
_RETRY_MAX_S: Final = 60.0
_DOUBLINGS_MAX: Final = 10
# Twice as many as an index has engines.
_NAMES_MAX: Final = 16_384

LookUp = Callable[[str], Awaitable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A port of a host, or a file's. `place` is what to connect to; None: the host has a name."""

    host: str
    port: int
    place: str | None

    @classmethod
    def of(cls, text: str) -> "Endpoint":
        """Of tcp://HOST:PORT, or ipc://PATH.

        Raises:
            ConfigError: it is none.
        """
        if text.startswith("ipc://"):
            return cls("", 0, text)
        match = _ENDPOINT.fullmatch(text)
        host = match[1].removeprefix("[").removesuffix("]") if match else ""
        port = int(match[2]) if match else 0
        try:
            place = f"tcp://{address_of(host, port)}"
        except ValueError:
            place = None
        if not 0 < port <= _PORT_MAX or not (place or _NAME.fullmatch(host)):
            raise ConfigError(f"endpoint {text!r:.300} is none; give tcp://HOST:PORT")
        return cls(host, port, place)

    def at(self, number: str) -> str:
        """What to connect to where the host has this IP address."""
        return f"tcp://[{number}]:{self.port}" if ":" in number else f"tcp://{number}:{self.port}"


async def look_up(host: str) -> Sequence[str]:
    """The IP addresses of a host, the best first, as this machine's resolver has them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@dataclass(slots=True)
class _Known:
    """What was last heard of a name, and when. `asking` goes on until there is an answer, however late."""

    numbers: Sequence[str] = ()
    heard_s: float = -math.inf
    failures: int = 0
    asking: asyncio.Task[None] | None = None


class Resolver:
    """One for all engines of an index, on the loop that it is used on. Nobody waits for it."""

    def __init__(self, look_up: LookUp = look_up) -> None:
        self._look_up = look_up
        self._names: OrderedDict[str, _Known] = OrderedDict()
        self._places = asyncio.Semaphore(_AT_ONCE)

    def places(self, endpoint: Endpoint, fresh_s: float) -> Sequence[str]:
        """What to connect to, as far as it is known; of what is older than `fresh_s` it is asked again."""
        if endpoint.place is not None:
            return (endpoint.place,)
        known = self._names.get(endpoint.host)
        if known is None:
            known = self._names[endpoint.host] = _Known()
            self._forget()
        self._names.move_to_end(endpoint.host)
        loop = asyncio.get_running_loop()
        wait_s = min(_RETRY_S * (1 << known.failures), _RETRY_MAX_S) if known.failures else fresh_s
        if known.asking is None and loop.time() - known.heard_s >= wait_s:
            known.asking = loop.create_task(self._ask(endpoint.host, known))
        return [endpoint.at(number) for number in known.numbers]

    def close(self) -> None:
        """Ask nobody any more."""
        for known in self._names.values():
            if known.asking is not None:
                known.asking.cancel()

    async def _ask(self, host: str, known: _Known) -> None:
        try:
            async with self._places:
                numbers = await self._look_up(host)
            if not numbers:
                raise OSError("it has no address")
            known.numbers, known.failures = numbers, 0
        except (OSError, UnicodeError) as error:  # what was known before is the best there is
            if not known.failures:
                logger.warning("%s cannot be looked up, and will be again: %s", host, error)
            known.failures = min(known.failures + 1, _DOUBLINGS_MAX)
        finally:
            known.heard_s, known.asking = asyncio.get_running_loop().time(), None

    def _forget(self) -> None:
        """Those that nobody has wanted for longest, if there are too many."""
        while len(self._names) > _NAMES_MAX:
            gone = self._names.popitem(last=False)[1]
            if gone.asking is not None:
                gone.asking.cancel()
