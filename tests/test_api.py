"""What routers are told over HTTP by a real index beside a real daemon: placements, routes, reserves."""

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.block import Namespace
from kvstore.client import StoreClient
from kvstore.config import load
from kvstore.engine_hashes import vllm_block_hashes
from kvstore.engine_keys import vllm_scheme
from kvstore.errors import ConfigError
from kvstore.index.asked import AskedEngine
from kvstore.index.chooser import PRICE, Load
from kvstore.index.placement import Engine
from kvstore.index.query import Query
from kvstore.index.routing import chain_of
from kvstore.index.service import Index
from kvstore.index.settings import paces_of
from kvstore.index.speeds import DEFAULTS, Speeds
from kvstore.index.traits import DEFAULT, TOKEN_BYTES, Paces
from kvstore.knobs import IndexConfig
from tests.locator import Locator
from tests.node import Node, pinned, wait_for

NEAR, FAR = "10.0.0.1:8000", "10.0.0.2:8000"
MODEL = "m"
SPACE = Namespace(MODEL, 16, scheme=vllm_scheme())
NODE = f"""
node = "node-a"
[events]
feed = "127.0.0.1:0"
publish = "127.0.0.1:0"
replay = "127.0.0.1:0"
engines = ["{NEAR}"]
"""
INDEX = f"""
[[index.engines]]
name = "{FAR}"
prefill_tokens_s = 20000
kv_bytes_per_token = 1000
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    path = tmp_path_factory.mktemp("node") / "node.toml"
    path.write_text(NODE)
    with Node("64MiB", "--config", str(path)) as node:
        yield node


@pytest.fixture(scope="module")
def index(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locator]:
    path = tmp_path_factory.mktemp("index") / "index.toml"
    path.write_text(INDEX)
    with Locator("--config", str(path), "--node", node.endpoint("feed")) as index:
        index.ready()
        yield index


@pytest.fixture
def store(node: Node) -> Iterator[StoreClient]:
    with node.client() as store:
        yield store


def prompt(length: int) -> list[int]:
    """Tokens that no other prompt begins with."""
    return [random.randrange(128_000) for _ in range(length)]


def answered(index: Locator, path: str = "/v1/lookup", **question: Any) -> Any:
    status, text = index.ask(path, question)
    assert status == 200, text
    return json.loads(text)


def had(index: Locator, store: StoreClient, tokens: list[int]) -> list[int]:
    """The prompt, once the index knows that the node has its blocks."""
    with store.reserve(SPACE, vllm_block_hashes(tokens, 16), 64) as write:
        write.commit()
    wait_for(lambda: index.finds("dram", len(tokens), NEAR, model=MODEL, tokens=tokens))
    return tokens


def test_placements_come_with_what_they_would_take(index: Locator, store: StoreClient) -> None:
    tokens = had(index, store, prompt(4096))
    found = answered(index, model=MODEL, tokens=[*tokens, *range(1000)], engines=[NEAR, FAR], explain=True)
    assert (found["id"], found["prompt_tokens"], found["reserved"]) == (None, 5096, None)
    near, far = found["placements"]
    assert (near["engine"], near["dram"], far["engine"], far["dram"]) == (NEAR, 4096, FAR, 0)
    soon = near["estimate"]
    assert (soon["load_tokens"], soon["medium"], soon["wait_ms"]) == (4096, "dram", 0)
    assert soon["ttft_ms"] == pytest.approx(soon["load_ms"] + soon["recompute_ms"], abs=0.01)
    assert 0 < soon["load_ms"] < soon["ttft_ms"] < far["estimate"]["ttft_ms"] <= far["estimate"]["score_ms"]
    assert far["estimate"]["recompute_ms"] > 5096 / 20_000 * 1000
    assert near["reasons"][0].startswith("loads 4,096 tokens from dram in ")
    assert any(f"later than {NEAR}" in reason for reason in far["reasons"])


def test_a_busy_engine_is_not_the_first(index: Locator, store: StoreClient) -> None:
    tokens = had(index, store, prompt(1024))
    for told in ({"wait_ms": 5000}, {"waiting_tokens": 100_000}):
        busy = {"name": NEAR, "running": 3, **told}
        found = answered(index, model=MODEL, tokens=tokens, engines=[busy, FAR])
        assert [one["engine"] for one in found["placements"]] == [FAR, NEAR]
        assert found["placements"][1]["estimate"]["wait_ms"] >= 5000
    assert "reasons" not in found["placements"][0]
    (first,) = answered(index, model=MODEL, tokens=tokens, engines=[busy, FAR], top_k=1)["placements"]
    assert first["engine"] == FAR


def test_cold_prompts_go_where_fewer_were_sent_and_come_back_to_their_blocks(index: Locator) -> None:
    engines = ["10.1.0.1:1", "10.1.0.2:1"]
    ask: dict[str, Any] = {"model": "cold", "engines": engines, "route": True}
    one, other = prompt(2048), prompt(2048)
    first, second = answered(index, tokens=one, **ask), answered(index, tokens=other, **ask)
    went = [found["placements"][0]["engine"] for found in (first, second)]
    assert sorted(went) == engines
    for found, tokens in ((first, one), (second, other)):
        reported = answered(index, "/v1/outcome", id=found["id"], ttft_ms=1)
        assert reported["error_ms"] == pytest.approx(1 - reported["predicted_ms"], abs=0.01)
        again = answered(index, tokens=tokens, model="cold", engines=engines)["placements"][0]
        assert (again["engine"], again["expected"]) == (found["placements"][0]["engine"], 2048)
    by_keys = answered(index, model="new", keys=["00", "01"], namespace={"block_tokens": 64}, engines=engines)
    assert by_keys["prompt_tokens"] == 128


def test_engines_that_only_routers_name_have_no_metrics(index: Locator) -> None:
    made_up = "10.1.0.3:1"
    for engine in (made_up, NEAR):
        route = answered(index, tokens=prompt(2048), model=MODEL, engines=[engine], route=True)["id"]
        answered(index, "/v1/outcome", id=route)
    metrics = index.ask("/metrics")[1]
    assert f'kvstore_index_engine_slowness{{engine="{NEAR}"}}' in metrics
    assert made_up not in metrics


def test_a_prompt_is_expected_for_its_own_model_adapter_and_salt(index: Locator) -> None:
    ask: dict[str, Any] = {"tokens": prompt(64), "engines": [FAR]}
    answered(index, model="ours", **ask, route=True)
    expected = [
        answered(index, **{"model": "ours", **ask, **other})["placements"][0]["expected"]
        for other in ({}, {"model": "theirs"}, {"salt": "s"}, {"lora": "l"})
    ]
    assert expected == [64, 0, 0, 0]


def test_an_engine_that_nobody_has_heard_of_is_a_candidate_that_has_nothing(index: Locator) -> None:
    (one,) = answered(index, model=MODEL, tokens=prompt(64), engines=["10.9.9.9:1"])["placements"]
    assert (one["engine"], one["remote"], one["age_ms"]) == ("10.9.9.9:1", 0, None)


def test_a_model_or_a_prompt_of_which_nothing_is_known_is_no_error(index: Locator) -> None:
    (one,) = answered(index, model="nobody has it", tokens=prompt(64))["placements"]
    assert (one["engine"], one["remote"]) == (NEAR, 0)
    empty = answered(index, model=MODEL, tokens=[])
    assert (empty["prompt_tokens"], empty["placements"][0]["estimate"]["load_tokens"]) == (0, 0)
    assert answered(index, model=MODEL, tokens=[], engines=[], route=True)["id"] is None


def test_outcomes_are_counted_once_and_predictions_are_measured(index: Locator) -> None:
    before = index.metric("kvstore_index_prediction_error_seconds_count")
    ask: dict[str, Any] = {"model": MODEL, "tokens": prompt(64), "engines": [FAR], "route": True}
    route = answered(index, **ask)["id"]
    assert index.metric("kvstore_index_routes_open") >= 1
    assert answered(index, "/v1/outcome", id=route, ttft_ms=30, cached_tokens=0)["predicted_ms"] > 0
    status, text = index.ask("/v1/outcome", {"id": route})
    assert (status, text) == (
        410,
        f"route {route} is over: report its outcome once, within seconds of its time\n",
    )
    for unknown in ("x", "", route + "0", "0" + route, "-1", route.replace("-", "-x")):
        assert index.ask("/v1/outcome", {"id": unknown})[0] == 404, unknown
    assert answered(index, "/v1/outcome", id=answered(index, **ask)["id"], failed=True)["error_ms"] is None
    moved = answered(index, "/v1/outcome", id=answered(index, **ask)["id"], engine=NEAR, ttft_ms=5)
    assert moved["error_ms"] is None
    assert answered(index, "/v1/outcome", id=answered(index, **ask)["id"], ended=True)["error_ms"] is None
    assert index.metric("kvstore_index_prediction_error_seconds_count") == before + 1
    assert index.metric('kvstore_index_outcomes_total{what="late"}') >= 1
    assert index.metric('kvstore_index_outcomes_total{what="unknown"}') >= 6


def test_a_reserve_pins_what_the_node_has_until_its_outcome(index: Locator, store: StoreClient) -> None:
    tokens = had(index, store, prompt(512))
    found = answered(index, model=MODEL, tokens=tokens, engines=[NEAR], reserve_ms=60_000)
    assert found["reserved"] == {
        "engine": NEAR,
        "nodes": {"node-a": {"pinned": 32, "loading": 0, "missing": 0}},
        "blocks": 32,
        "expires_ms": 60_000,
        "problems": [],
    }
    assert pinned(store) == 32
    answered(index, "/v1/outcome", id=found["id"], ttft_ms=1)
    wait_for(lambda: pinned(store) == 0)


def test_a_lookup_goes_on_without_the_daemon_that_should_hold_its_prefix(
    index: Locator, node: Node, store: StoreClient
) -> None:
    tokens = had(index, store, prompt(256))
    with node.stopped():
        found = answered(index, model=MODEL, tokens=tokens, engines=[NEAR], reserve_ms=100)
    assert found["reserved"]["blocks"] == 0
    assert found["reserved"]["problems"] == ["node-a has not answered within 50 ms"]
    wait_for(lambda: pinned(store) == 0)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"tokens": [1 << 40]}, "at `$.tokens[0]`; it is 1099511627776"),
        ({"tokens": [-1]}, "Expected `int` >= 0 - at `$.tokens[0]`; it is -1"),
        ({"tokens": [], "top_k": 0}, "Expected `int` >= 1 - at `$.top_k`; it is 0"),
        ({"tokens": [], "top_k": 1 << 70}, "at `$.top_k`"),
        ({"tokens": [], "reserve_ms": -1}, "Expected `int` >= 0 - at `$.reserve_ms`; it is -1"),
        ({"tokens": [], "reserve_ms": 600_001}, "Expected `int` <= 600000 - at `$.reserve_ms`; it is 600001"),
        ({"tokens": [], "route": 1}, "Expected `bool`, got `int` - at `$.route`; it is 1"),
        (
            {"tokens": [], "engines": ["e", {"name": "e"}]},
            "engine 'e' is named twice; give each candidate once",
        ),
        (
            {"tokens": [], "engines": [{"name": "e", "wait_ms": -0.5}]},
            "at `$.engines[0].wait_ms`; it is -0.5",
        ),
        (
            {"tokens": [], "engines": [{"name": "e", "wait_ms": 1e300}]},
            "at `$.engines[0].wait_ms`; it is 1e+300",
        ),
        ({"tokens": [], "engines": [{"name": "e", "running": 1e3}]}, "at `$.engines[0].running`"),
        ({"tokens": [], "engines": [{"name": "e", "running": 1 << 41}]}, "at `$.engines[0].running`"),
        ({"tokens": [], "engines": [{}]}, "Object missing required field `name` - at `$.engines[0]`"),
        ({"tokens": [], "engines": [1]}, "got `int` - at `$.engines[0]`; it is 1"),
        ({"tokens": [], "engines": ["e" * 256]}, "at `$.engines[0]`"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_a_bad_question_is_refused_with_the_value_and_the_limit(
    index: Locator, question: Any, message: str
) -> None:
    status, text = index.ask(body={"model": "m", **question})
    assert (status, text.count("\n")) == (422, 1)
    assert message in text


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b'{"id":"x","ttft_ms":NaN}'),
        (422, b'{"id":"x","ttft_ms":1e999}'),
        (400, b'{"id":"x","ttft_ms":Infinity}'),
        (422, b'{"id":"x","ttft_ms":-1}'),
        (422, b'{"id":"x","cached_tokens":%d}' % (1 << 80)),
        (422, b'{"id":"x","engine":[]}'),
        (422, b'{"id":"x","engine":"' + b"e" * 256 + b'"}'),
        (422, b'{"id":"x","ttft_ms":0,"failed":true}'),
        (422, b'{"id":"x","failed":true,"ended":true}'),
        (400, b'{"id":"' + b'{"a":' * 10_000),
        (422, b'{"id":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else "",
)
def test_a_bad_report_is_refused(index: Locator, status: int, body: bytes) -> None:
    assert index.ask("/v1/outcome", body)[0] == status


def test_the_document_names_every_path_and_what_may_come(index: Locator) -> None:
    document = json.loads(index.ask("/openapi.json")[1])
    assert {"/v1/lookup", "/v1/outcome", "/healthz", "/readyz", "/metrics", "/openapi.json"} <= set(
        document["paths"]
    )
    lookup = document["paths"]["/v1/lookup"]["post"]
    assert set(lookup["responses"]) == {"200", "400", "401", "403", "405", "408", "413", "422", "429"}
    assert set(document["paths"]["/v1/outcome"]["post"]["responses"]) >= {"404", "410"}
    assert "milliseconds" in document["components"]["schemas"]["Estimated"]["description"]


# What is no process's.


def test_prompts_are_known_again_by_the_smallest_blocks_there_are() -> None:
    tokens = list(range(128))
    fine, coarse = Namespace("m", 16, scheme="tokens"), Namespace("m", 64, scheme="tokens")
    chain = chain_of(Query("m", tokens=tokens), {coarse: [1, 2], fine: [3, 4, 5]})
    assert chain is not None
    assert (chain.keys, chain.block_tokens) == ([3, 4, 5], 16)
    cold = chain_of(Query("m", tokens=tokens), {})
    assert cold is not None
    assert (len(cold.keys), cold.block_tokens) == (8, 16)
    assert chain_of(Query("m", tokens=tokens[:15]), {}) is None
    assert chain_of(Query("m", keys=[]), {}) is None
    others = [
        Query("m", tokens=tokens, salt="s"),
        Query("m", tokens=tokens, lora="s"),
        Query("n", tokens=tokens),
    ]
    found = [chain_of(query, {fine: [3, 4, 5]}) for query in (Query("m", tokens=tokens), *others)]
    assert len({chain.space for chain in found if chain is not None}) == 4


def test_engines_are_as_fast_as_configured_and_others_as_the_defaults_say() -> None:
    config = load(
        None, {"index": {"engines": [{"name": "e", "prefill_tokens_s": 500, "kv_bytes_per_token": 7}]}}
    )
    paces = Paces(Speeds(), *paces_of(config.index))
    for name in ("e", "e#1"):
        traits = paces.of("m")(Engine(name, ("a", "b")))
        assert (traits.prefill.token_s, traits.token_bytes) == (1 / 500, 7)
    other = paces.of("m")(Engine("other"))
    assert (other.prefill, other.token_bytes, dict(other.speeds)) == (DEFAULT.prefill, TOKEN_BYTES, DEFAULTS)
    assert IndexConfig().price == PRICE


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"rate": -1}, "index.rate is -1"),
        ({"price": float("nan")}, "index.price is nan; give 0 to 100"),
        ({"prefill_tokens_s": 0}, "index: prefill_tokens_s is 0.0; give 1 to 1e9"),
        ({"engines": [{"name": "e", "prefill_tokens_s": 0.5}]}, "index.engines e: prefill_tokens_s is 0.5"),
        (
            {"engines": [{"name": "e", "prefill_tokens_s": 9, "ranks": 2}]},
            "index.engines e: nodes, replay or ranks",
        ),
        ({"engines": [{"name": "e", "kv_bytes_per_token": -1}]}, "kv_bytes_per_token is -1"),
        ({"engines": [{"name": "e"}]}, "give all three"),
    ],
)
def test_a_speed_that_cannot_be_is_refused(index: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, {"index": index})


def test_engines_of_another_model_are_told_only_by_name() -> None:
    async def names(engines: list[str] | None) -> set[str]:
        index = Index([], [], blocks_max=10)
        index.locality.set_engines([Engine("a", model="m"), Engine("b", model="other"), Engine("c#0")])
        found = await index.find(Query("m", tokens=[1]), engines)
        await index.close()
        return {engine.name for engine in found.engines}

    assert asyncio.run(names(None)) == {"a", "c#0"}
    assert asyncio.run(names(["b", "c", "d"])) == {"b", "c#0", "d"}


def test_the_load_that_a_router_names_is_in_seconds() -> None:
    assert AskedEngine("e").load is None
    assert AskedEngine("e", wait_ms=1500).load == Load(wait_s=1.5)
