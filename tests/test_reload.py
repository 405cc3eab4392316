"""What can change while a daemon runs: by SIGHUP or by HTTP, all live knobs, and nothing else."""

import asyncio
import json
import logging
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.block import Medium, Namespace
from kvstore.client import StoreClient
from kvstore.config import Config
from kvstore.errors import ConfigError
from kvstore.knobs import DramConfig, EventsConfig, NvmeConfig, RedisConfig
from kvstore.live import Change, Live, compare
from kvstore.node.policy import FIFO
from kvstore.node.rules import Rules
from kvstore.node.server import Server
from tests.node import Node, wait_for
from tests.scripted import MIB, Disk, Stage, in_virtual_time, quiet
from tests.test_http import get

LENGTH = 64 << 10
NAMESPACE = Namespace(model="reloaded")
KEYS = [b"%d" % number for number in range(16)]

CONFIG = Config(
    dram=DramConfig(capacity=2 * MIB),
    nvme=NvmeConfig(directories=("/mnt/a:8MiB",)),
    redis=RedisConfig(url="redis://127.0.0.1:1"),
    events=EventsConfig(),
)


def knobs() -> dict[str, bool]:
    """All of them, by their names in the file, and whether they are live."""
    found = {}
    for section in fields(CONFIG):
        value = getattr(CONFIG, section.name)
        if is_dataclass(value):
            found |= {f"{section.name}.{knob.name}": knob.metadata["live"] for knob in fields(value)}
        else:
            found[section.name] = section.metadata["live"]
    return found


def changed(config: Config, name: str, value: Any) -> Config:
    """The configuration with one knob turned."""
    section, _, knob = name.rpartition(".")
    if not section:
        return replace(config, **{knob: value})
    return replace(config, **{section: replace(getattr(config, section), **{knob: value})})


# Of each live knob another value, and where it must arrive as what.
ARRIVALS: dict[str, tuple[Any, Callable[[Stage, Server], Any], Any]] = {
    "log_level": ("error", lambda stage, server: logging.getLogger().level, logging.ERROR),
    "log_format": ("json", lambda *_: type(logging.getLogger().handlers[0].formatter).__name__, "JsonLines"),
    "token_file": ("token", lambda _, server: server.token, "secret"),
    "dram.capacity": (MIB, lambda stage, _: stage.arena.room.limit_bytes, MIB),
    "dram.policy": ("fifo", lambda stage, _: type(stage.arena.directory.policy), FIFO),
    "dram.high_watermark": (0.91, lambda stage, _: stage.lowers[0].rules.high_watermark, 0.91),
    "dram.low_watermark": (0.5, lambda stage, _: stage.lowers[0].rules.low_watermark, 0.5),
    "nvme.enabled": (False, lambda stage, _: stage.lowers[0].failing, "it is turned off"),
    "nvme.directories": (("/mnt/a:4MiB",), lambda stage, _: stage.lowers[0].room.limit_bytes, 4 * MIB),
    "nvme.policy": ("fifo", lambda stage, _: type(stage.lowers[0].directory.policy), FIFO),
    "nvme.write": ("on-eviction", lambda stage, _: stage.lowers[0].rules.on_eviction, True),
    "nvme.exclusive": (True, lambda stage, _: stage.lowers[0].rules.exclusive, True),
    "nvme.admit_hits": (3, lambda stage, _: stage.lowers[0].rules.admit_hits, 3),
    "nvme.timeout_s": (7.5, lambda stage, _: stage.lowers[0].rules.timeout_s, 7.5),
    "redis.enabled": (False, lambda stage, _: stage.lowers[1].failing, "it is turned off"),
    "redis.write": ("owed", lambda stage, _: stage.lowers[1].rules.owed, True),
    "redis.admit_hits": (3, lambda stage, _: stage.lowers[1].rules.admit_hits, 3),
    "limits.client_pinned_fraction": (0.25, lambda _, server: server.limits.client_pinned_fraction, 0.25),
    "limits.client_reserved_fraction": (0.25, lambda _, server: server.limits.client_reserved_fraction, 0.25),
    "limits.clients": (7, lambda _, server: server.limits.clients, 7),
    "limits.held_fraction": (0.5, lambda stage, _: stage.store.holds.fraction, 0.5),
    "quotas.dram": ("1MiB", lambda stage, _: stage.shelves[0].account.quota_bytes, MIB),
    "quotas.nvme": ("1MiB", lambda stage, _: stage.shelves[1].account.quota_bytes, MIB),
    "quotas.dram_salts": ((":1MiB",), lambda stage, _: stage.shelves[0].account.quota_bytes, MIB),
    "quotas.nvme_salts": ((":1MiB",), lambda stage, _: stage.shelves[1].account.quota_bytes, MIB),
}


@pytest.fixture
def root_logger() -> Iterator[None]:
    """The tests' own log goes on afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_every_live_knob_is_tested() -> None:
    assert set(ARRIVALS) == {name for name, live in knobs().items() if live}


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize("name", ARRIVALS)
def test_a_live_knob_arrives_where_it_matters_and_goes_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVSTORE_TOKEN", raising=False)
    Path("token").write_text("secret\n")
    value, arrival, expected = ARRIVALS[name]
    # Of two that only go together, the other comes first.
    before = changed(CONFIG, "nvme.write", "on-eviction") if name == "nvme.exclusive" else CONFIG

    async def scenario() -> None:
        disks = [Disk(8 * MIB), Disk(8 * MIB)]
        async with Stage(disks, media=[Medium.NVME, Medium.REMOTE]) as stage:
            server = Server(stage.store, [stage.memory], node="n", epoch=1, stop=lambda: None)
            wanted = changed(before, name, value)
            live = Live(before, server, lambda: wanted)
            assert await live.reload() == Change([name], [])
            assert arrival(stage, server) == expected
            assert await live.reload() == Change([], [])
            wanted = before
            assert await live.reload() == Change([name], [])
            assert arrival(stage, server) != expected

    asyncio.run(scenario())


@pytest.mark.parametrize("name", [name for name, live in knobs().items() if not live])
def test_any_other_knob_needs_a_restart_and_stays_as_it_is(name: str) -> None:
    section, _, knob = name.rpartition(".")
    now = getattr(getattr(CONFIG, section) if section else CONFIG, knob)
    other = (*now, "other") if isinstance(now, tuple) else now + ("other" if isinstance(now, str) else 1)
    assert compare(CONFIG, changed(CONFIG, name, other), CONFIG) == (CONFIG, Change([], [name]))


def test_a_tier_comes_and_goes_with_a_restart() -> None:
    without = replace(CONFIG, nvme=None)
    assert compare(CONFIG, without, CONFIG) == (CONFIG, Change([], ["nvme"]))
    assert compare(without, CONFIG, without) == (without, Change([], ["nvme"]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dram.capacity", "4MiB"),
        ("nvme.directories", ("/mnt/a:9MiB",)),
        ("nvme.directories", ("/mnt/b:8MiB",)),
        ("nvme.directories", ("/mnt/a:8MiB", "/mnt/b:8MiB")),
    ],
)
def test_what_was_made_no_larger_or_elsewhere_needs_a_restart(name: str, value: Any) -> None:
    assert compare(CONFIG, changed(CONFIG, name, value), CONFIG) == (CONFIG, Change([], [name]))


def test_a_capacity_goes_up_again_to_what_was_made() -> None:
    lowered, _ = compare(CONFIG, changed(CONFIG, "dram.capacity", "1MiB"), CONFIG)
    assert lowered.dram == DramConfig(capacity="1MiB")
    assert compare(lowered, CONFIG, CONFIG) == (CONFIG, Change(["dram.capacity"], []))


def test_a_change_that_does_not_go_with_what_stays_is_refused_as_a_whole(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    running = replace(CONFIG, data="0.0.0.0:0", token_file=str(token))
    with pytest.raises(ConfigError, match="beyond loopback, and no token is set"):
        compare(running, CONFIG, running)  # without the token, but it would still listen


# Capacities.


@in_virtual_time
async def test_a_lower_limit_evicts_the_coldest_in_turns_and_pinned_blocks_once_they_are_free() -> None:
    async with Stage([]) as stage:
        stage.put(*KEYS)
        lease = stage.acquire(*KEYS[:4])
        stage.store.movements.set_limit(stage.arena, 6 * LENGTH)
        await quiet()
        assert [key for key in KEYS if stage.in_arena(key)] == KEYS[:6]
        stage.store.movements.set_limit(stage.arena, 2 * LENGTH)
        await quiet()
        assert [key for key in KEYS if stage.in_arena(key)] == KEYS[:4]
        assert stage.bytes_of(lease)
        stage.release(lease)
        stage.store.movements.trim()
        await quiet()
        assert stage.arena.used_bytes == 2 * LENGTH


@in_virtual_time
async def test_a_writer_makes_room_within_the_limit_although_memory_is_free() -> None:
    async with Stage([]) as stage:
        stage.store.movements.set_limit(stage.arena, 4 * LENGTH)
        for key in KEYS:
            stage.put(key)
            assert stage.arena.used_bytes <= 4 * LENGTH
        assert [key for key in KEYS if stage.in_arena(key)] == KEYS[-4:]
        assert stage.reserve([b"long"], 5 * LENGTH).status == b"r"
        assert [key for key in KEYS if stage.in_arena(key)] == KEYS[-4:]
        stage.store.movements.set_limit(stage.arena, 2 * MIB)
        stage.put(*KEYS)
        assert all(stage.in_arena(key) for key in KEYS)


@in_virtual_time
async def test_a_writer_who_waits_has_room_once_the_limit_is_higher() -> None:
    async with Stage([]) as stage:
        stage.store.movements.set_limit(stage.arena, LENGTH)
        stage.put(b"pinned")
        lease = stage.acquire(b"pinned")
        waiting = asyncio.ensure_future(stage.reserve_waiting([b"more"], LENGTH, 60.0))
        await quiet()
        assert not waiting.done()
        stage.store.movements.set_limit(stage.arena, 2 * LENGTH)
        await quiet()
        stage.fill(waiting.result(), [b"more"])
        stage.release(lease)


@in_virtual_time
async def test_what_is_owed_to_a_disk_leaves_for_a_lower_limit_once_it_is_written() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.tier.holding = {"write"}
        stage.put(*KEYS)
        stage.store.movements.set_limit(stage.arena, LENGTH)
        await quiet()
        assert all(stage.in_arena(key) for key in KEYS)
        stage.tier.holding = set()
        stage.tier.release()
        await quiet()
        stage.store.movements.trim()
        await quiet()
        assert stage.arena.used_bytes == LENGTH
        assert sorted(stage.disks[0].keys()) == sorted(KEYS)


@in_virtual_time
async def test_a_lower_limit_of_a_disk_evicts_there_and_is_kept() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.put(*KEYS)
        await quiet()
        stage.store.movements.set_limit(stage.lower, 4 * LENGTH)
        await quiet()
        assert stage.lower.room.used_bytes == 4 * LENGTH
        stage.put(*[b"more %d" % number for number in range(8)])
        await quiet()
        assert stage.lower.room.used_bytes == 4 * LENGTH
        assert len(stage.shelves[1].sealed) == 4


# Tiers that are turned off.


@in_virtual_time
async def test_a_tier_that_is_turned_off_is_left_alone_until_it_is_turned_on() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.put(b"a")
        await quiet()
        await stage.evict(b"a")
        stage.lower.turn(on=False)
        stage.put(b"b")
        await asyncio.sleep(60)
        assert stage.lower.breaker.open
        assert not stage.acquire(b"a").blocks
        assert stage.lower.counters.breaker_opened == 0
        stage.lower.turn(on=True)
        await asyncio.sleep(2)
        assert not stage.lower.failing
        lease = await stage.acquiring(b"a")
        assert len(lease.blocks) == 1
        stage.release(lease)
        assert stage.is_below(b"b")


@in_virtual_time
async def test_a_tier_that_is_off_from_the_start_is_opened_when_it_is_turned_on() -> None:
    disk = Disk(8 * MIB)
    async with Stage([disk]) as stage:
        stage.put(b"a")
    stage = Stage([disk])
    stage.lower.turn(on=False)
    async with stage:
        await asyncio.sleep(60)
        assert (stage.lower.recovered, stage.lower.failing) == (False, "it is turned off")
        stage.lower.turn(on=True)
        await asyncio.sleep(2)
        assert stage.is_below(b"a")


# Rules and policies.


@in_virtual_time
async def test_admitting_more_writes_what_was_passed_over() -> None:
    async with Stage([Disk(8 * MIB)], Rules(admit_hits=2)) as stage:
        stage.put(b"a")
        await quiet()
        assert not stage.is_below(b"a")
        stage.store.movements.set_rules(stage.lower, Rules())
        await quiet()
        assert stage.is_below(b"a")


@in_virtual_time
async def test_what_was_owed_is_no_longer_where_the_rules_say_so() -> None:
    async with Stage([Disk(8 * MIB)], Rules(jobs=2)) as stage:
        stage.tier.holding = {"write"}
        stage.put(b"first")  # keeps the one writer
        stage.put(*KEYS)
        owed = sum(stage.block(key).owed for key in KEYS)
        stage.store.movements.set_rules(stage.lower, Rules(jobs=2, owed=False))
        await quiet()
        assert sum(stage.block(key).owed for key in KEYS) == 0
        stage.store.movements.set_rules(stage.lower, Rules(jobs=2))
        await quiet()
        assert sum(stage.block(key).owed for key in KEYS) == owed


# A daemon.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reload")


@pytest.fixture(scope="module")
def node(folder: Path) -> Iterator[Node]:
    """A daemon with a file, a disk and a token."""
    (folder / "token").write_text("first")
    write(folder)
    with Node("16MiB", "--config", str(folder / "node.toml")) as node:
        yield node
        node.check()
        assert "Traceback" not in node.log, node.log


def write(folder: Path, capacity: str = "64MiB", more: str = "") -> None:
    text = f'token_file = "{folder}/token"\n{more}[nvme]\ndirectories = ["{folder}/nvme:{capacity}"]\n'
    (folder / "node.toml").write_text(text)


def post(node: Node, token: str | None = None, data: bytes = b"") -> tuple[int, str]:
    """Ask for a reload: status and body."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    url = f"http://{node.endpoint('http')}/v1/reload"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_sighup_reads_the_file_again_and_one_line_says_what_that_changed(node: Node, folder: Path) -> None:
    with node.client() as store:
        for number in range(24):
            store.put(NAMESPACE, b"%d" % number, bytes(MIB))
        write(folder, "16MiB", 'node = "other"\nlog_level = "debug"\n')
        node.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "reload: " in node.log)
        assert node.log.count("reload: changed nvme.directories, log_level; needs a restart: node\n") == 1
        wait_for(lambda: (disk := store.statistics().tiers[1]).used_bytes <= disk.limit_bytes == 16 * MIB)
        assert store.statistics().node != "other"
        assert store.get(NAMESPACE, b"23") == bytes(MIB)


def test_http_wants_the_token_and_says_what_changed(node: Node, folder: Path) -> None:
    write(folder)
    assert post(node, "first")[0] == 200
    for wrong in (None, "", "second", "first ".upper(), "f\xfcrst"):
        status, text = post(node, wrong)
        assert (status, text) == (401, "give the token as Authorization: Bearer\n")
    assert get(node, "/v1/reload")[0] == 405
    write(folder, "32MiB", 'log_level = "error"\nnode = "other"\n')
    status, text = post(node, "first", b"{" * 100_000)
    assert (status, json.loads(text)) == (
        200,
        {"changed": ["nvme.directories", "log_level"], "needs_restart": ["node"]},
    )
    # So does another token in the same file, at once.
    (folder / "token").write_text("second")
    write(folder)
    assert json.loads(post(node, "first")[1])["changed"] == ["nvme.directories", "log_level", "token_file"]
    assert post(node, "first")[0] == 401
    assert post(node, "second") == (200, '{"changed":[],"needs_restart":[]}')
    (folder / "token").write_text("first")
    post(node, "second")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("lo_level = 1\n", "unknown configuration key lo_level"),
        ("[dram\n", "Expected ']'"),
        ("[limits]\nclients = 0\n", "limits.clients is 0; give 1 or more"),
        ("[limits]\nheld_fraction = 2.0\n", "limits.held_fraction is 2.0; give 0 to 1"),
    ],
)
def test_a_wrong_file_changes_nothing_and_says_why(node: Node, folder: Path, more: str, message: str) -> None:
    write(folder, "16MiB", more)
    status, text = post(node, "first")
    assert status == 422
    assert message in text
    assert text.endswith("; nothing has changed\n")
    assert f"reload: {text.strip()}" in node.log
    with node.client() as store:
        assert store.statistics().tiers[1].limit_bytes == 64 * MIB
    write(folder)
    assert post(node, "first") == (200, '{"changed":[],"needs_restart":[]}')


def test_a_disk_is_turned_off_and_on_and_readers_go_on(node: Node, folder: Path) -> None:
    def on_disk(store: StoreClient) -> int:
        return store.hit_length(NAMESPACE, [b"kept"]).nvme

    with node.client() as store:
        store.put(NAMESPACE, b"kept", b"bytes")
        (folder / "node.toml").write_text((folder / "node.toml").read_text() + "enabled = false\n")
        assert post(node, "first") == (200, '{"changed":["nvme.enabled"],"needs_restart":[]}')
        assert get(node, "/readyz") == (200, "ready; tier nvme is turned off\n")
        assert store.get(NAMESPACE, b"kept") == b"bytes"
        write(folder)
        assert post(node, "first")[0] == 200
        wait_for(lambda: get(node, "/readyz") == (200, "ready\n"))
        wait_for(lambda: on_disk(store))
