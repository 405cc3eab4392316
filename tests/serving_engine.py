"""Small HTTP servers that speak as engines and as an index do, and do as a test says. There is no model.

An engine's answer follows from the prompt and the seed alone, so that all engines of one seed agree.
"""

import asyncio
import random
import threading
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from enum import StrEnum
from types import TracebackType
from typing import Any, Final, Self

import msgspec
from aiohttp import web

MODEL: Final = "m"
ADAPTER: Final = "tuned"
# When an act is due, in words of the answer.
EARLY: Final = 3


class Act(StrEnum):
    """What becomes of one request, in the middle of its answer where that streams."""

    ANSWER = "answer"
    FAIL = "fail"  # 500
    REFUSE = "refuse"  # 400
    SILENCE = "silence"  # no answer at all, until who asks has left
    STALL = "stall"  # no more than the beginning
    DIE = "die"  # the connection ends
    ERROR = "error"  # an event says so


class Served:
    """An HTTP server on a thread of its own; `address` is HOST:PORT."""

    def __init__(self, routes: list[web.RouteDef]) -> None:
        self._routes = routes
        self._started = threading.Event()
        self._port = 0

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.add_routes(self._routes)
        # Handlers are cancelled when who asks leaves.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = runner.addresses[0][1]
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """As flags take it."""
        return f"http://{self.address}"

    def stop(self) -> None:
        """End it and all its connections."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def start(self) -> None:
        """Start it, or start it again at the same port."""
        self._started.clear()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._started.wait(20)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self.stop()


class ServingEngine(Served):
    """An engine. `plan` says what becomes of the next requests; those after it are answered."""

    def __init__(self, words_per_piece: int = 1, seed: int = 0, adapters: tuple[str, ...] = ()) -> None:
        posts: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
            "/tokenize": self._tokenize,
            "/v1/completions": self._complete,
            "/v1/chat/completions": self._complete,
        }
        routes = [web.post(path, handle) for path, handle in posts.items()]
        super().__init__([*routes, web.get("/health", self._health), web.get("/v1/models", self._models)])
        self.plan: deque[Act] = deque()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.sent: list[bytes] = []
        self.left = 0
        self.probes = 0
        self.tokenized = 0
        self._words_per_piece = words_per_piece
        self._seed = seed
        self._adapters = adapters

    async def _health(self, _: web.Request) -> web.Response:
        self.probes += 1
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        entries = [{"id": MODEL, "object": "model", "parent": None}]
        entries += [{"id": name, "object": "model", "parent": MODEL} for name in self._adapters]
        return web.json_response({"object": "list", "data": entries})

    async def _tokenize(self, request: web.Request) -> web.Response:
        self.tokenized += 1
        return web.json_response({"tokens": tokens_of(await request.json())})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(request.headers)
        act = self.plan.popleft() if self.plan else Act.ANSWER
        try:
            if act is Act.SILENCE:
                await asyncio.Event().wait()
            if act in (Act.FAIL, Act.REFUSE):
                status = 500 if act is Act.FAIL else 400
                return web.json_response({"error": {"message": f"{act}", "code": status}}, status=status)
            if body.get("stream"):
                return await self._stream(request, body, act)
            return web.json_response(self._whole(body))
        except (asyncio.CancelledError, ConnectionResetError):
            self.left += 1
            raise asyncio.CancelledError from None

    async def _stream(self, request: web.Request, body: dict[str, Any], act: Act) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        sent = b""
        words = 0
        async for said in self._pieces(request.path, body):
            if words >= EARLY and act is Act.STALL:
                await asyncio.Event().wait()
            if words >= EARLY and act is Act.DIE:
                assert request.transport is not None
                request.transport.abort()
                return response
            if words >= EARLY and act is Act.ERROR:
                said = {"error": {"message": "the engine is dead", "code": 500}}
            event = b"data: " + msgspec.json.encode(said) + b"\n\n"
            sent += event
            await response.write(event)
            words += self._words_per_piece
        await response.write(b"data: [DONE]\n\n")
        self.sent.append(sent + b"data: [DONE]\n\n")
        return response

    async def _pieces(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """An answer in pieces, as vLLM cuts it."""
        words = self._answer(body)
        envelope = {
            "id": f"id-{random.random()}",
            "created": random.randrange(1 << 30),
            "model": body["model"],
        }
        call = f"call-{random.random()}"
        chat, tools = path.endswith("chat/completions"), "tools" in body
        if chat:
            yield {**envelope, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        for start in range(0, len(words), self._words_per_piece):
            piece = "".join(words[start : start + self._words_per_piece])
            reason = "length" if start + self._words_per_piece >= len(words) else None
            choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
            if not chat:
                choice["text"] = piece
            elif not tools:
                choice["delta"] = {"content": piece}
            elif start == 0:
                function = {"name": "look_up", "arguments": piece}
                choice["delta"] = {
                    "tool_calls": [{"index": 0, "id": call, "type": "function", "function": function}]
                }
            else:
                choice["delta"] = {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
            yield {**envelope, "choices": [choice]}
        usage = {"prompt_tokens": len(tokens_of(body)), "completion_tokens": len(words)}
        yield {**envelope, "choices": [], "usage": usage}

    def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        usage = {"completion_tokens": body["max_tokens"], "prompt_tokens_details": {"cached_tokens": 16}}
        choice = {"index": 0, "text": "".join(self._answer(body)), "finish_reason": "length"}
        transfer = {"made_at": self.address}
        return {"id": "1", "choices": [choice], "usage": usage, "kv_transfer_params": transfer}

    def _answer(self, body: dict[str, Any]) -> list[str]:
        prompt = repr((tokens_of(body), self._seed)).encode()
        return [f" w{zlib.crc32(prompt, number) % 1000}" for number in range(body["max_tokens"])]


class ScriptedIndex(Served):
    """An index that answers lookups with `status` and `answer`, and keeps what it was asked and told."""

    def __init__(self) -> None:
        super().__init__([web.post("/v1/lookup", self._lookup), web.post("/v1/outcome", self._outcome)])
        self.status = 200
        self.answer: dict[str, Any] = {"placements": []}
        self.lookups: list[dict[str, Any]] = []
        self.outcomes: list[dict[str, Any]] = []

    async def _lookup(self, request: web.Request) -> web.Response:
        self.lookups.append(await request.json())
        return web.json_response(self.answer, status=self.status)

    async def _outcome(self, request: web.Request) -> web.Response:
        self.outcomes.append(await request.json())
        return web.json_response({})


def tokens_of(body: dict[str, Any]) -> list[int]:
    """Of a prompt: the numbers in its words."""
    if "messages" in body:
        contents = [message["content"] for message in body["messages"]]
        text = " ".join(content for content in contents if isinstance(content, str))
    elif isinstance(body["prompt"], list):
        return list(body["prompt"])
    else:
        text = body["prompt"]
    return [int(word.lstrip("w")) for word in text.split()]
