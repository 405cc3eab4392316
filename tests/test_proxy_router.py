"""The router before engines: a real process, HTTP servers that act as engines, and an index."""

import http.client
import itertools
import json
import signal
import socket
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.proxy.ask import CHAT as CHAT_COMPLETIONS
from connectors.proxy.ask import COMPLETIONS, ask_of
from connectors.proxy.engine import Engine
from connectors.proxy.settings import load
from connectors.proxy.transcript import Diverged, Transcript
from kvstore.engine_hashes import vllm_block_hashes
from kvstore.engine_keys import engine_hash64
from kvstore.errors import ConfigError
from tests.event_publisher import EventPublisher
from tests.locator import Locator
from tests.node import free_ports, wait_for
from tests.router import Router, Said
from tests.serving_engine import ADAPTER, MODEL, Act, ScriptedIndex, Served, ServingEngine

PROMPT: Final = " ".join(f"w{number}" for number in range(40))
TOKENS: Final = list(range(40))
CHAT: Final = {"messages": [{"role": "user", "content": PROMPT}]}
TOOLS: Final = {**CHAT, "tools": [{"type": "function", "function": {"name": "look_up"}}]}
COMPLETION: Final = {"prompt": PROMPT}
KINDS: Final = pytest.mark.parametrize("kind", [COMPLETION, CHAT, TOOLS], ids=["completion", "chat", "tools"])


class Asker(Router):
    """It asks for twelve words of the model, unless told otherwise."""

    def __init__(self, engines: Sequence[Served], **said: Any) -> None:
        super().__init__([engine.address for engine in engines], **said)

    @contextmanager
    def asked(
        self, body: Any, path: str = "", headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        if isinstance(body, dict):
            body = {"model": MODEL, "max_tokens": 12, **body}
        with super().asked(body, path, headers) as response:
            yield response


@pytest.fixture(scope="module")
def engines() -> Iterator[list[ServingEngine]]:
    """Three that answer alike in pieces of one, two and five words; the third is not started."""
    with ServingEngine(1) as one, ServingEngine(2) as two:
        yield [one, two]


@pytest.fixture(scope="module")
def shared(engines: list[ServingEngine]) -> Iterator[Asker]:
    """Before these engines, without an index."""
    with Asker(
        engines, idle_s=0.3, first_token_s=0.5, whole_s=0.5, body_s=0.3, body_bytes_max=100_000
    ) as router:
        yield router


@pytest.fixture
def router(shared: Asker, engines: list[ServingEngine]) -> Asker:
    """With engines that are there and have nothing planned."""
    for engine in engines:
        engine.plan.clear()
        engine.requests.clear()
        engine.sent.clear()
    wait_for(lambda: all(shared.is_up(engine.address) for engine in engines))
    return shared


def plan(engines: Sequence[ServingEngine], *acts: Act) -> None:
    """Let the first request to any of the engines have the first act, and so on."""
    shared = engines[0].plan
    shared.extend(acts)
    for engine in engines[1:]:
        engine.plan = shared


def asked_of(engines: Sequence[ServingEngine]) -> int:
    return sum(len(engine.requests) for engine in engines)


@KINDS
def test_answers_are_passed_on_byte_for_byte(
    router: Asker, engines: list[ServingEngine], kind: dict[str, Any]
) -> None:
    events = router.stream(kind)
    assert [events] == [sent for engine in engines for sent in engine.sent]
    status, body = router.ask({**COMPLETION, "temperature": 0, "unheard_of": {"x": [1]}})
    assert (status, json.loads(body)["choices"][0]["text"]) == (200, Said(router.stream(COMPLETION)).text)
    assert {"x": [1]} in [request.get("unheard_of") for engine in engines for request in engine.requests]


@pytest.mark.parametrize("act", [Act.FAIL, Act.SILENCE])
@pytest.mark.parametrize("streamed", [False, True])
def test_what_one_engine_does_not_answer_another_one_does(
    router: Asker, engines: list[ServingEngine], act: Act, streamed: bool
) -> None:
    expected = Said(router.stream(COMPLETION)).text
    plan(engines, act)
    if streamed:
        assert Said(router.stream(COMPLETION)).text == expected
    else:
        assert json.loads(router.ask(COMPLETION)[1])["choices"][0]["text"] == expected
    assert asked_of(engines) == 3


@KINDS
@pytest.mark.parametrize("act", [Act.DIE, Act.STALL, Act.ERROR])
def test_a_stream_whose_engine_dies_goes_on_from_another_one(
    router: Asker, engines: list[ServingEngine], kind: dict[str, Any], act: Act
) -> None:
    expected = Said(router.stream(kind))
    plan(engines, act)
    said = Said(router.stream(kind))
    assert said.content == expected.content
    assert said.is_whole
    assert len(said.ids) == 1
    assert len(said.calls) == ("tools" in kind)
    assert said.pieces[-1]["usage"] == expected.pieces[-1]["usage"]
    assert asked_of(engines) == 3


def test_two_answers_that_differ_are_never_mixed() -> None:
    with ServingEngine(1, seed=1) as one, ServingEngine(1, seed=2) as two, Asker([one, two]) as router:
        plan([one, two], Act.DIE)
        said = Said(router.stream(COMPLETION))
        assert not said.is_whole
        assert said.reasons == []
        assert "differs after" in said.pieces[-1]["error"]["message"]
        assert said.text in {
            "".join(engine._answer({**COMPLETION, "max_tokens": 3})) for engine in (one, two)
        }


def test_an_error_of_the_client_is_passed_on_and_not_repeated(
    router: Asker, engines: list[ServingEngine]
) -> None:
    plan(engines, Act.REFUSE)
    status, body = router.ask(COMPLETION)
    assert (status, json.loads(body)) == (400, {"error": {"message": "refuse", "code": 400}})
    assert asked_of(engines) == 1


def test_an_error_of_all_engines_is_told_in_the_last_one_s_words(
    router: Asker, engines: list[ServingEngine]
) -> None:
    plan(engines, Act.FAIL, Act.FAIL)
    status, body = router.ask(COMPLETION)
    assert (status, json.loads(body)["error"]["message"]) == (500, "fail")
    assert asked_of(engines) == 2


def test_the_engine_s_request_ends_when_the_client_leaves(
    router: Asker, engines: list[ServingEngine]
) -> None:
    left = sum(engine.left for engine in engines)
    plan(engines, Act.STALL)
    with router.asked({**COMPLETION, "stream": True}) as response:
        assert response.readline().startswith(b"data: ")
    wait_for(lambda: sum(engine.left for engine in engines) == left + 1, 0.25)
    wait_for(lambda: router.metric("running") == 0)
    assert asked_of(engines) == 1


def test_an_engine_that_is_gone_is_left_alone_until_it_is_back() -> None:
    with ServingEngine() as one, ServingEngine() as two, Asker([one, two]) as router:
        one.stop()
        for _ in range(8):
            assert router.ask(COMPLETION)[0] == 200
        assert not router.is_up(one.address)
        assert router.metric("retries_total", engine=one.address) <= 1
        assert router.ask(None, "/readyz")[0] == 200
        two.stop()
        status, body = router.ask(COMPLETION)
        assert status == 502
        assert b"ask again" in body
        assert router.ask(None, "/readyz")[0] == 503
        one.start()
        wait_for(lambda: router.is_up(one.address))
        assert router.ask(COMPLETION)[0] == 200


def test_without_an_index_requests_go_to_the_least_loaded(
    router: Asker, engines: list[ServingEngine]
) -> None:
    one, two = engines
    plan(engines, Act.STALL)
    with router.asked({**COMPLETION, "stream": True}) as response:
        response.readline()
        busy, idle = (one, two) if one.requests else (two, one)
        assert router.metric("running", engine=busy.address) == 1
        for _ in range(4):
            assert router.ask(COMPLETION)[0] == 200
    assert (len(busy.requests), len(idle.requests)) == (1, 4)


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "no JSON object"),
        (b"[]", 400, "no JSON object"),
        (b'{"model": "\xff"}', 400, "no JSON object"),
        (b" " * 100_001, 413, "longer than 100000 bytes"),
    ],
)
def test_a_bad_request_is_refused_in_a_sentence(
    router: Asker, engines: list[ServingEngine], body: bytes, status: int, sentence: str
) -> None:
    told, answer = router.ask(body, "/v1/completions")
    assert told == status
    assert sentence in json.loads(answer)["error"]["message"]
    assert asked_of(engines) == 0


def test_a_body_that_does_not_come_is_not_waited_for(router: Asker) -> None:
    with socket.create_connection(router.address, timeout=20) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 408 ")


def test_clients_need_the_token_where_there_is_one_and_engines_are_told_theirs() -> None:
    environ = {"KVSTORE_PROXY_TOKEN": "outer", "KVSTORE_ENGINE_TOKEN": "inner"}
    with ServingEngine() as engine, Asker([engine], environ=environ) as router:
        for given in ({}, {"Authorization": "Bearer inner"}):
            assert router.ask(COMPLETION, headers=given)[0] == 401
            assert router.ask(None, "/v1/models", given)[0] == 401
        known = {"Authorization": "Bearer outer", "X-Request-Id": "7", "X-Data-Parallel-Rank": "7"}
        status, body = router.ask(COMPLETION, headers={**known, "Origin": "http://page"})
        assert (status, "ask from a program" in json.loads(body)["error"]["message"]) == (403, True)
        assert router.ask(COMPLETION, headers=known)[0] == 200
        assert engine.headers[0]["Authorization"] == "Bearer inner"
        assert engine.headers[0]["x-request-id"] == "7"
        assert "X-Data-Parallel-Rank" not in engine.headers[0]


def test_no_more_requests_are_let_in_than_may_be_under_way() -> None:
    with ServingEngine() as engine, Asker([engine], requests_max=1) as router:
        plan([engine], Act.STALL)
        with router.asked({**COMPLETION, "stream": True}) as response:
            response.readline()
            assert router.ask(COMPLETION)[0] == 503


def test_no_more_bytes_of_bodies_are_taken_than_may_be_under_way() -> None:
    with (
        ServingEngine() as engine,
        Asker([engine], body_bytes_max=100_000, bodies_bytes_max=100_000) as router,
    ):
        plan([engine], Act.STALL)
        large = {**COMPLETION, "padding": "x" * 60_000}
        with router.asked({**large, "stream": True}) as response:
            response.readline()
            status, body = router.ask(large)
            assert (status, b"bodies of 100000 bytes are under way" in body) == (503, True)
            assert router.ask(COMPLETION)[0] == 200
        wait_for(lambda: router.ask(large)[0] == 200)


def has_connection_from(port: int) -> bool:
    """Whether anybody here is connected to this port of a client, or has still something to send to it."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[2].endswith(f":{port:04X}") for line in lines)


def test_a_client_that_takes_nothing_loses_its_connection_and_its_request_at_the_engine() -> None:
    with ServingEngine() as engine, Asker([engine], client_s=0.1) as router:
        # Each piece repeats the model, and all of them are more than any buffers on the way.
        asked = {**COMPLETION, "model": "m" * 100_000, "max_tokens": 500, "stream": True}
        body = json.dumps(asked).encode()
        with socket.create_connection(router.address, timeout=20) as slow:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            slow.sendall(head.encode() + body)
            wait_for(lambda: engine.left == 1)
            wait_for(lambda: router.metric("running") == 0)
            wait_for(lambda: not has_connection_from(slow.getsockname()[1]))
        assert router.ask(COMPLETION)[0] == 200


def test_without_a_token_engines_are_told_what_the_client_says(
    router: Asker, engines: list[ServingEngine]
) -> None:
    assert router.ask(COMPLETION, headers={"Authorization": "Bearer mine"})[0] == 200
    assert "Bearer mine" in [engine.headers[-1].get("Authorization") for engine in engines if engine.headers]


def test_the_models_of_all_engines_are_listed() -> None:
    with ServingEngine() as one, ServingEngine(adapters=(ADAPTER,)) as two, Asker([one, two]) as router:

        def listed() -> set[str]:
            return {entry["id"] for entry in json.loads(router.ask(None, "/v1/models")[1])["data"]}

        wait_for(lambda: listed() == {MODEL, ADAPTER})
        for _ in range(4):
            assert router.ask({**COMPLETION, "model": ADAPTER})[0] == 200
        assert len(two.requests) == 4


def test_a_prompt_goes_where_the_index_says_under_its_salt_and_adapter() -> None:
    with (
        ServingEngine(adapters=(ADAPTER,)) as one,
        ServingEngine(adapters=(ADAPTER,)) as two,
        ScriptedIndex() as index,
        Asker([one, two], index=index.url) as router,
    ):
        placements = [{"engine": "10.9.9.9:1"}, {"engine": f"{two.address}#1", "remote": 32}]
        index.answer = {"id": "7", "placements": placements}
        wait_for(lambda: len(json.loads(router.ask(None, "/v1/models")[1])["data"]) == 2)
        assert Said(router.stream({**COMPLETION, "model": ADAPTER, "cache_salt": "s"})).is_whole
        asked = index.lookups.pop()
        assert sorted(asked.pop("engines"), key=lambda one: str(one["name"])) == sorted(
            ({"name": name, "waiting_tokens": 0, "running": 0} for name in (one.address, two.address)),
            key=lambda one: str(one["name"]),
        )
        assert asked == {"model": MODEL, "lora": ADAPTER, "salt": "s", "tokens": TOKENS, "route": True}
        assert two.headers[0]["X-data-parallel-rank"] == "1"
        wait_for(lambda: len(index.outcomes) == 1)
        assert index.outcomes[0].pop("ttft_ms") > 0
        assert index.outcomes.pop() == {"id": "7", "engine": f"{two.address}#1"}
        # Token ids are used as they are, and a prompt is made tokens of once.
        assert router.ask({"prompt": TOKENS, "max_tokens": 1})[0] == 200
        assert router.ask({**COMPLETION, "model": ADAPTER})[0] == 200
        assert [one["tokens"] for one in index.lookups] == [TOKENS, TOKENS]
        assert one.tokenized + two.tokenized == 1
        wait_for(lambda: len(index.outcomes) == 2)
        assert [one["cached_tokens"] for one in index.outcomes] == [16, 16]
        seen, unseen = sorted(index.outcomes, key=lambda one: one.get("ended", False))
        assert seen["ttft_ms"] > 0
        assert unseen["ended"] is True
        assert "ttft_ms" not in unseen
        assert router.metric("choices_total", engine=two.address, reason="prefix") == 3
        # An image's tokens are not known here.
        image = {"type": "image_url", "image_url": {"url": "data:,"}}
        assert router.ask({"messages": [{"role": "user", "content": [image]}]})[0] == 200
        assert router.metric("fallbacks_total", why="no-tokens") == 1
        # An engine that fails is told of, and the next one is asked for among the others.
        index.lookups.clear()
        plan([two], Act.FAIL)
        assert router.ask({**COMPLETION, "model": ADAPTER})[0] == 200
        wait_for(lambda: {"id": "7", "engine": f"{two.address}#1", "failed": True} in index.outcomes)
        assert [len(one["engines"]) for one in index.lookups] == [2, 1]


def test_an_index_of_another_kind_costs_nothing_but_its_advice() -> None:
    with ServingEngine() as engine, ScriptedIndex() as index, Asker([engine], index=index.url) as router:
        for index.status in (404, 404, 404, 404, 422, 500):
            assert router.ask(COMPLETION)[0] == 200
        index.status, index.answer = 200, {"placements": 1}
        assert router.ask(COMPLETION)[0] == 200
        assert router.metric("fallbacks_total", why="index-refused") == 7
        assert "index-refused: 404 {" in router.log


def test_requests_follow_the_index_and_do_without_when_it_is_away(tmp_path: Path) -> None:
    hashes = [engine_hash64(one) for one in vllm_block_hashes(TOKENS, 16)]
    with ServingEngine() as one, ServingEngine() as two, EventPublisher() as publisher:
        config = tmp_path / "index.toml"
        events = {one: f"tcp://127.0.0.1:{free_ports(1)[0]}", two: publisher.endpoint}
        config.write_text(
            "".join(
                f'[[index.engines]]\nname = "{engine.address}"\nevents = "{endpoint}"\n'
                f'model = "{MODEL}"\nhash = "sha256"\n'
                for engine, endpoint in events.items()
            )
        )
        with (
            Locator("--config", str(config)) as index,
            Asker([one, two], index=f"http://{index.http}", lookup_ms=1000) as router,
        ):
            publisher.wait_for_subscriber()
            publisher.publish([[hashes[0], None]], [[hashes[1], hashes[0]]])
            wait_for(lambda: index.finds("gpu", 32, two.address, model=MODEL, tokens=TOKENS))
            for number in range(6):
                assert router.ask({"prompt": [*TOKENS, number]})[0] == 200
                wait_for(lambda: router.metric("outcomes_total", state="taken") == number + 1)  # noqa: B023
            assert len(two.requests) == 6
            assert router.metric("lookup_seconds_count") == 6
            index.process.send_signal(signal.SIGSTOP)
            try:
                assert router.ask(COMPLETION)[0] == 200
            finally:
                index.process.send_signal(signal.SIGCONT)
            assert router.metric("fallbacks_total", why="index-late") == 1
            index.kill()
            for _ in range(8):
                assert router.ask(COMPLETION)[0] == 200
            assert router.metric("fallbacks_total", why="index-away") == 8
            assert len(one.requests) > 0


def test_prefill_and_decode_are_at_different_engines() -> None:
    with (
        ServingEngine() as maker,
        ServingEngine() as decoder,
        Asker([decoder], prefill=[maker.url]) as router,
    ):
        wait_for(lambda: router.is_up(maker.address))
        body = {**COMPLETION, "max_tokens": 5, "min_tokens": 5, "n": 1, "stream_options": {}}
        assert len(Said(router.stream(body)).text.split()) == 5
        made, decoded = maker.requests[0], decoder.requests[0]
        assert made == {"model": MODEL, **COMPLETION, "max_tokens": 1, "stream": False}
        transfer = {"made_at": maker.address}
        assert decoded == {"model": MODEL, **body, "stream": True, "kv_transfer_params": transfer}
        plan([maker], Act.FAIL)
        assert Said(router.stream(body)).is_whole
        assert "kv_transfer_params" not in decoder.requests[-1]
        assert router.metric("prefills_total", state="done") == 1
        assert router.metric("prefills_total", state="failed") == 1


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({}, "give --engine"),
        ({"engines": ["http://a", "http://a"]}, "not all different"),
        ({"engines": ["http://a"], "attempts": 0}, "attempts"),
        ({"engines": ["http://a"], "atempts": 1}, "atempts"),
        ({"engines": ["http://a"], "listen": "0.0.0.0:80"}, "set KVSTORE_PROXY_TOKEN"),
        ({"engines": ["http://a"], "listen": "80"}, "HOST:PORT"),
        ({"engines": ["http://a"], "bodies_bytes_max": 2048}, "give at least as much"),
        ({"engines": ["http://a"], "index": "b:7405"}, "give http://HOST:PORT"),
    ],
)
def test_a_wrong_setting_is_told_with_the_remedy(said: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(None, said, has_token=False)


def cut(text: str, at: Sequence[int]) -> list[str]:
    """A text in pieces."""
    places = sorted({place % (len(text) + 1) for place in at} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def pieces(text: str, at: Sequence[int], id: str) -> list[dict[str, Any]]:
    """An answer with this text."""
    said: list[dict[str, Any]] = [
        {"id": id, "choices": [{"index": 0, "text": piece}]} for piece in cut(text, at)
    ]
    return [*said, {"id": id, "choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}]


def test_a_continuation_leaves_out_what_the_client_has_of_each_choice_and_list() -> None:
    def piece(id: str, start: int, end: int, chance: float) -> dict[str, Any]:
        rows = [{"token": f"w{number}", "logprob": chance} for number in range(start, end)]
        tokens = list(range(start, end))
        text = "".join(row["token"] for row in rows)
        choices = [
            {"index": index, "delta": {"content": text}, "logprobs": {"content": rows}, "token_ids": tokens}
            for index in (1, 0)
        ]
        return {"id": id, "choices": choices, "usage": None}

    transcript = Transcript()
    for start in range(3):
        assert transcript.take(piece("first", start, start + 1, -0.5)) is not None
    transcript.again()
    assert transcript.take(piece("second", 0, 2, -0.4)) is None
    got = transcript.take(piece("second", 2, 4, -0.4))
    assert got == piece("first", 3, 4, -0.4)
    transcript.again()
    transcript.take(piece("third", 0, 2, -0.5))
    with pytest.raises(Diverged, match="token_ids differs after 2 of 4"):
        transcript.take({"choices": [{"index": 1, "delta": {}, "token_ids": [9]}]})


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        (b"[1, 23 ,456]", b"[1, 23 ,456]"),
        (b"[ [1,2], [3] ]", b"[1,2]"),
        (b"[]", None),
        (b"[[], [1]]", None),
        (b"[1, -2]", None),
        (b"[1.5]", None),
        (b"[true]", None),
        (b'["see [1]"]', None),
        (b'[1, "a"]', None),
        (b'"[1]"', None),
        (b'{"a": [1]}', None),
        (b"[" + b"1," * (1 << 20) + b"1]", None),
    ],
)
def test_token_ids_are_found_as_they_were_written(prompt: bytes, ids: bytes | None) -> None:
    found = ask_of(COMPLETIONS, b'{"prompt": %b}' % prompt, {}).tokens
    assert (found and bytes(found.json)) == ids
    assert found is None or found.count == ids.count(b",") + 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("body", "known"),
    [
        (b'{"prompt": [%b]}' % b",".join([b"12345"] * 200_000), "tokens prefill"),
        (b'{"prompt": [%b]}' % b",".join([b'""'] * 200_000), "prefill"),
        (b'{"prompt": "", "other": [%b]}' % b",".join([b'{"a":1}'] * 200_000), "question"),
        (b'{"messages": [%b]}' % b",".join([b'{"content":[{"type":"text"}]}'] * 100_000), "prefill"),
        (b"{%b}" % b",".join([b'"%d":1' % number for number in range(200_000)]), ""),
    ],
    ids=["ids", "texts", "objects", "messages", "fields"],
)
def test_what_a_large_body_has_much_of_is_not_made_into_objects(body: bytes, known: str) -> None:
    path = CHAT_COMPLETIONS if b"messages" in body else COMPLETIONS
    tracemalloc.start()
    try:
        ask = ask_of(path, body, {})
        said = {"tokens": ask.tokens, "prefill": ask.prefill, "question": ask.question}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {name for name, value in said.items() if value is not None} == set(known.split())
    assert peak < 4 * len(body)


@pytest.mark.parametrize("url", ["http://a", "http://a:80", "http://a:80/"])
def test_an_engine_s_name_has_its_port_even_where_the_address_needs_none(url: str) -> None:
    assert Engine(url).name == "a:80"


places = st.lists(st.integers(0, 60), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.text("ab", max_size=40), st.lists(st.tuples(places, st.integers(0, 10)), max_size=3), places)
def test_an_answer_in_parts_of_many_engines_is_the_whole_one(
    text: str, parts: list[tuple[list[int], int]], last: list[int]
) -> None:
    transcript = Transcript()
    got: list[dict[str, Any]] = []
    for number, (at, length) in enumerate([*parts, (last, 99)]):
        transcript.again()
        for piece in pieces(text, at, str(number))[:length]:
            got += filter(None, [transcript.take(piece)])
    transcript.end()
    assert "".join(choice["text"] for piece in got for choice in piece["choices"]) == text
    assert [one["finish_reason"] for piece in got for one in piece["choices"] if "finish_reason" in one] == [
        "stop"
    ]
    assert {piece["id"] for piece in got} == {got[0]["id"]}


@settings(max_examples=60, deadline=None)
@given(st.text("ab", min_size=1, max_size=20), st.text("ab", max_size=20), places)
def test_an_answer_that_does_not_begin_as_another_one_is_found_out(
    had: str, other: str, at: list[int]
) -> None:
    transcript = Transcript()
    for piece in pieces(had, (), "first")[:-1]:
        transcript.take(piece)
    transcript.again()
    diverged = False
    try:
        for piece in pieces(other, at, "second"):
            transcript.take(piece)
    except Diverged:
        diverged = True
    assert diverged == (not other.startswith(had))
