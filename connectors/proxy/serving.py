"""The router's process: engines, index and HTTP on one event loop, until SIGTERM."""

import asyncio
import resource
import signal
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Final

import uvloop
from fastapi import FastAPI

from connectors.proxy.answer import Patience
from connectors.proxy.app import Tokens, proxy_app
from connectors.proxy.choosing import Chooser
from connectors.proxy.engines import Engines
from connectors.proxy.exchange import Means
from connectors.proxy.fleet import Fleet
from connectors.proxy.index import Index
from connectors.proxy.metrics import Metrics
from connectors.proxy.settings import Settings
from connectors.proxy.tokens import Tokenizer
from kvstore import logs
from kvstore.http_connection import Limits
from kvstore.http_server import HttpServer
from kvstore.listening import endpoint, listen_http

_STARTED_POLL_S: Final = 0.005


def serve_proxy(settings: Settings, tokens: Tokens, index_token: str | None) -> None:
    """Run a router until SIGTERM or SIGINT.

    Raises:
        ConfigError: an address is taken or is none.
    """
    logs.configure(settings.log_level, settings.log_format, "kvstore-proxy")
    # Of each request two descriptors, and mostly no more than 1,024 unless one asks.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(settings, tokens, index_token))


async def _run(settings: Settings, tokens: Tokens, index_token: str | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        index = _index(settings, index_token, metrics, stack)
        engines = Engines(_patience(settings))
        stack.push_async_callback(engines.close)
        decode, prefill = (
            _fleet(urls, engines, tokens, stack) for urls in (settings.engines, settings.prefill)
        )
        tokenizer = Tokenizer(engines, settings.tokenize_ms / 1000)
        means = Means(
            engines=engines,
            decode=Chooser(decode, index, tokenizer, settings.lora, metrics),
            prefill=Chooser(prefill, index, tokenizer, settings.lora, metrics) if prefill.engines else None,
            metrics=metrics,
            attempts=settings.attempts,
        )
        exposition = metrics.exposition([*decode.engines, *prefill.engines])
        await _serve(proxy_app(means, decode, settings, tokens, exposition), settings, stop)


async def _serve(app: FastAPI, settings: Settings, stop: asyncio.Event) -> None:
    """Until `stop`, and then for as long as what is under way takes, within limits."""
    sock = listen_http(settings.listen)
    # Connections inherit it. What is given up would wait for ever for a client that takes nothing.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * settings.client_s))
    http = HttpServer(app, Limits(taken_s=settings.client_s))
    http.config.timeout_graceful_shutdown = settings.drain_s
    serving = asyncio.ensure_future(http.serve(sockets=[sock]))
    while not http.started and not serving.done():
        await asyncio.sleep(_STARTED_POLL_S)
    print(f"kvstore proxy ready: http={endpoint(sock)}", flush=True)
    await stop.wait()
    http.should_exit = True
    await serving


def _fleet(urls: Sequence[str], engines: Engines, tokens: Tokens, stack: AsyncExitStack) -> Fleet:
    """Engines, which are watched until the stack ends."""
    fleet = Fleet(urls, engines, tokens.passed_on(None))
    stack.push_async_callback(_end, asyncio.ensure_future(fleet.watch()))
    return fleet


def _index(settings: Settings, token: str | None, metrics: Metrics, stack: AsyncExitStack) -> Index | None:
    """The index, if there is one, which is told of outcomes until the stack ends."""
    if not settings.index:
        return None
    index = Index(settings.index, token, settings.lookup_ms / 1000, metrics)
    stack.push_async_callback(index.close)
    stack.push_async_callback(_end, asyncio.ensure_future(index.run()))
    return index


async def _end(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _patience(settings: Settings) -> Patience:
    return Patience(settings.connect_s, settings.first_token_s, settings.idle_s, settings.whole_s)
