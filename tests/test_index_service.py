"""A real index process beside real daemons: what routers are told over HTTP."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.block import Medium, Namespace
from kvstore.client import StoreClient
from kvstore.engine_hashes import vllm_block_hashes
from kvstore.engine_keys import vllm_scheme
from kvstore.index.keytable import ROOT
from kvstore.index.locality import Locality
from kvstore.index.placement import Engine
from kvstore.index.query import WAYS_MAX, Query, search_of
from kvstore.index.service import join
from tests.event_publisher import EventPublisher
from tests.locator import Locator
from tests.node import Node, wait_for

ENGINE = "10.0.0.1:8000"
MODEL = "m"
SHARDED = Namespace(MODEL, 16, shard="0/2")
CONFIG = f"""
node = "node-a"
[events]
feed = "127.0.0.1:0"
publish = "127.0.0.1:0"
replay = "127.0.0.1:0"
engines = ["{ENGINE}"]
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    path = tmp_path_factory.mktemp("node") / "node.toml"
    path.write_text(CONFIG)
    with Node("64MiB", "--config", str(path)) as node:
        yield node


@pytest.fixture(scope="module")
def index(node: Node) -> Iterator[Locator]:
    with Locator("--node", node.endpoint("feed")) as index:
        index.ready()
        yield index


@pytest.fixture
def store(node: Node) -> Iterator[StoreClient]:
    with node.client() as store:
        yield store


def put(store: StoreClient, namespace: Namespace, keys: list[bytes]) -> None:
    with store.reserve(namespace, keys, 64) as write:
        write.commit()


def hexes(keys: list[bytes]) -> list[str]:
    return [key.hex() for key in keys]


def test_a_router_is_told_how_many_tokens_an_engine_s_node_has(index: Locator, store: StoreClient) -> None:
    namespace, keys = Namespace(MODEL, 16), [b"told-%d" % number for number in range(40)]
    put(store, namespace, keys[:30])
    question = {"model": MODEL, "keys": hexes(keys), "namespace": {"block_tokens": 16}}
    wait_for(lambda: index.finds("dram", 480, ENGINE, **question))
    (one,) = index.placements(**question).values()
    assert one["engine"] == ENGINE
    assert (one["gpu"], one["dram"], one["nvme"], one["remote"]) == (0, 480, 480, 480)
    assert 0 <= one["age_ms"] < 5000
    assert one["incomplete"] is False
    assert one["epochs"] == {"node-a": store.statistics().epoch}
    store.remove(namespace, keys[10:])
    wait_for(lambda: index.finds("dram", 160, ENGINE, **question))


def test_a_prompt_s_tokens_are_looked_for_under_the_hashes_of_engines(
    index: Locator, store: StoreClient
) -> None:
    tokens = [number % 997 for number in range(16 * 20 + 5)]
    namespace = Namespace(MODEL, 16, scheme=vllm_scheme())
    put(store, namespace, vllm_block_hashes(tokens, 16)[:12])
    wait_for(lambda: index.finds("dram", 192, model=MODEL, tokens=tokens))
    assert index.finds("dram", 0, model=MODEL, tokens=[1, *tokens])
    assert index.finds("dram", 0, model="another", tokens=tokens)
    digests = vllm_block_hashes(tokens, 16)
    published = [int.from_bytes(digest[-8:], "big") for digest in digests]
    scheme = {"scheme": vllm_scheme()}
    assert index.finds("dram", 192, model=MODEL, keys=published, namespace=scheme)
    assert index.finds("dram", 192, model=MODEL, keys=hexes(digests), namespace=scheme)
    assert index.finds("dram", 0, model=MODEL, keys=hexes(digests))


def test_a_prompt_of_a_million_tokens_holds_up_nobody_else(index: Locator, store: StoreClient) -> None:
    tokens = [number % 997 for number in range(1 << 20)]
    put(store, Namespace("long", 4096, scheme=vllm_scheme()), vllm_block_hashes(tokens, 4096))
    put(store, Namespace("long", 16, scheme=vllm_scheme()), vllm_block_hashes(tokens[:64], 16))
    wait_for(lambda: index.metric("kvstore_index_namespaces") >= 2)
    with ThreadPoolExecutor(1) as executor:
        lookup = executor.submit(index.finds, "dram", 1 << 20, model="long", tokens=tokens)
        while not lookup.done():
            assert index.ask("/healthz") == (200, "ok\n")
    assert lookup.result()
    assert index.metric("kvstore_index_loop_stall_max_seconds") < 0.2


def test_salted_and_unsalted_prompts_do_not_answer_for_each_other(index: Locator, store: StoreClient) -> None:
    tokens = [number % 991 for number in range(64)]
    for salt, held in (("", ""), ("tenant", ""), ("other", "other")):
        keys = vllm_block_hashes(tokens, 16, salt=salt)[: 1 + len(salt) % 4]
        put(store, Namespace("salted", 16, salt=held, scheme=vllm_scheme()), keys)
    ask: dict[str, Any] = {"model": "salted", "tokens": tokens}
    wait_for(lambda: index.finds("dram", 32, **ask, salt="other"))
    assert index.finds("dram", 16, **ask)
    assert index.finds("dram", 48, **ask, salt="tenant")
    assert index.finds("dram", 0, **ask, salt="third")
    assert index.finds("dram", 0, **ask, lora="adapter")
    plain = [b"plain-%d" % number for number in range(4)]
    put(store, Namespace("salted", 16), plain)
    keyed: dict[str, Any] = {"model": "salted", "keys": hexes(plain)}
    wait_for(lambda: index.finds("dram", 64, **keyed))
    assert index.finds("dram", 0, **keyed, salt="other")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "a body of 0 bytes that is no JSON: "),
        (b"\xff\x00", "a body of 2 bytes that is no JSON: "),
        (b"[" * 100_000, "a body of 100000 bytes that is no such request: "),
        ({"tokens": []}, "a body of 14 bytes that is no such request: Object missing required field `model`"),
        ({"model": "", "tokens": []}, "model is empty; give the model's name"),
        ({"model": "m" * 513, "tokens": []}, "model is 'mmmmmmmm"),
        ({"model": "m", "tokens": [], "salt": "s" * 513}, "give at most 512 characters"),
        ({"model": "m"}, "a lookup needs tokens or keys; give one of them"),
        ({"model": "m", "tokens": [], "keys": []}, "a lookup needs tokens or keys; give one of them"),
        ({"model": "m", "tokenz": []}, "Object contains unknown field `tokenz`"),
        ({"model": "m", "tokens": [1, -1]}, "Expected `int` >= 0 - at `$.tokens[1]`"),
        ({"model": "m", "tokens": [1 << 32]}, "Expected `int` <= 4294967295 - at `$.tokens[0]`"),
        ({"model": "m", "tokens": ["1"]}, "Expected `int`, got `str` - at `$.tokens[0]`"),
        ({"model": "m", "tokens": [1] * ((1 << 20) + 1)}, "1048577 tokens; give at most 1048576"),
        ({"model": "m", "keys": ["00"] * 65_537}, "65537 keys; give at most 65536"),
        (
            {"model": "m", "keys": ["0g"]},
            "key '0g' is no hex; give numbers alone, or hex of 1 to 64",
        ),
        ({"model": "m", "keys": ["00", 1]}, "key 1 is no hex; give numbers alone"),
        ({"model": "m", "keys": [1]}, "key 1 is a int; give bytes"),
        ({"model": "m", "keys": ["00" * 65]}, "key of 65 bytes; give 1 to 64 bytes"),
        (
            {"model": "m", "keys": [1 << 64], "namespace": {"scheme": "sglang"}},
            "block hash is 18446744073709551616; give a number of 64 bits or 8 to 32 bytes",
        ),
        ({"model": "m", "keys": ["00"], "lora": "l"}, "lora and media beside keys, which hold them"),
        (
            {"model": "m", "keys": ["00"], "namespace": {"salt": "s"}},
            "unknown field `salt` - at `$.namespace`",
        ),
        ({"model": "m", "tokens": [], "namespace": {"dtype": "x"}}, "a namespace without keys; give keys"),
        (
            {"model": "m", "keys": ["00"], "namespace": {"block_tokens": "16"}},
            "Expected `int`, got `str` - at `$.namespace.block_tokens`; it is '16'",
        ),
        (
            {"model": "m", "keys": ["00"], "namespace": {"block_tokens": "9" * 100_000}},
            "Expected `int`, got `str` - at `$.namespace.block_tokens`; it is '999",
        ),
        (
            {"model": "m", "keys": ["00"], "namespace": {"block_tokens": 0}},
            "namespace block_tokens is 0; give 1 to 1048576 tokens",
        ),
        (
            {"model": "m", "keys": ["00"], "namespace": {"group": 0}},
            "Expected `str`, got `int` - at `$.namespace.group`; it is 0",
        ),
        ({"model": "m", "tokens": [], "engines": ["e"] * 8193}, "8193 engines; give at most 8192"),
        (b" " * ((16 << 20) + 1), "the body is too long: 16777217 bytes; the limit is 16777216 bytes"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_bad_question_is_refused_with_the_value_and_the_limit(
    index: Locator, body: Any, message: str
) -> None:
    status, text = index.ask(body=body)
    assert status == (413 if "too long" in message else 400 if "no JSON" in message else 422)
    assert message in text
    assert text.count("\n") == 1
    assert len(text) < 300
    assert index.ask("/healthz") == (200, "ok\n")


def test_a_question_with_any_shard_finds_the_set_that_it_belongs_to(
    index: Locator, store: StoreClient
) -> None:
    keys = [b"sharded-%d" % number for number in range(4)]
    for shard in ("0/2", "1/2"):
        put(store, Namespace("sharded", 16, shard=shard), keys)
    question: dict[str, Any] = {"model": "sharded", "keys": hexes(keys)}
    for shard in ("0/2", "1/2"):
        wait_for(lambda shard=shard: index.finds("dram", 64, **question, namespace={"shard": shard}))
    for shard in ("0/1", "0/4", "1/4", "some"):
        assert index.finds("dram", 0, **question, namespace={"shard": shard})
    store.remove(Namespace("sharded", 16, shard="1/2"), keys)


def test_a_publisher_of_a_thousand_schemes_does_not_hold_up_lookups(
    index: Locator, store: StoreClient
) -> None:
    """And what most blocks are in is found all the same."""
    tokens = [number % 997 for number in range(8192)]
    put(store, Namespace("ways", 16, scheme=vllm_scheme()), vllm_block_hashes(tokens, 16))
    for number in range(1000):
        put(store, Namespace("ways", number + 1, scheme="tokens"), [number.to_bytes(8, "big")])
    wait_for(lambda: index.metric("kvstore_index_keys") >= 1512)
    before = index.metric("kvstore_index_left_out_total")
    wait_for(lambda: index.finds("dram", 8192, model="ways", tokens=tokens))
    assert index.metric("kvstore_index_left_out_total") >= before + 1001 - WAYS_MAX
    assert "ways: too many namespaces; a prompt is looked for in 32 of them at most" in index.log


def test_of_many_ways_to_make_keys_those_with_most_blocks_are_tried() -> None:
    locality = Locality()
    holding = locality.open("n")
    locality.show(holding)
    for number in range(1, 101):
        holding.stored(Namespace("m", number, scheme="tokens"), Medium.DRAM, list(range(number)), None)
        # Nobody can make keys of these, so they take nobody's place.
        holding.stored(Namespace("m", number), Medium.DRAM, [b"%d" % key for key in range(200)], None)
    search = search_of(Query("m", tokens=[1] * 1000), locality)
    assert {space.block_tokens for space in search.spaces} == set(range(85, 101))
    assert search.left_out == 84
    assert search_of(Query("m", keys=[b"1"]), locality).left_out == 84
    assert search_of(Query("m", keys=[b"1"], fields={"block_tokens": 7}), locality).left_out == 0


def test_a_prompt_is_looked_for_in_no_more_namespaces_than_there_is_time_for() -> None:
    locality = Locality()
    holding = locality.open("n")
    locality.show(holding)
    for number in range(1, 101):
        space = Namespace("m", 16, dtype=str(number), scheme="tokens")
        holding.stored(space, Medium.DRAM, list(range(number)), None)
    search = search_of(Query("m", tokens=[1] * 1000), locality)
    assert {space.dtype for space in search.spaces} == set(map(str, range(69, 101)))
    assert search.effort(1000) == 1000


def test_only_the_engines_that_are_asked_for_are_told(index: Locator) -> None:
    question: dict[str, Any] = {"model": MODEL, "tokens": [1]}
    assert list(index.placements(**question)) == [ENGINE]
    assert set(index.placements(**question, engines=[ENGINE, "another"])) == {ENGINE, "another"}
    another = index.placements(**question, engines=["another"])["another"]
    assert (another["remote"], another["age_ms"], another["epochs"]) == (0, None, {})


def test_what_the_index_counts_is_a_metric(index: Locator, node: Node) -> None:
    assert index.metric('kvstore_index_publishers{kind="node",state="current"}') == 1
    assert index.metric("kvstore_index_holdings") == 1
    blocks = f'kvstore_index_blocks{{kind="node",publisher="node-a {node.endpoint("feed")}"}}'
    with node.client() as store:
        put(store, Namespace("counted", 16), [b"counted"])
        wait_for(lambda: index.metric(blocks) == store.statistics().tiers[0].blocks)
    assert index.metric("kvstore_index_keys") == index.metric(blocks)
    assert index.metric("kvstore_index_lookup_seconds_count") > 0
    assert index.metric("kvstore_index_loop_late_seconds_count") > 0
    assert index.metric('kvstore_index_malformed_total{kind="node"}') == 0


def test_engines_use_the_nodes_that_name_them_and_those_they_are_configured_with() -> None:
    configured = [Engine("a", ("x",), "m"), Engine("b#0"), Engine("b#1")]
    node_to_engines = {"n": ("a", "b", "c"), "o": ("b#1",), "p": ()}
    assert join(configured, node_to_engines) == [
        Engine("a", ("x", "n"), "m"),
        Engine("b#0", ("n",)),
        Engine("b#1", ("n", "o")),
        Engine("c", ("n",)),
        Engine("p", ("p",)),
    ]


def test_many_engines_find_their_nodes_in_a_moment() -> None:
    engines = [Engine(f"engine-{number}", model="m") for number in range(2000)]
    node_to_engines = {f"node-{number:04}": (f"engine-{number}",) for number in range(2000)}
    began = time.perf_counter()
    joined = join(engines, node_to_engines)
    assert time.perf_counter() - began < 0.2  # 0.7 s where each is compared to each
    assert joined[1999] == Engine("engine-1999", ("node-1999",), "m")


def test_a_node_that_answers_for_itself_needs_all_shards() -> None:
    locality = Locality()
    holding = locality.open("n")
    locality.show(holding)
    for shard, keys in (("0/2", [1, 2, 3]), ("1/2", [1, 2])):
        assert [one.dram for one in locality.find({SHARDED: [1, 2, 3]}, [Engine("n", ("n",))])] == [0]
        holding.stored(replace(SHARDED, shard=shard), Medium.DRAM, keys, ROOT)
    assert [one.dram for one in locality.find({SHARDED: [1, 2, 3]}, [Engine("n", ("n",))])] == [32]


def test_a_silent_daemon_is_left_out_and_its_age_is_told_until_it_speaks_again(
    index: Locator, node: Node, store: StoreClient
) -> None:
    put(store, Namespace("silence", 16), [b"silent"])
    question: dict[str, Any] = {"model": "silence", "keys": hexes([b"silent"])}
    wait_for(lambda: index.finds("dram", 16, **question))
    with node.stopped():
        wait_for(lambda: index.finds("dram", 0, **question))
        assert index.placements(**question)[ENGINE]["age_ms"] > 1500
        assert index.metric('kvstore_index_publishers{kind="node",state="silent"}') == 1
        assert "the oldest knowledge is of" in index.ask("/readyz")[1]
    wait_for(lambda: index.finds("dram", 16, **question))
    wait_for(lambda: index.placements(**question)[ENGINE]["age_ms"] < 1000)


def following(path: Path, publisher: EventPublisher, *lines: str) -> list[str]:
    """Flags of an index that follows an engine "e", which has no replay."""
    engine = ["[[index.engines]]", 'name = "e"', 'hash = "sha256"']
    engine += [f'events = "{publisher.endpoint}"', f'model = "{MODEL}"']
    path.write_text("\n".join(["[index]", *lines, *engine]))
    return ["--config", str(path)]


def test_an_engine_to_which_there_is_only_a_connection_is_not_known(tmp_path: Path) -> None:
    """It publishes under another topic than was configured, say."""
    state = 'kvstore_index_publishers{kind="engine",state="unknown"}'
    with (
        EventPublisher("another") as publisher,
        Locator(*following(tmp_path / "index.toml", publisher)) as index,
    ):
        wait_for(lambda: "connected to" in index.log)
        publisher.publish([[1, None]])
        assert index.ask("/readyz") == (503, "engine e was not heard\n")
        wait_for(lambda: index.ask("/readyz")[0] == 200)
        assert "engine e was not heard" in index.ask("/readyz")[1]
        assert index.placements(model=MODEL, tokens=[1])["e"]["age_ms"] is None
        assert index.metric(state) == 1


def test_answers_say_that_they_are_of_incomplete_knowledge(
    node: Node, store: StoreClient, tmp_path: Path
) -> None:
    put(store, Namespace("complete", 16), [b"1", b"2", b"3"])
    question: dict[str, Any] = {"model": MODEL, "keys": [1, 2], "namespace": {"scheme": vllm_scheme()}}

    def told(index: Locator) -> dict[str, Any]:
        return {name: one["incomplete"] for name, one in index.placements(**question).items()}

    def gpu(index: Locator) -> Any:
        return index.placements(**question)["e"]["gpu"]

    with EventPublisher() as publisher:
        flags = following(
            tmp_path / "index.toml", publisher, f'nodes = ["{node.endpoint("feed")}"]', "blocks_max = 2"
        )
        with Locator(*flags) as index:
            publisher.wait_for_subscriber()
            publisher.publish([[1, None]])
            wait_for(lambda: gpu(index) == 16)
            assert index.placements(**question)["e"]["age_ms"] < 5000
            wait_for(lambda: told(index) == {"e": False, ENGINE: True})
        with Locator(*flags) as index:
            publisher.wait_for_subscriber()
            publisher.publish([[2, None]], [[1, None]])
            wait_for(lambda: gpu(index) == 32)
            wait_for(lambda: told(index) == {"e": True, ENGINE: True})
            for kind in ("node", "engine"):
                assert index.metric(f'kvstore_index_publishers{{kind="{kind}",state="incomplete"}}') == 1
            assert index.metric('kvstore_index_age_seconds{kind="engine",publisher="e"}') < 5


def test_two_replicas_tell_the_same(index: Locator, node: Node, store: StoreClient) -> None:
    keys = [b"replica-%d" % number for number in range(8)]
    with Locator("--node", node.endpoint("feed")) as other:
        put(store, Namespace("replicas", 16), keys)
        for one in (index, other):
            wait_for(lambda one=one: one.finds("dram", 128, model="replicas", keys=hexes(keys)))
        assert other.stop() == 0


def test_a_restarted_daemon_leaves_nothing_stale(tmp_path: Any) -> None:
    path = tmp_path / "node.toml"
    path.write_text(CONFIG.replace('engines = ["10.0.0.1:8000"]', ""))
    with Node("16MiB", "--config", str(path)) as node:
        feed = node.endpoint("feed")
        path.write_text(path.read_text().replace('feed = "127.0.0.1:0"', f'feed = "{feed}"'))
        with Locator("--node", f"node-a={feed}") as index:
            question = {"model": MODEL, "keys": hexes([b"first", b"second"])}
            with node.client() as store:
                put(store, Namespace(MODEL, 16), [b"first", b"second"])
            wait_for(lambda: index.finds("dram", 32, "node-a", **question))
            node.kill()
            node.start()
            with node.client() as store:
                put(store, Namespace(MODEL, 16), [b"first"])
            wait_for(lambda: index.finds("dram", 16, "node-a", **question))
            assert index.metric('kvstore_index_restarts_total{kind="node"}') == 1
            wait_for(lambda: index.metric("kvstore_index_to_tend") == 0)
            assert index.metric("kvstore_index_keys") == 1


def test_a_lookup_needs_the_token_where_there_is_one(tmp_path: Any) -> None:
    with Locator(environ={"KVSTORE_TOKEN": "secret"}) as index:
        question = {"model": MODEL, "tokens": []}
        for token in ("", "wrong", "secre", "s\u00e9cret"):
            status, text = index.ask(body=question, token=token)
            assert (status, text) == (401, "give the token as Authorization: Bearer\n")
        status, text = index.ask(body=question, token="secret")
        assert (status, json.loads(text)["placements"]) == (200, [])
        for path in ("/healthz", "/readyz", "/metrics"):
            assert index.ask(path)[0] == 200


def test_readiness_names_who_was_not_heard_and_does_not_wait_for_ever() -> None:
    with Locator("--node", "127.0.0.1:9") as index:
        status, text = index.ask("/readyz")
        assert (status, text) == (503, "the daemon at 127.0.0.1:9 was not heard\n")
        wait_for(lambda: index.ask("/readyz")[0] == 200)
        assert "the daemon at 127.0.0.1:9 was not heard" in index.ask("/readyz")[1]
        assert index.metric('kvstore_index_publishers{kind="node",state="silent"}') == 1
        os.kill(index.process.pid, signal.SIGINT)
        assert index.process.wait(20) == 0
