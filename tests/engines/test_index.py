"""A real vLLM with KV events on feeds the index, which then says what vLLM finds in its prefix cache."""

import random
from collections.abc import Iterator
from typing import Final

import pytest

from tests.engines.checkpoint import VOCABULARY, write_checkpoint
from tests.engines.processes import Engine
from tests.locator import Locator
from tests.node import free_ports, wait_for

MODEL: Final = "tiny-llama"
NAME: Final = "10.0.0.5:8000"
BLOCK_TOKENS: Final = 32
RANDOM: Final = random.Random(8)

pytestmark = pytest.mark.timeout(300)


def prompt(tokens: int) -> list[int]:
    """Other tokens each time."""
    return RANDOM.choices(range(3, VOCABULARY), k=tokens)


@pytest.fixture(scope="module")
def ports() -> list[int]:
    """Of the events, and of their replay."""
    return free_ports(2)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, ports: list[int]) -> Iterator[Engine]:
    """It has some 16,000 tokens of room, and hashes as vLLM does by default."""
    folder = tmp_path_factory.mktemp("vllm")
    write_checkpoint(folder / MODEL)
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{ports[0]}",
        "replay_endpoint": f"tcp://*:{ports[1]}",
    }
    with Engine("engine", folder, MODEL, events=events) as engine:
        yield engine.ready()


@pytest.fixture(scope="module", params=["sha256", ""], ids=["single-key", "re-hashed"])
def index(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    engine: Engine,
    ports: list[int],
) -> Iterator[Locator]:
    """It follows the engine, and comes late: replay gives it what was."""
    config = tmp_path_factory.mktemp("index") / "index.toml"
    config.write_text(
        f"""
        [[index.engines]]
        name = "{NAME}"
        events = "tcp://127.0.0.1:{ports[0]}"
        replay = "tcp://127.0.0.1:{ports[1]}"
        model = "{MODEL}"
        block_tokens = {BLOCK_TOKENS}
        hash = "{request.param}"
        """
    )
    with Locator("--config", str(config)) as index:
        index.ready()
        yield index


def found(index: Locator, tokens: list[int], salt: str = "") -> int:
    """Leading tokens of a prompt that the engine has, as the index says."""
    return int(index.placements(model=MODEL, tokens=tokens, salt=salt)[NAME]["gpu"])


def test_the_index_says_what_vllm_reports_as_cached(engine: Engine, index: Locator) -> None:
    shared = prompt(300)
    first = engine.ask(shared)
    assert first.cached_tokens == 0
    wait_for(lambda: found(index, shared) == 288)
    for kept, new in ((300, 100), (200, 60), (31, 500), (32, 32), (289, 1)):
        asked = shared[:kept] + prompt(new)
        told = found(index, asked)
        answer = engine.ask(asked)
        assert told == answer.cached_tokens == kept // BLOCK_TOKENS * BLOCK_TOKENS
    # What it has generated is in its cache, too.
    longer = shared + first.tokens[:-1] + prompt(64)
    wait_for(lambda: found(index, longer) == 320)
    assert engine.ask(longer).cached_tokens == 320


def test_what_vllm_evicts_is_gone_from_the_index(engine: Engine, index: Locator) -> None:
    old = prompt(2048)
    engine.ask(old)
    wait_for(lambda: found(index, old) == 2048)
    told = found(index, old)
    asked = 0
    while told == 2048:
        engine.ask(prompt(3500))
        asked += 1
        told = found(index, old)
        assert asked < 100
    told = found(index, old)
    assert engine.ask(old).cached_tokens == told


def test_a_salt_of_another_request_finds_nothing(index: Locator, engine: Engine) -> None:
    shared = prompt(100)
    engine.ask(shared)
    wait_for(lambda: found(index, shared) == 96)
    assert found(index, shared, salt="tenant") == 0
