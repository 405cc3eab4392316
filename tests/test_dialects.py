"""Other indexers' endpoints: Dynamo's own indexer follows the same engines and gives the same answers."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.content_keys import local_hashes, sequence_hashes
from kvstore.index.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, pack_tokens
from tests.dynamo_indexer import DynamoIndexer, Publisher
from tests.locator import Locator
from tests.node import wait_for

MODEL: Final = "m"
SIZE: Final = 16
# Instances with their ranks.
WORKERS: Final = [(7, 0), (7, 1), (8, 0)]
MEDIA: Final = ["GPU", "CPU", "STORAGE"]
STEMS: Final = [[stem * 1000 + i for i in range(2 * SIZE)] for stem in range(1, 3)]
PROMPTS: Final = [
    [*stem, *range(branch * 100_000, branch * 100_000 + 3 * SIZE)] for stem in STEMS for branch in range(1, 3)
]
# Adapter and salt of a prompt.
WAYS: Final = [("", ""), ("a", ""), ("", "s"), ("a", "s")]


class Chain:
    """The blocks of a prompt of some adapter and salt, with an engine's hashes of them."""

    def __init__(self, tokens: list[int], lora: str = "", salt: str = "") -> None:
        self.tokens, self.lora, self.salt = tokens, lora, salt
        self.locals = local_hashes(tokens, SIZE, lora=lora, salt=salt)
        self.sequences = sequence_hashes(None, self.locals)
        self.hashes = [number * 0x9E3779B97F4A7C15 % (1 << 64) for number in self.sequences]

    def stored(self, first: int, end: int, medium: str = "GPU", **rest: Any) -> BlockStored:
        """The event of some blocks, which names the salt as SGLang does."""
        return BlockStored(
            [*self.hashes[first:end]],
            self.hashes[first - 1] if first else None,
            pack_tokens(self.tokens[first * SIZE : end * SIZE]),
            SIZE,
            medium=medium,
            lora_id=1 if self.lora else None,
            lora_name=self.lora or None,
            cache_salt=self.salt or None,
            **rest,
        )


CHAINS: Final = [Chain(tokens, *way) for tokens in PROMPTS for way in WAYS]


class Caches:
    """What one engine has: of each medium the blocks by their hashes, each with the one before it."""

    def __init__(self) -> None:
        self.media: dict[str, dict[int, int | None]] = {medium: {} for medium in MEDIA}

    def store(self, chain: Chain, end: int, medium: str) -> list[Event]:
        """As an engine does it: what precedes a block is there."""
        there = self.media[medium]
        first = next((i for i in range(end) if chain.hashes[i] not in there), end)
        if first == end:
            return []
        for i in range(first, end):
            there[chain.hashes[i]] = chain.hashes[i - 1] if i else None
        return [chain.stored(first, end, medium)]

    def evict(self, number: int, medium: str) -> list[Event]:
        """As an engine does it: what nothing follows."""
        there = self.media[medium]
        leaves = sorted(there.keys() - set(there.values()))
        if not leaves:
            return []
        leaf = leaves[number % len(leaves)]
        del there[leaf]
        return [BlockRemoved([leaf], medium)]

    def clear(self) -> list[Event]:
        """Everything."""
        self.media = {medium: {} for medium in MEDIA}
        return [AllBlocksCleared()]

    def has(self, chain: Chain) -> list[int]:
        """Leading tokens in the GPU, in host memory as well, and on disk."""
        depths = [0]
        for there in self.media.values():
            mine = next((i for i, one in enumerate(chain.hashes) if one not in there), len(chain.hashes))
            depths.append(max(depths[-1], mine * SIZE))
        return depths[1:]


def registered(instance: int, rank: int, endpoint: str) -> dict[str, Any]:
    """What a router tells Dynamo's indexer."""
    return {
        "instance_id": instance,
        "dp_rank": rank,
        "endpoint": endpoint,
        "model_name": MODEL,
        "block_size": SIZE,
    }


class Both:
    """Dynamo's indexer and ours, which follow the same publishers."""

    def __init__(self, dynamo: DynamoIndexer, index: Locator, publishers: Sequence[Publisher]) -> None:
        self.dynamo, self.index, self.publishers = dynamo, index, publishers
        for (instance, rank), publisher in zip(WORKERS, publishers, strict=True):
            question = registered(instance, rank, publisher.endpoint)
            assert dynamo.ask("/register", question) == (201, '{"status":"ok"}')
            assert index.ask("/register", question) == (201, '{"status":"ok"}')
            publisher.await_subscribers(2)

    def agree(self, caches: Sequence[Caches], dynamo: DynamoIndexer | None = None) -> bool:
        """Whether they say of all prompts what the engines have, by tokens and by hashes."""
        for chain in CHAINS:
            expected = 200, answer(chain, caches)
            for path, question in questions(chain):
                status, text = (dynamo or self.dynamo).ask(path, question)
                if not (status, json.loads(text)) == expected == self.ours(path, question):
                    return False
        return True

    def ours(self, path: str, question: Any) -> tuple[int, Any]:
        """Status and JSON of our answer."""
        status, text = self.index.ask(path, question)
        return status, json.loads(text)


def answer(chain: Chain, caches: Sequence[Caches]) -> dict[str, Any]:
    """Dynamo's, of what engines have."""
    scores: dict[str, Any] = {}
    instances: dict[str, Any] = {}
    for (instance, rank), cache in zip(WORKERS, caches, strict=True):
        gpu, cpu, disk = cache.has(chain)
        if not disk:
            continue
        if gpu:
            scores.setdefault(str(instance), {})[str(rank)] = gpu
        found = instances.setdefault(str(instance), {"gpu": 0, "cpu": 0, "disk": 0, "dp": {}})
        found["dp"][str(rank)] = gpu
        for tier, tokens in (("gpu", gpu), ("cpu", cpu), ("disk", disk)):
            found[tier] = max(found[tier], tokens)
        found["longest_matched"] = found["disk"]
    return {"scores": scores, "frequencies": [], "instances": instances}


def questions(chain: Chain) -> Iterator[tuple[str, dict[str, Any]]]:
    """About a prompt."""
    asked: dict[str, Any] = {"token_ids": chain.tokens, "model_name": MODEL}
    if chain.lora:
        asked["lora_name"] = chain.lora
    if chain.salt:
        asked["cache_salt"] = chain.salt
    yield "/query", asked
    signed = [number - (1 << 64) * (number >> 63) for number in chain.locals]
    yield "/query_by_hash", {"block_hashes": signed, "model_name": MODEL}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    log = tmp_path_factory.mktemp("dynamo") / "log"
    with ExitStack() as stack:
        publishers = [stack.enter_context(Publisher(rank)) for _, rank in WORKERS]
        yield Both(stack.enter_context(DynamoIndexer(log)), stack.enter_context(Locator()), publishers)


steps = st.tuples(
    st.integers(0, len(WORKERS) - 1),
    st.sampled_from(["store", "store", "store", "evict", "evict", "clear"]),
    st.integers(0, len(CHAINS) - 1),
    st.integers(1, 5),
    st.sampled_from(MEDIA),
)


@settings(deadline=None, max_examples=6)
@given(history=st.lists(steps, min_size=15, max_size=60))
def test_dynamo_agrees_over_any_history(both: Both, history: list[tuple[int, str, int, int, str]]) -> None:
    caches = [Caches() for _ in WORKERS]
    for publisher, cache in zip(both.publishers, caches, strict=True):
        publisher.publish(cache.clear())
    for worker, verb, number, blocks, medium in history:
        cache = caches[worker]
        if verb == "store":
            events = cache.store(CHAINS[number], blocks, medium)
        else:
            events = cache.evict(number, medium) if verb == "evict" else cache.clear()
        both.publishers[worker].publish(events)
    wait_for(lambda: both.agree(caches))


def test_a_fresh_dynamo_begins_with_our_dump_and_agrees(both: Both, tmp_path: Path) -> None:
    caches = [Caches() for _ in WORKERS]
    for worker, (publisher, cache) in enumerate(zip(both.publishers, caches, strict=True)):
        events = cache.clear()
        for number, chain in enumerate(CHAINS):
            events += cache.store(chain, 1 + (number + worker) % 5, MEDIA[(number + worker) % 3])
        publisher.publish(events)
    wait_for(lambda: both.agree(caches))
    with DynamoIndexer(tmp_path / "log", "--peers", f"http://{both.index.http}") as fresh:
        assert both.agree(caches, fresh)


# What is refused, and what is listed.


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/query", {"token_ids": [1], "model_name": "nobody's"}),
        ("/query", {"token_ids": [1], "model_name": MODEL, "routing_group": "nobody's"}),
        ("/query", {"token_ids": [-1], "model_name": MODEL}),
        ("/query", {"token_ids": [2**40], "model_name": MODEL}),
        ("/query", {"token_ids": [1.5], "model_name": MODEL}),
        ("/query", {"model_name": MODEL}),
        ("/query", {"token_ids": []}),
        ("/query", {"token_ids": [], "model_name": MODEL, "whatever": 1}),
        ("/query", {"token_ids": [1] * 16, "model_name": MODEL, "cache_salt": None, "lora_name": None}),
        ("/query_by_hash", {"block_hashes": [1 << 63], "model_name": MODEL}),
        ("/query_by_hash", {"block_hashes": [-(1 << 63)], "model_name": MODEL}),
        ("/query_by_hash", {"block_hashes": [1], "model_name": MODEL, "cache_salt": "s"}),
        ("/query_by_hash", {"block_hashes": [1], "model_name": MODEL, "cache_salt": None}),
        ("/query_by_hash", {"block_hashes": [1], "model_name": "nobody's"}),
        ("/query_by_hash", {"model_name": MODEL}),
        ("/register", {**registered(7, 0, "tcp://127.0.0.1:9"), "model_name": "other"}),
        ("/register", registered(7, 0, "tcp://127.0.0.1:9")),
        ("/register", {**registered(9, 0, "tcp://127.0.0.1:9"), "block_size": 32}),
        ("/register", {**registered(9, 0, "tcp://127.0.0.1:9"), "instance_id": "nine"}),
        ("/register", {**registered(9, 0, "tcp://127.0.0.1:9"), "instance_id": -1}),
        ("/register", {"instance_id": 9, "model_name": MODEL, "block_size": 16}),
        ("/unregister", {"instance_id": 99, "model_name": MODEL}),
        ("/unregister", {"instance_id": 7, "model_name": "other"}),
        ("/unregister", {"instance_id": 7, "model_name": MODEL, "routing_group": "default", "dp_rank": 5}),
    ],
)
def test_the_status_is_dynamos(both: Both, path: str, body: Any) -> None:
    status, text = both.index.ask(path, body)
    assert (status, text) == (both.dynamo.ask(path, body)[0], text)
    assert status < 300 or list(json.loads(text)) == ["error"]


def test_workers_are_listed_as_by_dynamo(both: Both) -> None:
    wait_for(lambda: by_instance(both.ours("/workers", None)) == listed(both.dynamo, "/workers"))
    for path in ("/workers?model_name=m", "/workers?model_name=x", "/workers?routing_group=g"):
        assert by_instance(both.ours(path, None)) == listed(both.dynamo, path)
    assert len(listed(both.dynamo, "/workers")) == 2


def listed(dynamo: DynamoIndexer, path: str) -> list[Any]:
    """Its workers."""
    return by_instance((200, json.loads(dynamo.ask(path)[1])))


def by_instance(answer: tuple[int, Any]) -> list[Any]:
    """In their order; Dynamo has one of its own."""
    assert answer[0] == 200
    return sorted(answer[1], key=lambda worker: worker["instance_id"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"endpoint": "ipc:///tmp/engine"}, "endpoint is 'ipc:///tmp/engine'; give tcp://HOST:PORT"),
        ({"endpoint": "inproc://engine"}, "give tcp://HOST:PORT"),
        ({"endpoint": "tcp://*:5557"}, "give tcp://HOST:PORT"),
        ({"endpoint": "tcp://eth0;10.0.0.1:5557"}, "give tcp://HOST:PORT"),
        ({"endpoint": "tcp://10.0.0.1:70000"}, "give tcp://HOST:PORT"),
        ({"replay_endpoint": "nonsense"}, "endpoint is 'nonsense'; give tcp://HOST:PORT"),
        ({"block_size": 0}, "block_size is 0; give 1 to 1048576 tokens"),
        ({"dp_rank": 1 << 20}, "dp_rank is 1048576; give 0 to 65535"),
        ({"model_name": ""}, "model is ; give 1 to 255 characters"),
        ({"modelname": "m"}, "the model is named twice, or not"),
        ({"tenant_id": "t"}, "tenant_id is 't'; give a routing_group"),
        ({"type": "Mooncake"}, "type is 'Mooncake'; give vLLM or SGLang, whose events have tokens"),
    ],
)
def test_what_cannot_be_followed_is_named(both: Both, change: dict[str, Any], message: str) -> None:
    body = {**registered(9, 0, "tcp://10.0.0.1:5557"), **change}
    status, text = both.index.ask("/register", body)
    assert (status, message in json.loads(text)["error"]) == (422, True), text


def test_an_engine_registered_again_goes_on_and_one_unregistered_is_forgotten(tmp_path: Path) -> None:
    chain = CHAINS[0]
    asked = {"token_ids": chain.tokens, "model_name": MODEL}
    with Locator() as index, Publisher() as zero, Publisher(1) as one:
        for rank, publisher in enumerate((zero, one)):
            body = registered(3, rank, publisher.endpoint)
            assert [index.ask("/register", body)[0] for _ in range(2)] == [201, 201]
            publisher.await_subscribers(1)
            publisher.publish([chain.stored(0, 2 + rank)])
        both_ranks = {"3": {"0": 2 * SIZE, "1": 3 * SIZE}}
        wait_for(lambda: json.loads(index.ask("/query", asked)[1])["scores"] == both_ranks)
        assert index.placements(model=MODEL, tokens=chain.tokens).keys() == {"3#0", "3#1"}

        gone = {"instance_id": 3, "model_name": MODEL, "dp_rank": 1}
        assert index.ask("/unregister", gone) == (200, '{"status":"ok"}')
        assert json.loads(index.ask("/query", asked)[1])["scores"] == {"3": {"0": 2 * SIZE}}
        assert index.ask("/unregister", gone)[0] == 404
        assert index.ask("/unregister", {"instance_id": 3, "model_name": MODEL})[0] == 200
        assert index.ask("/workers") == (200, "[]")
        assert index.ask("/dump") == (200, "{}")
        wait_for(lambda: index.ask("/query", asked)[0] == 404)


# Where the two differ.


def test_a_salt_of_vllm_keeps_tenants_apart_where_dynamo_mixes_them(both: Both) -> None:
    plain, salted = Chain(PROMPTS[0]), Chain(PROMPTS[0], salt="tenant")
    for publisher in both.publishers:
        publisher.publish([AllBlocksCleared()])
    # vLLM names the salt with the first block alone.
    first = BlockStored([1], None, pack_tokens(plain.tokens[:SIZE]), SIZE, None, "GPU", None, [("tenant",)])
    rest = BlockStored([2, 3], 1, pack_tokens(plain.tokens[SIZE : 3 * SIZE]), SIZE, None, "GPU")
    both.publishers[0].publish([first, rest])
    asked = {"token_ids": plain.tokens, "model_name": MODEL}
    wait_for(lambda: scores(both, {**asked, "cache_salt": "tenant"}) == ({}, {"7": {"0": 3 * SIZE}}))
    wait_for(lambda: scores(both, asked) == ({"7": {"0": 3 * SIZE}}, {}))
    for path, question in questions(salted):
        assert both.ours(path, question)[1]["scores"] == {"7": {"0": 3 * SIZE}}


def test_what_follows_a_removed_block_comes_back_with_it_where_dynamo_forgets_it(both: Both) -> None:
    chain = CHAINS[0]
    for publisher in both.publishers:
        publisher.publish([AllBlocksCleared()])
    both.publishers[0].publish([chain.stored(0, 3), BlockRemoved([chain.hashes[0]], "GPU")])
    both.publishers[0].publish([chain.stored(0, 1)])
    asked = {"token_ids": chain.tokens, "model_name": MODEL}
    wait_for(lambda: scores(both, asked) == ({"7": {"0": SIZE}}, {"7": {"0": 3 * SIZE}}))


def scores(both: Both, question: Any) -> tuple[Any, Any]:
    """Dynamo's, and ours."""
    theirs = json.loads(both.dynamo.ask("/query", question)[1])
    return theirs["scores"], both.ours("/query", question)[1]["scores"]
