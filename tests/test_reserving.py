"""Reserves through a real index of real daemons: what they hold, for how long, and what becomes of them."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from kvstore.block import Medium, Namespace
from kvstore.client import StoreClient
from kvstore.engine_hashes import vllm_block_hashes
from kvstore.engine_keys import data_keys, vllm_scheme
from kvstore.index import reserving
from kvstore.index.membership import source_of
from kvstore.index.metrics import exposition
from kvstore.index.placement import Engine
from kvstore.index.query import Query, keys_of, search_of
from kvstore.index.reserving import NodeReserved, Reserved
from kvstore.index.service import Index
from kvstore.index.speeds import Source
from kvstore.index.wire import load_key, new_key
from tests.node import Node, pinned, wait_for, written
from tests.test_client import MIB, fill, keys

NODE: Final = "node-a"
ENGINE: Final = Engine("engine", (NODE,))
PROMPT: Final = 4  # blocks of 1 MiB: as many as holds may pin of 16 MiB
TTL_S: Final = 10.0


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("reserving")
    with configured(folder, "16MiB", "--nvme", f"{folder}/nvme:512MiB") as node:
        yield node


@pytest.fixture
def store(node: Node) -> Iterator[StoreClient]:
    with node.client() as store:
        yield store
        wait_for(lambda: pinned(store) == 0)
    node.check()


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Namespace:
    return Namespace(request.node.name[:400], 16)


def configured(folder: Path, dram: str, *flags: str, text: str = "", top: str = "") -> Node:
    path = folder / "node.toml"
    path.write_text(f'node = "{NODE}"\n{top}\n[events]\nfeed = "127.0.0.1:0"\n{text}\n')
    return Node(dram, "--config", str(path), *flags)


@asynccontextmanager
async def index_of(node: Node, secret: bytes | None = None) -> AsyncIterator[Index]:
    """An index that has heard of the node."""
    index = Index([], [source_of(node.endpoint("feed"))], blocks_max=1 << 20, secret=secret)
    index.start()
    try:
        await soon(lambda: not index.unknown())
        yield index
    finally:
        await index.close()


async def soon(condition: Callable[[], object]) -> None:
    """As `wait_for`, with the loop going on."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


async def reserve(
    index: Index, query: Query, engine: Engine = ENGINE, *, ttl_s: float = TTL_S, timeout_s: float = 10.0
) -> Reserved:
    """As a router's lookup does."""
    found = keys_of(query, search_of(query, index.locality).spaces)
    return await index.reserving.reserve(engine, query, found, ttl_s, timeout_s)


def asking(namespace: Namespace, names: list[bytes]) -> Query:
    return Query(namespace.model, keys=names, fields={"block_tokens": namespace.block_tokens})


async def known(index: Index, namespace: Namespace, blocks: int) -> None:
    await soon(lambda: index.locality.blocks_of(namespace) == blocks)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def press(store: StoreClient) -> None:
    """Fill the arena with others' blocks, more than once."""
    for start in range(0, 24, 4):
        names = keys(4, f"pressure-{time.monotonic_ns()}-{start}")
        fill(store, Namespace("pressure"), names, MIB)
    wait_for(lambda: written(store))


def test_what_is_reserved_survives_pressure_until_it_is_released(
    node: Node, store: StoreClient, namespace: Namespace
) -> None:
    names = keys(PROMPT)
    fill(store, namespace, names, MIB)

    async def test() -> None:
        async with index_of(node) as index:
            await known(index, namespace, PROMPT)
            reserved = await reserve(index, asking(namespace, [*names, b"more"]))
            assert reserved == Reserved(reserved.id, {NODE: NodeReserved(pinned=PROMPT)}, [])
            assert reserved.blocks == PROMPT
            press(store)
            assert store.hit_length(namespace, names).dram == PROMPT
            assert index.reserving.release(reserved.id)
            assert not index.reserving.release(reserved.id)
            await soon(lambda: pinned(store) == 0)
            assert index.reserving.statistics().released == 1

    run(test())


def test_what_lies_on_disk_is_brought_up_and_kept_until_its_time_is_over(
    node: Node, store: StoreClient, namespace: Namespace
) -> None:
    names = keys(PROMPT)
    fill(store, namespace, names, MIB)
    press(store)
    assert store.hit_length(namespace, names).dram == 0

    async def test() -> None:
        async with index_of(node) as index:
            await known(index, namespace, PROMPT)
            reserved = await reserve(index, asking(namespace, names), ttl_s=1.0)
            assert reserved.nodes == {NODE: NodeReserved(loading=PROMPT)}
            await soon(lambda: store.hit_length(namespace, names).dram == PROMPT)
            await soon(lambda: pinned(store) == PROMPT)
            await soon(lambda: pinned(store) == 0)
            await soon(lambda: index.reserving.statistics().expired == 1)
            assert index.reserving.statistics().open == 0
            assert not index.reserving.release(reserved.id)

    run(test())


def test_a_prompt_s_tokens_reserve_what_engines_store_under_digests(
    node: Node, store: StoreClient, namespace: Namespace
) -> None:
    tokens = [number % 911 for number in range(16 * PROMPT + 3)]
    space = replace(namespace, scheme=vllm_scheme())
    names = vllm_block_hashes(tokens, 16)
    assert data_keys(space, tokens) == names
    fill(store, space, names[:2], MIB)

    async def test() -> None:
        async with index_of(node) as index:
            await known(index, space, 2)
            reserved = await reserve(index, Query(space.model, tokens=tokens))
            assert (reserved.nodes, reserved.problems) == ({NODE: NodeReserved(pinned=2)}, [])
            index.reserving.release(reserved.id)
            numbers = [int.from_bytes(name[-8:]) for name in names]
            query = Query(space.model, keys=numbers, fields={"scheme": space.scheme})
            reserved = await reserve(index, query)
            assert (reserved.id, reserved.nodes) == (0, {})
            assert "numbers, which name no data; give digests, or tokens" in reserved.problems[0]
            query = Query(space.model, keys=names, fields={"scheme": space.scheme})
            reserved = await reserve(index, query)
            assert reserved.nodes == {NODE: NodeReserved(pinned=2)}
            index.reserving.release(reserved.id)

    run(test())


def test_all_shards_and_groups_are_reserved_as_the_node_calls_them(
    node: Node, store: StoreClient, namespace: Namespace
) -> None:
    names = keys(2)
    spaces = [
        replace(namespace, shard=shard, group=group) for shard in ("0/2", "1/2:0/1") for group in ("0", "1")
    ]
    for space in spaces:
        fill(store, space, names, MIB // 4)

    async def test() -> None:
        async with index_of(node) as index:
            await soon(lambda: sum(each.blocks for each in index.statistics().nodes) >= 8)
            reserved = await reserve(index, Query(namespace.model, keys=names))
            assert reserved.nodes == {NODE: NodeReserved(pinned=8)}
            assert pinned(store) == 8
            index.reserving.release(reserved.id)

    run(test())


def test_a_reserve_waits_for_nobody_beyond_its_time(
    node: Node, store: StoreClient, namespace: Namespace
) -> None:
    names = keys(2)
    fill(store, namespace, names, MIB)

    async def test() -> None:
        async with index_of(node) as index:
            await known(index, namespace, 2)
            with node.stopped():
                began_s = time.monotonic()
                reserved = await reserve(index, asking(namespace, names), timeout_s=0.05)
                assert time.monotonic() - began_s < 0.5
                assert reserved.nodes == {NODE: NodeReserved()}
                assert reserved.problems == [f"{NODE} has not answered within 50 ms"]
            await soon(lambda: pinned(store) == 2)
            assert index.reserving.release(reserved.id)
            other = Engine("elsewhere", ("nobody",))
            nowhere = await reserve(index, asking(namespace, names), other)
            assert nowhere == Reserved(0, {}, ["nobody is silent"])

    run(test())


def test_a_reserve_at_a_daemon_that_is_silent_says_so(
    node: Node, store: StoreClient, namespace: Namespace
) -> None:
    names = keys(1)
    fill(store, namespace, names, MIB)

    async def test() -> None:
        async with index_of(node) as index:
            await known(index, namespace, 1)
            with node.stopped():
                await soon(lambda: not index.locality.depths(namespace, names))
                reserved = await reserve(index, asking(namespace, names))
                assert reserved == Reserved(0, {}, [f"{NODE} is silent"])

    run(test())


def test_cancelling_a_reserve_ends_it(node: Node, store: StoreClient, namespace: Namespace) -> None:
    names = keys(2)
    fill(store, namespace, names, MIB)

    async def test() -> None:
        async with index_of(node) as index:
            await known(index, namespace, 2)
            with node.stopped():
                task = asyncio.create_task(reserve(index, asking(namespace, names)))
                await soon(lambda: index.reserving.statistics().open == 1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert index.reserving.statistics().open == 0
            fill(store, namespace, [b"last"], 64)
            await known(index, namespace, 3)  # so that what was sent before has been done
            await soon(lambda: store.statistics().holds == 0)

    run(test())


def test_what_a_daemon_refuses_is_told_in_its_words(
    node: Node, store: StoreClient, namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = keys(PROMPT + 1)
    fill(store, namespace, names, MIB)

    async def test() -> None:
        async with index_of(node) as index:
            await known(index, namespace, PROMPT + 1)
            reserved = await reserve(index, asking(namespace, names))
            assert reserved.nodes == {NODE: NodeReserved()}
            assert f"{NODE} refuses: {(PROMPT + 1) * MIB} bytes to hold" in reserved.problems[0]
            assert index.reserving.statistics().refused == 1
            monkeypatch.setattr(reserving, "RESERVES_MAX", 1)
            reserved = await reserve(index, asking(namespace, names))
            assert (reserved.id, reserved.nodes) == (0, {})
            assert "1 reserves; the limit is 1" in reserved.problems[0]

    run(test())


def test_a_daemon_with_a_token_holds_for_who_has_its_key_alone(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    key = tmp_path / "key"
    key.write_text(new_key())
    token = f'token_file = "{tmp_path}/token"'
    for secret, text in ((None, ""), (load_key(str(key)), f'key_file = "{key}"')):
        with configured(tmp_path, "16MiB", text=text, top=token) as node, node.client() as store:
            fill(store, Namespace("m"), keys(2))

            async def test(node: Node = node, secret: bytes | None = secret) -> None:
                async with index_of(node, secret) as index:
                    await known(index, Namespace("m"), 2)
                    reserved = await reserve(index, Query("m", keys=keys(2)))
                    if secret is None:
                        assert (reserved.id, reserved.nodes) == (0, {})
                        assert "give its [events] and this index the same key_file" in reserved.problems[0]
                    else:
                        assert reserved.nodes == {NODE: NodeReserved(pinned=2)}

            run(test())


def test_what_readers_see_of_a_disk_is_what_the_index_predicts(
    node: Node, store: StoreClient, namespace: Namespace
) -> None:
    names = keys(48)
    for start in range(0, len(names), 4):
        fill(store, namespace, names[start : start + 4], MIB)
    wait_for(lambda: written(store))

    def read(count: int, start: int) -> float:
        """Seconds; none where a block was in DRAM."""
        wanted = names[start : start + count]
        below = store.hit_length(namespace, wanted).dram == 0
        began_s = time.perf_counter()
        with store.acquire(namespace, wanted, wait_s=5) as lease:
            seconds = time.perf_counter() - began_s
            assert lease.hit_length == count
        return seconds if below else 0.0

    for turn in range(3):
        for start in range(0, 48, 4):
            read(1 + (start // 4 + turn) % 4, start)

    async def test() -> None:
        async with index_of(node) as index:
            await soon(lambda: index.speeds.sources(NODE)[Medium.DRAM] is Source.OWN)
            await soon(lambda: index.speeds.sources(NODE)[Medium.NVME] is Source.OWN)
            speed = index.speeds.of(NODE)[Medium.NVME]
            times = [seconds for start in range(0, 48, 4) if (seconds := read(4, start))]
            ratios = [speed.seconds(4 * MIB) / seconds for seconds in times]
            assert 0.5 <= statistics.median(ratios) <= 2, (speed, ratios)
            await soon(lambda: index.speeds.token_bytes(namespace.model) == MIB / 16)
            text = (await exposition(index.statistics, None)()).decode()
            assert f'kvstore_index_node_bytes_per_second{{medium="nvme",node="{NODE}"}} ' in text
            assert f'kvstore_index_node_latency_seconds{{medium="nvme",node="{NODE}"}} ' in text

    run(test())
