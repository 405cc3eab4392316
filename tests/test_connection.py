"""A connection and its end, over real sockets."""

import asyncio
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore.errors import LeaseError
from kvstore.node import server as server_module
from kvstore.node.connection import Connection
from kvstore.node.server import Server
from kvstore.node.session import Session
from tests.node import RawConnection
from tests.scripted import Stage


class Listener:
    """A handler that remembers whether it was told of the loss."""

    body_bytes_max = 1 << 20

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    def received(self, request_id: int, body: memoryview, payload_bytes: int) -> Sequence[memoryview]:
        return ()

    def payload_received(self) -> None:
        pass

    def lost(self) -> None:
        self.gone.set()


@pytest.mark.parametrize("unread_bytes", [0, 8 << 20], ids=["sent", "lost while sending"])
def test_a_handler_is_told_of_the_loss_whatever_fails_after_an_answer(
    unread_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    called = []

    def failing() -> None:
        called.append("failing")
        raise LeaseError("it has ended")

    async def scenario() -> None:
        listener = Listener()
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        _, connection = await loop.connect_accepted_socket(lambda: Connection(lambda _: listener), sock=ours)
        with theirs:
            connection.send(b"first", [memoryview(bytes(unread_bytes))], after=failing)
            connection.send(b"second", [memoryview(bytes(unread_bytes))], after=lambda: called.append("well"))
            assert called == ([] if unread_bytes else ["failing", "well"])
        await asyncio.wait_for(listener.gone.wait(), 10)

    asyncio.run(scenario())
    assert called == ["failing", "well"]
    assert caplog.messages == ["what was to be done after an answer failed"]


def test_a_server_closes_although_a_session_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "_CLOSE_S", 0.05)
    monkeypatch.setattr(Session, "lost", lambda _: None)

    async def scenario(stage: Stage) -> None:
        server = Server(stage.store, [stage.memory], node="node", epoch=1, stop=lambda: None)
        await server.listen_unix(tmp_path / "node.sock")
        raw = await asyncio.to_thread(RawConnection, tmp_path / "node.sock")
        with raw:
            await asyncio.wait_for(server.hang_up(), 10)

    stage = Stage([])
    asyncio.run(scenario(stage))
    stage.close()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "1 sessions have not ended within 0.05 s"
    ]
