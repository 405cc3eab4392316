"""The index over HTTP: which paths there are, and what answers them.

Whoever asks must know a token, where there is one; health and metrics are open.
"""

import asyncio
from typing import Final

from kvstore.callers import Callers
from kvstore.gate import Gate, Problem
from kvstore.http_server import Metrics, Readiness, health_app
from kvstore.index.asked import Lookup, Report
from kvstore.index.dialects import Dialects
from kvstore.index.lmcache_controller import LmcacheController
from kvstore.index.registrations import Registrations
from kvstore.index.routing import EndedRoute, Routing, UnknownRoute
from kvstore.index.service import Index
from kvstore.index.told import Placements, Reported, Telling, reported
from kvstore.index.turns import parts, pause
from kvstore.rate import Rate

# Reading so many keys takes 1 ms or more: it is done beside the loop.
_ASIDE_KEYS: Final = 8192


def index_app(index: Index, routing: Routing, metrics: Metrics, callers: Callers, rate: Rate) -> Gate:
    """The index's HTTP side."""
    gate = Gate(health_app("kvstore index", lambda: readiness(index), metrics), tokens=callers, rate=rate)

    async def lookup(asked: Lookup) -> Placements:
        if len(asked.keys or ()) <= _ASIDE_KEYS:
            query = asked.query()
        else:
            query = await asyncio.get_running_loop().run_in_executor(None, asked.query)
        await pause(len(asked.engines or ()))
        routed = await routing.lookup(query, asked.wish())
        telling = Telling(routed, explain=asked.explain)
        places = range(len(routed.ranked))
        for some in parts(places):
            telling.tell(some)
            await pause(len(places))
        return telling.placements(asked.reserve_ms)

    async def outcome(report: Report) -> Reported:
        try:
            found = routing.outcome(
                report.id,
                engine=report.engine,
                ttft_s=report.ttft_s,
                cached_tokens=report.cached_tokens,
                failed=report.failed,
                ended=report.ended,
            )
        except UnknownRoute as error:
            raise Problem(404, str(error)) from None
        except EndedRoute as error:
            raise Problem(410, str(error)) from None
        return reported(found)

    gate.post(
        "/v1/lookup",
        Lookup,
        Placements,
        lookup,
        summary="Where a prompt's prefix lies, and which engine would give its first token soonest",
        for_routers=True,
    )
    gate.post(
        "/v1/outcome",
        Report,
        Reported,
        outcome,
        summary="What became of a prompt that was routed",
        problems={404: "the id is none that was given here", 410: "the route is over"},
        for_routers=True,
    )
    registrations = Registrations(index)
    Dialects(index, registrations).mount(gate)
    LmcacheController(index, registrations).mount(gate)
    return gate


def readiness(index: Index) -> Readiness:
    """Ready is who has heard everybody, or has waited long enough for them."""
    notes = [f"the oldest knowledge is of {index.age_s():.1f} s ago", *index.unknown()]
    return Readiness(index.missing(), notes)
