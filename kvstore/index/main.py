"""The index as a process: joins the settings, the index and its HTTP side, until it is told to stop."""

import asyncio
import gc
import resource
import signal
import sys
from pathlib import Path

import uvloop

from kvstore import logs
from kvstore.callers import Callers, load_routers
from kvstore.config import Config
from kvstore.http_server import HttpServer
from kvstore.index.api import index_app
from kvstore.index.library import index_of
from kvstore.index.lookup_server import LookupServer
from kvstore.index.metrics import exposition
from kvstore.index.routing_metrics import GateCollector, RoutingCollector
from kvstore.index.saver import Saver
from kvstore.index.settings import registry_prefix
from kvstore.listening import endpoint, listen_http
from kvstore.rate import Rate

_STARTED_POLL_S = 0.005
_SWITCH_S = 0.0005


def serve_index(config: Config) -> None:
    """Run an index until SIGTERM or SIGINT.

    Raises:
        ConfigError: an address is taken or is none, or a file cannot be read.
    """
    logs.configure(config.log_level, config.log_format, f"{config.node}-index")
    # Blocks are numbers in dictionaries, which a full collection walks for nothing: 25 ms with 1M blocks.
    gc.set_threshold(20_000, 5, 1_000_000)
    # What is done beside the loop must let it go on.
    sys.setswitchinterval(_SWITCH_S)
    # Of each publisher some descriptors, and mostly no more than 1,024 unless one asks.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(config))


async def _run(config: Config) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    settings = config.index
    key_file = config.events.key_file if config.events else ""
    callers = Callers(config.token, load_routers(settings.router_tokens))
    index, routing = index_of(settings, prefix=registry_prefix(config), key_file=key_file)
    saver = Saver(Path(settings.snapshot), settings.snapshot_s, index.save) if settings.snapshot else None
    sock = listen_http(settings.http)
    data = listen_http(settings.data, "index.data") if settings.data else None
    rate = Rate(settings.rate)
    lookups = LookupServer(index.locality, index.age_s, callers, rate)
    gate = index_app(index, routing, lambda: metrics(), callers, rate)
    routed = RoutingCollector(routing.statistics, lambda: index.locality.engines)
    metrics = exposition(index.statistics, saver, lookups, routed, GateCollector(gate.statistics))
    http = HttpServer(gate)
    try:
        index.start()
        serving = loop.create_task(http.serve(sockets=[sock]))
        while not http.started and not serving.done():
            await asyncio.sleep(_STARTED_POLL_S)
        if data is not None:
            await lookups.listen(data)
        if saver is not None:
            saver.start()
        gc.freeze()
        addresses = f"http={endpoint(sock)}" + (f" data={endpoint(data)}" if data is not None else "")
        print(f"kvstore index ready: {addresses}", flush=True)
        await stop.wait()
        http.should_exit = True
        await serving
    finally:
        if saver is not None:
            saver.close()
        lookups.close()
        await index.close()
