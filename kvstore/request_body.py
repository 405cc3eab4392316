"""The body of one HTTP request: read within a limit and a time, or passed over. It answers nothing."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from starlette.types import Receive

# The whole body must have come by then: 16 MiB at 27 Mbit/s.
BODY_S: Final = 5.0
# Of a body that nobody wants so much is read, so that who sends it sees the answer: the cut off do not.
_PASSED_OVER_BYTES: Final = 128 << 20


class TooLong(Exception):
    """The body is longer than it may be; the text is its length, in bytes."""


class TooSlow(Exception):
    """The body did not come in time; the text is how much of it came, in bytes."""


class RequestBody:
    """`unread` is a body of which more may come; `held_back` one whose sender waits to be told to send it."""

    def __init__(self, headers: Mapping[bytes, bytes], receive: Receive, *, unread: bool) -> None:
        self.unread = unread
        self.held_back = unread and headers.get(b"expect", b"").lower() == b"100-continue"
        self._length = headers.get(b"content-length", b"0")
        self._receive = receive

    async def read(self, bytes_max: int) -> bytes | None:
        """All of it; None once who sends it is gone.

        Raises:
            TooLong, TooSlow: it is not to be had.
        """
        if len(self._length) > 18 or int(self._length) > bytes_max:
            raise TooLong(self._length.decode())
        self.held_back = False
        pieces: list[bytes] = []
        nbytes = 0
        try:
            async with asyncio.timeout(BODY_S):
                while (message := await self._receive())["type"] == "http.request":
                    pieces.append(message["body"])
                    nbytes += len(message["body"])
                    if nbytes > bytes_max:
                        raise TooLong(f"more than {bytes_max}")
                    if not message["more_body"]:
                        self.unread = False
                        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        except TimeoutError:
            self.unread = False
            raise TooSlow(str(nbytes)) from None
        return None

    async def pass_over(self) -> None:
        """Read what nobody wants, for a while."""
        nbytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(BODY_S):
                while nbytes < _PASSED_OVER_BYTES:
                    message = await self._receive()
                    if message["type"] != "http.request" or not message["more_body"]:
                        return
                    nbytes += len(message["body"])
