"""Two real vLLM engines behind the router, and an index that follows them: nothing is lost or differs."""

import http.client
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import pytest

from tests.engines.checkpoint import VOCABULARY, write_checkpoint
from tests.engines.serving import Serving
from tests.engines.tokenizer import write_tokenizer
from tests.locator import Locator
from tests.node import wait_for
from tests.router import Router, Said

MODEL: Final = "tiny-llama"
BLOCK_TOKENS: Final = 32
PREFIXES: Final = 5
REQUESTS: Final = 50
RANDOM: Final = random.Random(23)

pytestmark = pytest.mark.timeout(400)


@dataclass(frozen=True, slots=True)
class Request:
    """A request, and the token ids that its prompt is."""

    body: dict[str, Any]
    tokens: list[int]

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if "messages" in self.body else "/v1/completions"


def random_tokens(count: int) -> list[int]:
    return RANDOM.choices(range(3, VOCABULARY), k=count)


def words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def request(number: int, prefix: list[int], new_tokens: int = 16) -> Request:
    """Token ids, text, or messages, streamed or not, with a part of a prefix that others share."""
    tokens = prefix[: RANDOM.choice((160, 230, 300))] + random_tokens(RANDOM.randrange(20, 90))
    body: dict[str, Any] = {"model": MODEL, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    if number % 2:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if number % 3 == 0:
        return Request({**body, "prompt": tokens}, tokens)
    if number % 3 == 1:
        return Request({**body, "prompt": words(tokens)}, tokens)
    # The template begins each message with the token 1.
    messages = [
        {"role": "system", "content": words(tokens[:100])},
        {"role": "user", "content": words(tokens[100:])},
    ]
    return Request({**body, "messages": messages}, [1, *tokens[:100], 1, *tokens[100:]])


@dataclass(frozen=True, slots=True)
class Answer:
    """The text, and how many of the prompt's tokens the engine had."""

    text: str
    cached_tokens: int | None


def answer_of(request: Request, status: int, body: bytes) -> Answer:
    assert status == 200, body
    if "stream" in request.body:
        said = Said(body)
        assert said.is_whole, body
        assert said.reasons == ["length"]
        usage, text = said.pieces[-1]["usage"], said.text
    else:
        whole = json.loads(body)
        choice = whole["choices"][0]
        usage, text = whole["usage"], choice["text"] if "text" in choice else choice["message"]["content"]
    assert usage["prompt_tokens"] == len(request.tokens)
    return Answer(text, usage["prompt_tokens_details"]["cached_tokens"])


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("vllm")
    write_checkpoint(folder / MODEL)
    write_tokenizer(folder / MODEL)
    with Serving(2, folder, MODEL) as serving:
        yield serving.ready()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, serving: Serving) -> Iterator[Locator]:
    config = tmp_path_factory.mktemp("index") / "index.toml"
    config.write_text(
        "".join(
            f"""
            [[index.engines]]
            name = "{address}"
            events = "tcp://127.0.0.1:{events}"
            replay = "tcp://127.0.0.1:{replay}"
            model = "{MODEL}"
            block_tokens = {BLOCK_TOKENS}
            hash = "sha256"
            """
            for address, (_, events, replay) in zip(serving.addresses, serving.ports, strict=True)
        )
    )
    with Locator("--config", str(config)) as index:
        wait_for(lambda: index.log.count("connected to") == 2)
        yield index


@pytest.fixture(scope="module")
def router(serving: Serving, index: Locator) -> Iterator[Router]:
    with Router(serving.addresses, index=f"http://{index.http}", lookup_ms=1000) as router:
        yield router


def test_fifty_requests_are_answered_as_by_one_engine_though_another_is_killed(
    serving: Serving, index: Locator, router: Router
) -> None:
    prefixes = [random_tokens(300) for _ in range(PREFIXES)]
    requests = [request(number, prefixes[number % PREFIXES]) for number in range(REQUESTS)]
    before, after = requests[: REQUESTS // 2], requests[REQUESTS // 2 :]
    answers = [ask_as_the_index_says(index, router, one) for one in before]
    # Of each prefix all find some but the first, and the first in messages, where it begins otherwise.
    assert sum(bool(answer.cached_tokens) for answer in answers) >= len(before) - 2 * PREFIXES
    long = request(1, prefixes[0], new_tokens=200)
    with ThreadPoolExecutor(6) as pool, router.asked({**long.body}) as response:
        events = response.readline()
        dying = next(name for name in serving.addresses if router.metric("running", engine=name) == 1)
        under_way = [pool.submit(router.ask, one.body) for one in after]
        while len(Said(events).pieces) < 20:
            events += response.readline()
        assert not Said(events).is_whole
        serving.kill(dying)
        events += response.read()
        answers += [answer_of(one, *future.result()) for one, future in zip(after, under_way, strict=True)]
    assert router.metric("retries_total", engine=dying) >= 1
    assert not router.is_up(dying)
    left = next(name for name in serving.addresses if name != dying)
    with ThreadPoolExecutor(4) as pool:
        direct = list(pool.map(lambda one: ask_directly(left, one).text, [*requests, long]))
    assert [*(answer.text for answer in answers), Said(events).text] == direct


def ask_as_the_index_says(index: Locator, router: Router, request: Request) -> Answer:
    """The answer; what the engine had of the prompt is what the index had said that it has."""
    placements = index.placements(model=MODEL, tokens=request.tokens)
    counts = {name: router.metric("choices_total", engine=name) for name in placements}
    status, body = router.ask(request.body)
    answer = answer_of(request, status, body)
    chosen = [name for name in placements if router.metric("choices_total", engine=name) > counts[name]]
    assert [placements[name]["gpu"] for name in chosen] == [answer.cached_tokens]
    blocks = len(request.tokens) // BLOCK_TOKENS * BLOCK_TOKENS
    wait_for(lambda: index.finds("gpu", blocks, model=MODEL, tokens=request.tokens))
    return answer


def ask_directly(address: str, request: Request) -> Answer:
    """What one engine says by itself."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", request.path, json.dumps(request.body), {"Content-Type": "application/json"})
    with connection.getresponse() as response:
        answer = answer_of(request, response.status, response.read())
    connection.close()
    return answer
