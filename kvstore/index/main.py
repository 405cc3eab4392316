"""The index as a process: joins the settings, the index and its HTTP side, until it is told to stop."""

import asyncio
import gc
import resource
import signal
from pathlib import Path

import uvloop

from kvstore import logs
from kvstore.config import Config
from kvstore.http_server import HttpServer
from kvstore.index.api import index_app
from kvstore.index.membership import source_of
from kvstore.index.metrics import exposition
from kvstore.index.saver import Saver
from kvstore.index.service import Index
from kvstore.index.settings import ranks_of, registry_prefix
from kvstore.index.wire import load_key
from kvstore.listening import endpoint, listen_http

_STARTED_POLL_S = 0.005


def serve_index(config: Config) -> None:
    """Run an index until SIGTERM or SIGINT.

    Raises:
        ConfigError: an address is taken or is none, or a file cannot be read.
    """
    logs.configure(config.log_level, config.log_format, f"{config.node}-index")
    # Blocks are numbers in dictionaries, which a full collection walks for nothing: 25 ms with 1M blocks.
    gc.set_threshold(20_000, 5, 1_000_000)
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
    key_file = settings.key_file or (config.events.key_file if config.events else "")
    prefix = registry_prefix(config)
    snapshot = Path(settings.snapshot) if settings.snapshot else None
    index = Index(
        ranks_of(settings),
        [source_of(place, prefix=prefix) for place in settings.nodes],
        blocks_max=settings.blocks_max,
        secret=load_key(key_file) if key_file else None,
        snapshot=snapshot,
    )
    saver = None if snapshot is None else Saver(snapshot, settings.snapshot_s, index.save)
    sock = listen_http(settings.http)
    http = HttpServer(index_app(index, exposition(index.statistics, saver), config.token))
    try:
        index.start()
        serving = loop.create_task(http.serve(sockets=[sock]))
        while not http.started and not serving.done():
            await asyncio.sleep(_STARTED_POLL_S)
        if saver is not None:
            saver.start()
        gc.freeze()
        print(f"kvstore index ready: http={endpoint(sock)}", flush=True)
        await stop.wait()
        http.should_exit = True
        await serving
    finally:
        if saver is not None:
            saver.close()
        await index.close()
