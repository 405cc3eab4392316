"""Connections that ask nothing, or take nothing, at a real HTTP server: they hold up nobody."""

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self

import pytest
import uvloop

from kvstore.callers import Callers
from kvstore.gate import Gate
from kvstore.http_connection import Limits
from kvstore.http_server import HttpServer, Readiness, health_app
from kvstore.rate import Rate
from tests.node import wait_for

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
STREAM = b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n"
QUICK = Limits(head_s=0.2, taken_s=0.2)
PATIENT = Limits(head_s=60, taken_s=60)


class Server:
    """A gate on a port of its own, in a thread; `/stream` never ends."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.streams = 0  # under way
        self._sock = socket.create_server(("127.0.0.1", 0))
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def connected(self, *, receives: int | None = None) -> socket.socket:
        sock = socket.socket()
        if receives is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
        sock.settimeout(20)
        sock.connect(self._sock.getsockname())
        return sock

    def stop(self) -> None:
        self._http.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        app = health_app("test", Readiness, lambda: b"")
        gate = Gate(app, tokens=Callers(None), rate=Rate(0))
        gate.stream("/stream", list[Any], self._stream, summary="Without end")
        self._http = HttpServer(gate, self.limits)
        self._started.set()
        await self._http.serve(sockets=[self._sock])

    async def _stream(self, _: Mapping[str, str]) -> AsyncIterator[bytes]:
        return self._pieces()

    async def _pieces(self) -> AsyncIterator[bytes]:
        self.streams += 1
        try:
            while True:
                yield bytes(1 << 16)
                await asyncio.sleep(0)
        finally:
            self.streams -= 1

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def healthy(sock: socket.socket) -> None:
    sock.sendall(HEALTH)
    text = b""
    while not text.endswith(b"ok\n"):
        piece = sock.recv(1 << 16)
        assert piece, text
        text += piece


def ended(sock: socket.socket) -> bool:
    """Whether it ends, within the socket's time; what has come before is read."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def test_who_asks_nothing_is_hung_up_on_and_who_asks_now_and_then_is_not() -> None:
    with Server(QUICK) as server, server.connected() as regular:
        healthy(regular)
        for has_asked, head in ((False, b""), (False, HEALTH[:-1]), (True, b"\r\n"), (True, HEALTH[:-1])):
            with server.connected() as sock:
                if has_asked:
                    healthy(sock)
                sock.sendall(head)
                assert ended(sock)
        healthy(regular)


def test_a_body_that_goes_on_after_its_answer_is_given_up() -> None:
    with Server(QUICK) as server, server.connected() as sock:
        sock.sendall(b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 405 ")
        sock.sendall(b"a")
        assert ended(sock)


@pytest.mark.parametrize("before", [b"", HEALTH])
def test_a_head_without_end_is_given_up(before: bytes) -> None:
    with Server(PATIENT) as server, server.connected() as sock:
        sock.sendall(before + b"GET /healthz HTTP/1.1\r\nX-A: " + b"a" * 70_000)
        assert ended(sock)


def test_where_there_are_too_many_the_oldest_that_has_asked_nothing_gives_way() -> None:
    with Server(Limits(connections=3, head_s=60)) as server:
        router, silent, newer, last, none = (server.connected() for _ in range(5))
        healthy(router)
        for sock in (silent, newer):
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
            assert ended(sock)
        for sock in (last, none, router):
            healthy(sock)
        with server.connected() as refused:
            assert b"too many connections; ask again later" in refused.recv(1 << 16)
        healthy(router)
        for sock in (router, silent, newer, last, none):
            sock.close()


def test_who_takes_nothing_of_an_answer_loses_it() -> None:
    with Server(QUICK) as server, server.connected(receives=4096) as sock:
        sock.sendall(STREAM)
        wait_for(lambda: server.streams == 1)
        wait_for(lambda: server.streams == 0)
        assert ended(sock)


def test_who_leaves_in_the_middle_of_an_answer_ends_it() -> None:
    with Server(PATIENT) as server:
        with server.connected() as sock:
            sock.sendall(STREAM)
            assert len(sock.recv(1 << 16)) > 0
        wait_for(lambda: server.streams == 0)


def test_who_takes_nothing_is_left_behind_when_the_server_stops(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Server(PATIENT) as server, server.connected(receives=4096) as sock:
        sock.sendall(STREAM)
        wait_for(lambda: server.streams == 1)
        server.stop()
        assert ended(sock)
    assert "Exception" not in caplog.text
    assert "Cancel" not in caplog.text
