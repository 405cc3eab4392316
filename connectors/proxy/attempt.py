"""One engine's answer to a client's request, as far as it comes. It chooses no engine and repeats nothing."""

import time
from collections.abc import Iterator
from typing import Final

from connectors.proxy.answer import Answer, EngineFailed
from connectors.proxy.ask import Ask
from connectors.proxy.choosing import Choice, Chooser
from connectors.proxy.client import Client
from connectors.proxy.engine import Work
from connectors.proxy.engines import Engines
from connectors.proxy.events import Event, Events, event_of
from connectors.proxy.metrics import Metrics
from connectors.proxy.transcript import Transcript
from connectors.proxy.whole import whole_of
from kvstore.errors import ProtocolError

_OK: Final = 200
_SERVER_ERROR: Final = 500


class Attempt:
    """`run` it once. What the client gets of a stream goes through `transcript`, as before."""

    def __init__(
        self, choice: Choice, client: Client, transcript: Transcript, chooser: Chooser, metrics: Metrics
    ) -> None:
        self._choice = choice
        self._name = choice.engine.name
        self._client = client
        self._transcript = transcript
        self._chooser = chooser
        self._metrics = metrics
        self._began_s = time.monotonic()

    async def run(self, engines: Engines, ask: Ask) -> None:
        """Pass the answer on.

        Raises:
            EngineFailed: there is none, or no end of it.
            Diverged: it is not the one that the client has the beginning of.
            ClientGone: the client does not take it.
        """
        with self._choice.engine.work(self._choice.tokens) as work:
            try:
                async with engines.ask(self._choice.engine, ask, self._choice.rank) as answer:
                    if answer.status == _OK and answer.streams:
                        await self._stream(answer, work)
                    else:
                        await self._whole(answer, work)
            finally:
                if not work.has_begun:
                    self._chooser.report(self._choice, failed=True)

    async def _whole(self, answer: Answer, work: Work) -> None:
        body = await answer.body()
        if self._client.status is not None:
            raise EngineFailed(f"engine {self._name} answered {answer.status} to what another one had begun")
        if answer.status == _OK:
            said, took_s = whole_of(body), self._first_byte(work)
            # Otherwise nobody saw when the first token came.
            ttft_s = took_s if said.is_first_token else None
            self._chooser.report(self._choice, ttft_s=ttft_s, cached_tokens=said.cached_tokens)
        await self._client.answer(answer.status, answer.content_type, body)

    async def _stream(self, answer: Answer, work: Work) -> None:
        events = Events()
        self._transcript.again()
        while piece := await answer.piece():
            if not work.has_begun:
                self._chooser.report(self._choice, ttft_s=self._first_byte(work))
            for event in self._events(events, piece):
                if passed_on := self._passed_on(event):
                    if self._client.status is None:
                        await self._client.begin(answer.content_type)
                    await self._client.write(passed_on)
                if event.is_last:
                    await self._client.end()
                    return
        raise EngineFailed(f"engine {self._name} ended in the middle of its answer")

    def _passed_on(self, event: Event) -> bytes:
        """What the client gets of an event.

        Raises:
            EngineFailed: the event says that the engine has failed.
            Diverged: it is not what the client has already.
        """
        status = event.error_status
        if status is not None and status >= _SERVER_ERROR:
            raise EngineFailed(f"engine {self._name} ended its answer with {event.said!r:.200}")
        if event.is_last:
            self._transcript.end()
        if event.said is None or status is not None:
            return event.raw
        new = self._transcript.take(event.said)
        if not self._transcript.continued:
            return event.raw
        return b"" if new is None else event_of(new)

    def _events(self, events: Events, piece: bytes) -> Iterator[Event]:
        try:
            yield from events.feed(piece)
        except ProtocolError as exc:
            raise EngineFailed(f"engine {self._name} sent {exc}") from exc

    def _first_byte(self, work: Work) -> float:
        """The prompt waits no longer; the seconds that it did."""
        work.began()
        took_s = time.monotonic() - self._began_s
        self._metrics.first_byte(self._name, took_s)
        return took_s
