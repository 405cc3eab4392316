"""One request of a client, from the choice of an engine to the end of an answer, at as many as it takes.

An answer is never made of two that differ: where an engine dies in the middle of a stream, the next one's
must begin with what the client has, or the stream ends with an error.
"""

from dataclasses import dataclass
from typing import Final

from connectors.proxy.answer import EngineFailed
from connectors.proxy.ask import Ask
from connectors.proxy.attempt import Attempt
from connectors.proxy.choosing import Chooser
from connectors.proxy.client import Client
from connectors.proxy.engine import Engine
from connectors.proxy.engines import Engines
from connectors.proxy.metrics import Metrics
from connectors.proxy.prefilling import prefilled
from connectors.proxy.transcript import Diverged, Transcript

_BAD_GATEWAY: Final = 502
_UNAVAILABLE: Final = 503


@dataclass(frozen=True, slots=True)
class Means:
    """What exchanges share. `prefill` is there where prefill and decode are at different engines; at most
    `attempts` engines are asked for one answer."""

    engines: Engines
    decode: Chooser
    prefill: Chooser | None
    metrics: Metrics
    attempts: int


async def answer(ask: Ask, client: Client, means: Means) -> None:
    """Answer a client, with an error if need be. Cancelling ends the request at its engine, too.

    Raises:
        ClientGone: it does not take the answer.
    """
    if means.prefill is not None:
        ask = await prefilled(ask, means.prefill, means.engines, means.metrics)
    transcript = Transcript()
    tried: list[Engine] = []
    failure: EngineFailed | None = None
    while len(tried) < means.attempts:
        choice = await means.decode.choose(ask, tried)
        if choice is None:
            break
        if tried:
            means.metrics.retry(tried[-1].name)
        tried.append(choice.engine)
        try:
            await Attempt(choice, client, transcript, means.decode, means.metrics).run(means.engines, ask)
            return
        except EngineFailed as exc:
            failure = exc
            choice.engine.failed(str(exc))
        except Diverged as exc:
            await client.refuse(
                _BAD_GATEWAY,
                f"{failure}; that of engine {choice.engine.name} does not go on from it: {exc}; ask again",
            )
            return
    await _give_up(client, failure, len(tried))


async def _give_up(client: Client, failure: EngineFailed | None, tried: int) -> None:
    """Say why there is no answer, in the engine's own words where it has said."""
    if failure is None:
        await client.refuse(_UNAVAILABLE, "there is no engine to ask; start one", {"retry-after": "1"})
    elif failure.refusal is not None and client.status is None:
        refusal = failure.refusal
        await client.answer(refusal.status, refusal.content_type, refusal.body)
    else:
        await client.refuse(_BAD_GATEWAY, f"{failure}; {tried} engines were asked; ask again")
