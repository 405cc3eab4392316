"""One connection of an HTTP server: how long it may be silent, and how slowly it may take what it asked for.

uvicorn ends connections that have asked and do so no more. It would wait for ever for a first request, for
the rest of its headers, and for somebody who takes no answer. Requests themselves are the application's.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Of a request, with its address; uvicorn has no limit.
_HEAD_BYTES_MAX: Final = 64 << 10
_FULL: Final = b"too many connections; ask again later\n"
_REFUSAL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(_FULL), _FULL)
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections there may be; seconds for a request's head, and until some of an answer goes."""

    connections: int = 4096
    head_s: float = 10.0
    taken_s: float = 10.0


# Who has not asked for anything yet, oldest first: they give way where there are too many.
Silent = OrderedDict["Connection", None]


class Connection(HttpToolsProtocol):
    """Ends itself where uvicorn would wait for ever."""

    def __init__(self, limits: Limits, silent: Silent, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._limits = limits
        self._silent = silent
        self._head_timer: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0
        self._taken_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for its request, for a while; where there are too many, who has waited longest goes."""
        super().connection_made(transport)
        self._silent[self] = None
        self._await_head()
        if len(self.connections) > self._limits.connections:
            next(iter(self._silent))._give_way()

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request, or what is between requests and begins none."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES_MAX:
                self._end()
        if self.cycle is not None and not self.cycle.response_complete:
            if self._head_timer is not None:
                self._stop_waiting()
        elif self._head_timer is None and not self.transport.is_closing():
            self._await_head()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """Its head is over."""
        self._in_head = False
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """More is to be sent than is taken."""
        super().pause_writing()
        self._await_taken()

    def resume_writing(self) -> None:
        """Enough of it was taken."""
        super().resume_writing()
        self._stop_taken()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._stop_waiting()
        self._stop_taken()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """It has asked, and asks no more."""
        self._end()

    def end_stalled(self) -> None:
        """End it if nobody takes what it sends."""
        if self.flow.write_paused:
            self.transport.abort()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.head_s, self._end)

    def _stop_waiting(self) -> None:
        self._silent.pop(self, None)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _await_taken(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._taken_timer = self.loop.call_later(self._limits.taken_s, self._check_taken, left)

    def _check_taken(self, left: int) -> None:
        if self.transport.get_write_buffer_size() >= left:
            self.transport.abort()
        else:
            self._await_taken()

    def _stop_taken(self) -> None:
        if self._taken_timer is not None:
            self._taken_timer.cancel()
            self._taken_timer = None

    def _give_way(self) -> None:
        self._stop_waiting()
        self.transport.write(_REFUSAL)
        self._end()

    def _end(self) -> None:
        """Close it; who has not taken the last answer by now does not get it."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()
