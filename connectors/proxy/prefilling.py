"""The prompt's KV made by one engine for another, which finds it in the store."""

import time
from typing import Final

from connectors.proxy.answer import EngineFailed
from connectors.proxy.ask import Ask
from connectors.proxy.choosing import Choice, Chooser
from connectors.proxy.engines import Engines
from connectors.proxy.metrics import Metrics
from connectors.proxy.whole import Whole, whole_of

_OK: Final = 200


async def prefilled(ask: Ask, chooser: Chooser, engines: Engines, metrics: Metrics) -> Ask:
    """The request for the decode, once a prefill is done; as it is where there is none, or it fails."""
    prefill = ask.prefill
    choice = None if prefill is None else await chooser.choose(ask, ())
    if prefill is None or choice is None:
        return ask
    began_s = time.monotonic()
    made = None
    try:
        made, state = await _made(prefill, choice, engines)
    finally:
        if made is None:
            chooser.report(choice, failed=True)
    metrics.prefill(choice.engine.name, state)
    if made is None:
        return ask
    chooser.report(choice, ttft_s=time.monotonic() - began_s, cached_tokens=made.cached_tokens)
    return ask.after(made.kv_transfer_params) if made.kv_transfer_params else ask


async def _made(ask: Ask, choice: Choice, engines: Engines) -> tuple[Whole | None, str]:
    """What the engine says of what it has made, None of nothing; and how it went."""
    try:
        with choice.engine.work(choice.tokens):
            async with engines.ask(choice.engine, ask, choice.rank) as answer:
                body = await answer.body()
    except EngineFailed as exc:
        choice.engine.failed(str(exc))
        return None, "failed"
    # Who refuses a request at the prefill does so at the decode, where the client is told.
    return (whole_of(body), "done") if answer.status == _OK else (None, "refused")
