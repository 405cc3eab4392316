"""A store over tiers that are slow, fail, forget nothing too early and crash, against a dict."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.block import Medium, Namespace
from kvstore.errors import InvalidRequest, TierError
from kvstore.node import patience
from kvstore.node.accounts import Quotas
from kvstore.node.blocks import Block
from kvstore.node.clear import Scope, clear
from kvstore.node.lease import Grant, Holder, ReadLease, WriteLease
from kvstore.node.rules import Rules
from kvstore.node.verification import Verification
from tests.scripted import KINDS, MIB, Call, Disk, Stage, content, ended, quiet, virtual_time
from tests.test_room import PHASES
from tiers.base import Slot

T = TypeVar("T")

NAMESPACES = [Namespace(model="states", salt=salt) for salt in "ab"]
KEYS = [b"%d" % number for number in range(7)]
# The arena holds about half of them.
LENGTHS = [300_000, 4097, 262_144, 700_000, 262_144, 1, 500_000]
# What changes much happens rarely: where this is 0.
CHANCE = st.integers(0, 5)
SPANS = st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(1, 4))

Name = tuple[int, bytes]  # the namespace's number, and a key

RULES = st.builds(
    Rules,
    on_eviction=st.booleans(),
    exclusive=st.booleans(),
    admit_hits=st.sampled_from([0, 0, 0, 1, 2]),
    high_watermark=st.sampled_from([0.95, 0.6]),
    low_watermark=st.sampled_from([0.5, 0.3]),
    timeout_s=st.just(2.0),
    jobs=st.sampled_from([1, 2, 4]),
)


@dataclass(repr=False)  # hypothesis prints what it draws
class Write:
    """A write lease as its client sees it: name, version, slot and length of each granted block."""

    holder: Holder
    lease: WriteLease
    blocks: list[tuple[Name, int, Slot, int] | None]
    lost: bool = False


@dataclass(repr=False)
class Read:
    """A read lease as its client sees it: block, slot and bytes."""

    holder: Holder
    lease: ReadLease
    blocks: list[tuple[Block, Slot, bytes]]


@dataclass(eq=False, repr=False)
class Waiting:
    """A reader that waits, and what it may be given: whatever was readable since it began."""

    task: "asyncio.Task[Any]"
    holder: Holder
    names: list[Name]
    allowed: dict[Name, set[int]]


@dataclass(eq=False)
class Removal:
    """What was removed, until no restart brings it back."""

    task: "asyncio.Task[None] | None"
    versions: dict[Name, set[int]] = field(default_factory=dict)


def length_of(name: Name) -> int:
    return LENGTHS[KEYS.index(name[1])]


def bytes_of(name: Name, version: int) -> bytes:
    return content(name[1], length_of(name), version, NAMESPACES[name[0]])


def names_of(span: tuple[int, int, int]) -> list[Name]:
    """A namespace's number, the first key's, and how many: a chain of keys."""
    namespace, first, size = span
    return [(namespace, key) for key in KEYS[first : first + size]]


class States(RuleBasedStateMachine):
    """What may be read of a name is one of its versions in `readable`, or nothing.

    A version is new after each removal. Removals that are not lasting yet may be undone by a restart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.contexts = ExitStack()
        logging.disable(logging.CRITICAL)  # tiers that fail say so
        self.contexts.callback(logging.disable, logging.NOTSET)
        self.loop = self.contexts.enter_context(virtual_time())
        self.readable: dict[Name, set[int]] = defaultdict(set)
        self.version: dict[Name, int] = defaultdict(int)
        self.versions = count(1)
        self.writes: list[Write] = []
        self.reads: list[Read] = []
        self.waiting: list[Waiting] = []
        self.removals: list[Removal] = []
        self.gone: list[Holder] = []
        self.verifying: list[asyncio.Task[Any]] = []
        self.quotas: dict[Medium, Quotas] = {}
        self.held: dict[tuple[int, Block], tuple[Slot, bytes]] = {}
        self.stage: Stage | None = None

    @property
    def on(self) -> Stage:
        assert self.stage is not None
        return self.stage

    @initialize(
        data=st.data(),
        capacities=st.lists(st.sampled_from([512 << 10, MIB, 3 * MIB]), min_size=1, max_size=2),
        two_media=st.booleans(),
        debug=st.booleans(),
        restarts=st.booleans(),
    )
    def start(
        self, data: st.DataObject, capacities: list[int], two_media: bool, debug: bool, restarts: bool
    ) -> None:
        self.restarts = restarts  # before the end
        rules = [data.draw(RULES)] * len(capacities)
        media = [Medium.NVME, Medium.NVME]
        if two_media:
            rules, media = [data.draw(RULES) for _ in capacities], [Medium.NVME, Medium.REMOTE]
        disks = [Disk(capacity) for capacity in capacities]
        self.open(Stage(disks, rules, media=media[: len(disks)], debug=debug))

    def open(self, stage: Stage) -> None:
        self.stage = stage
        stage.store.salts.set_quotas(self.quotas)
        stage.hold(maps=True, fraction=0.5)
        stage.hold(maps=False)
        self.shelves = [stage.store.directory.shelves(namespace) for namespace in NAMESPACES]
        self.do(stage.__aenter__)

    # Running.

    def do(self, work: Callable[[], Any]) -> Any:
        """Do something, then let everything happen that happens without time passing."""

        async def run() -> Any:
            result = work()
            if asyncio.iscoroutine(result):
                result = await result
            await quiet()
            return result

        result = self.loop.run_until_complete(run())
        self.collect()
        return result

    def collect(self) -> None:
        """Take the answers of those who waited."""
        for waiting in [w for w in self.waiting if w.task.done()]:
            self.waiting.remove(waiting)
            answer = ended(waiting.task)
            if isinstance(answer, Grant):
                self.granted(waiting.holder, answer, waiting.names)
            elif isinstance(answer, tuple):
                lease, found = answer
                here = [name for name, byte in zip(waiting.names, found, strict=True) if byte]
                self.got(waiting.holder, lease, here, waiting.allowed)
            elif answer is not None:
                self.got(waiting.holder, answer, waiting.names, waiting.allowed)
        for task in [task for task in self.verifying if task.done() and not task.cancelled()]:
            assert task.exception() is None or isinstance(task.exception(), TierError)
        self.verifying = [task for task in self.verifying if not task.done()]
        for removal in [r for r in self.removals if r.task is not None and r.task.done()]:
            lasting, removal.task = removal.task, None
            assert lasting is not None
            if lasting.cancelled() or lasting.exception() is not None:
                continue
            for earlier in self.removals[: self.removals.index(removal) + 1]:
                for name in removal.versions:
                    if earlier is not removal:
                        earlier.versions.pop(name, None)
            self.removals.remove(removal)

    def got(
        self, holder: Holder, lease: ReadLease, names: Sequence[Name], allowed: dict[Name, set[int]]
    ) -> None:
        """A reader was given leading blocks of these."""
        assert len(lease.blocks) <= len(names)
        blocks = []
        for name, block in zip(names, lease.blocks, strict=False):
            seen = bytes(self.on.memory.view(block.slot)[: block.length])
            assert any(seen == bytes_of(name, version) for version in allowed[name]), (name, seen[:20])
            blocks.append((block, block.slot, seen))
        if blocks:
            self.reads.append(Read(holder, lease, blocks))

    # Writers.

    @rule(span=SPANS)
    def put(self, span: tuple[int, int, int]) -> None:
        writes = len(self.writes)
        self.reserve(0, span)
        for write in self.writes[writes:]:
            self.seal(write, list(range(len(write.blocks))))

    @rule(span=SPANS)
    def put_again(self, span: tuple[int, int, int]) -> None:
        self.put(span)

    @rule(who=st.integers(0, 2), span=SPANS)
    def reserve(self, who: int, span: tuple[int, int, int]) -> None:
        holder = self.on.holders[who]
        if holder in self.gone:
            return
        names, parent = names_of(span), KEYS[span[1] - 1] if span[1] else None
        keys, lengths = [key for _, key in names], [length_of(name) for name in names]
        reserve = self.on.store.writers.reserve
        grant = self.do(lambda: reserve(holder, self.shelves[span[0]], keys, lengths, parent=parent))
        self.granted(holder, grant, names)

    @rule(who=st.integers(0, 2), span=SPANS)
    def reserve_waiting(self, who: int, span: tuple[int, int, int]) -> None:
        store, holder, shelves, names = (
            self.on.store,
            self.on.holders[who],
            self.shelves[span[0]],
            names_of(span),
        )
        keys, lengths = [key for _, key in names], [length_of(name) for name in names]

        def attempt() -> Grant:
            return store.writers.reserve(holder, shelves, keys, lengths)

        self.wait(holder, names, lambda: patience.reserve(store, holder, attempt, sum(lengths), 5.0))

    def granted(self, holder: Holder, grant: Grant, names: Sequence[Name]) -> None:
        """A writer was granted some of these."""
        blocks: list[tuple[Name, int, Slot, int] | None] = []
        for name, status in zip(names, grant.status, strict=True):
            assert status != ord("p") or self.readable[name], f"{name} is said to be present"
            if status == ord("g"):
                blocks.append((name, self.version[name], grant.slots[len(blocks)], length_of(name)))
        if blocks:
            self.writes.append(Write(holder, grant.lease, blocks))
            self.scribble()

    @rule()
    def scribble(self) -> None:
        """Writers write all the while, also those that lost their connection."""
        for number, write in enumerate(self.writes):
            for block in write.blocks:
                if block is not None:
                    self.on.memory.view(block[2])[:] = b"%c" % (number % 200) * block[2].length

    @precondition(lambda self: any(not write.lost for write in self.writes))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        write = data.draw(st.sampled_from([write for write in self.writes if not write.lost]))
        left = [index for index, block in enumerate(write.blocks) if block is not None]
        self.seal(write, data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True).map(sorted)))

    def seal(self, write: Write, chosen: list[int]) -> None:
        for index in chosen:
            block = write.blocks[index]
            assert block is not None
            name, version, slot, length = block
            self.on.memory.view(slot)[:length] = bytes_of(name, version)
            write.blocks[index] = None
            self.appears(name, version)
        assert self.do(lambda: self.on.store.writers.commit(write.holder, write.lease.id, chosen)) == len(
            chosen
        )
        if not any(write.blocks):
            self.writes.remove(write)

    def appears(self, name: Name, version: int) -> None:
        self.version[name] = version
        self.readable[name].add(version)
        for waiting in self.waiting:
            if name in waiting.allowed:
                waiting.allowed[name].add(version)

    @precondition(lambda self: self.writes)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        write = data.draw(st.sampled_from(self.writes))
        self.writes.remove(write)
        self.do(lambda: self.on.store.writers.abort(write.holder, write.lease.id))

    # Readers.

    @rule(who=st.integers(0, 2), span=SPANS)
    def acquire(self, who: int, span: tuple[int, int, int]) -> None:
        holder, namespace, names = self.on.holders[who], span[0], names_of(span)
        if holder in self.gone:
            return
        lease = self.do(
            lambda: self.on.store.readers.acquire(
                holder, self.shelves[namespace][0], [key for _, key in names]
            )
        )
        self.got(holder, lease, names, self.readable)

    @rule(who=st.integers(0, 2), span=SPANS, wait_s=st.sampled_from([0.5, 10.0]))
    def acquire_waiting(self, who: int, span: tuple[int, int, int], wait_s: float) -> None:
        store, holder, shelves, names = (
            self.on.store,
            self.on.holders[who],
            self.shelves[span[0]],
            names_of(span),
        )
        keys = [key for _, key in names]
        self.wait(holder, names, lambda: patience.acquire(store, holder, shelves, keys, wait_s))

    @rule(
        who=st.integers(0, 2),
        names=st.lists(st.tuples(st.integers(0, 1), st.sampled_from(KEYS)), min_size=1, max_size=4),
        wait_s=st.sampled_from([0.5, 10.0]),
    )
    def acquire_each(self, who: int, names: list[Name], wait_s: float) -> None:
        store, holder = self.on.store, self.on.holders[who]
        items = [(self.shelves[namespace], key) for namespace, key in names]
        self.wait(holder, names, lambda: patience.acquire_each(store, holder, items, wait_s))

    def wait(self, holder: Holder, names: Sequence[Name], work: Callable[[], Any]) -> None:
        if holder in self.gone:
            return

        def begin() -> None:
            allowed = {name: set(self.readable[name]) for name in names}
            task = self.loop.create_task(work())
            self.waiting.append(Waiting(task, holder, list(names), allowed))

        self.do(begin)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        waiting = data.draw(st.sampled_from(self.waiting))
        self.do(waiting.task.cancel)

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        read = data.draw(st.sampled_from(self.reads))
        self.reads.remove(read)
        self.do(lambda: self.on.store.readers.release(read.holder, read.lease.id))

    # Holds.

    @rule(span=SPANS, ttl_s=st.sampled_from([0.0, 2.0, 50.0]))
    def hold_prefix(self, span: tuple[int, int, int], ttl_s: float) -> None:
        keys = [key for _, key in names_of(span)]
        with suppress(InvalidRequest):  # together they would be too much
            self.do(lambda: self.on.store.holds.hold(NAMESPACES[span[0]], keys, ttl_s))

    @precondition(lambda self: self.stage is not None and self.stage.store.holds.holder.reads)
    @rule(data=st.data())
    def end_hold(self, data: st.DataObject) -> None:
        hold_id = data.draw(st.sampled_from([*self.on.store.holds.holder.reads]))
        assert self.do(lambda: self.on.store.holds.end(hold_id))

    # Removal, and clients that go.

    @rule(
        names=st.lists(
            st.tuples(st.integers(0, 1), st.sampled_from(KEYS)), min_size=1, max_size=3, unique=True
        ),
        waited_for=st.booleans(),
    )
    def remove(self, names: list[Name], waited_for: bool) -> None:
        self.do(lambda: self.removed(names, waited_for))

    def removed(self, names: list[Name], waited_for: bool) -> None:
        for namespace in (0, 1):
            chosen = [name for name in names if name[0] == namespace]
            if not chosen:
                continue
            removal = Removal(None, {name: set(self.readable[name]) for name in chosen})
            for name in chosen:
                self.readable[name].clear()
                self.version[name] = next(self.versions)
            _, lasting = self.on.store.remove(self.shelves[namespace], [key for _, key in chosen])
            assert lasting is not None
            if waited_for:
                removal.task = self.loop.create_task(awaited(lasting))
            else:
                lasting.close()  # type: ignore[attr-defined]
            self.removals.append(removal)

    @precondition(lambda self: self.stage is not None and all(low.recovered for low in self.stage.lowers))
    @rule(salt=st.sampled_from(["a", "b", None]), chance=CHANCE)
    def clear(self, salt: str | None, chance: int) -> None:
        if chance:
            return
        scope = Scope(model="states", salt=salt)
        names = [(n, key) for n in (0, 1) if scope.has(NAMESPACES[n]) for key in KEYS]
        removal = Removal(None, {name: set(self.readable[name]) for name in names})
        for name in names:
            self.readable[name].clear()
            self.version[name] = next(self.versions)

        def begin() -> None:
            removal.task = self.loop.create_task(awaited(clear(self.on.store, scope, 100.0)))
            self.removals.append(removal)

        self.do(begin)

    @rule(who=st.integers(0, 2), chance=CHANCE)
    def disconnect(self, who: int, chance: int) -> None:
        if chance:
            return
        holder = self.on.holders[who]
        if holder in self.gone:
            return

        def lost() -> None:
            for waiting in self.waiting:
                if waiting.holder is holder:
                    waiting.task.cancel()
            if self.on.store.disconnect(holder):
                for write in self.writes:
                    write.lost = write.lost or write.holder is holder
            else:
                self.forget_holder(holder)

        self.gone.append(holder)
        self.do(lost)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.gone))

        def end() -> None:
            self.on.store.end(holder)
            self.forget_holder(holder)  # before anybody else is given its slots

        self.do(end)

    def forget_holder(self, holder: Holder) -> None:
        """Its process is gone; another takes its place."""
        assert not holder.lease_ids()
        self.reads = [read for read in self.reads if read.holder is not holder]
        self.writes = [write for write in self.writes if write.holder is not holder]
        self.gone.remove(holder)

    # Quotas.

    @rule(dram=st.sampled_from([None, 750_000]), below=st.sampled_from([None, 750_000]), chance=CHANCE)
    def set_quotas(self, dram: int | None, below: int | None, chance: int) -> None:
        if not chance:
            self.quotas = {
                Medium.DRAM: Quotas(None, {"a": dram}),
                Medium.NVME: Quotas(below),
                Medium.REMOTE: Quotas(below),
            }
            self.on.store.salts.set_quotas(self.quotas)

    @rule()
    def keep_quotas(self) -> None:
        self.do(self.on.store.salts.keep_quotas)

    # The tiers.

    @rule(number=st.integers(0, 1), kinds=st.sets(st.sampled_from(KINDS)))
    def hold(self, number: int, kinds: set[str]) -> None:
        self.on.tiers[number % len(self.on.tiers)].holding = kinds

    @rule(number=st.integers(0, 1))
    def hold_transfers(self, number: int) -> None:
        self.on.tiers[number % len(self.on.tiers)].holding = {"read", "write"}

    @rule(number=st.integers(0, 1))
    def hold_nothing(self, number: int) -> None:
        tier = self.on.tiers[number % len(self.on.tiers)]
        tier.holding = set()
        self.do(tier.release)

    def calls(self) -> list[Call]:
        return [call for tier in self.on.tiers for call in tier.calls]

    @precondition(lambda self: self.stage is not None and self.calls())
    @rule(data=st.data(), how=st.sampled_from(["release", "release", "release", "copy", "put", "fail"]))
    def call(self, data: st.DataObject, how: str) -> None:
        call = data.draw(st.sampled_from(self.calls()))
        if how in ("copy", "put") and call.kind not in ("read", "write"):
            how = "release"
        self.do(getattr(call, how))

    @rule(number=st.integers(0, 1), cancelled=st.booleans())
    def verify(self, number: int, cancelled: bool) -> None:
        def begin() -> asyncio.Task[Any]:
            task = self.loop.create_task(Verification(lower).page(0))
            self.verifying.append(task)
            return task

        lower = self.on.lowers[number % len(self.on.lowers)]
        task = self.do(begin)
        if cancelled:
            self.do(task.cancel)

    @rule(seconds=st.sampled_from([0.01, 1.0, 3.0, 60.0]))
    def passes(self, seconds: float) -> None:
        self.do(lambda: asyncio.sleep(seconds))

    @rule(number=st.integers(0, 1), failures=st.sampled_from([1, 2, 5, inf]), chance=CHANCE)
    def fails(self, number: int, failures: float, chance: int) -> None:
        if chance:
            return
        self.on.disks[number % len(self.on.disks)].failures = failures

    @precondition(lambda self: self.stage is not None and any(disk.failures for disk in self.stage.disks))
    @rule()
    def works(self) -> None:
        for disk in self.on.disks:
            disk.failures = 0

    @rule(number=st.integers(0, 1), data=st.data())
    def damage(self, number: int, data: st.DataObject) -> None:
        disk = self.on.disks[number % len(self.on.disks)]
        if disk.records:
            disk.damage(data.draw(st.sampled_from(sorted(disk.records))))

    @rule(number=st.integers(0, 1), chance=CHANCE)
    def replace(self, number: int, chance: int) -> None:
        if chance:
            return
        self.on.disks[number % len(self.on.disks)].replace()

    @rule(chance=CHANCE, failures=st.sampled_from([0, 0, 1, 5]))
    def crash(self, chance: int, failures: int) -> None:
        if not chance:
            self.begin_anew(failures)

    def begin_anew(self, failures: int = 0) -> None:
        """Be killed and start again, with a disk that fails so often at first."""
        before = {
            (lower.name, identity)
            for lower in self.on.lowers
            if lower.tier.current
            for identity in self.on.log.readable.get(lower.name, ())
        }
        for removal in self.removals:
            for name, versions in removal.versions.items():
                self.readable[name] |= versions
        following = self.loop.run_until_complete(self.on.crash())
        for disk in following.disks:
            disk.failures = failures
        self.reads, self.writes, self.waiting, self.gone, self.removals = [], [], [], [], []
        self.verifying, self.held = [], {}
        self.open(following)
        for name, identity in before:
            lower = next(lower for lower in self.on.lowers if lower.name == name)
            if not lower.breaker.open:
                assert identity in self.on.log.readable.get(name, {}), f"{identity} is lost in {name}"

    # What holds always.

    @invariant()
    def is_whole(self) -> None:
        if self.stage is not None:
            assert self.stage.check() == []

    @invariant()
    def pinned_blocks_stay_as_they_were(self) -> None:
        for read in self.reads:
            for block, slot, seen in read.blocks:
                assert block.slot is slot
                assert bytes(self.on.memory.view(slot)[: len(seen)]) == seen

    @invariant()
    def held_blocks_stay_as_they_were(self) -> None:
        if self.stage is None:
            return
        leases = self.stage.store.holds.holder.reads.values()
        held = {}
        for lease_id, block in [(lease.id, block) for lease in leases for block in lease.blocks]:
            now = block.slot, bytes(self.on.memory.view(block.slot)[: block.length])
            held[lease_id, block] = now
            assert self.held.get((lease_id, block), now) == now
        self.held = held
        assert self.stage.store.holds.holder.pinned_bytes <= 2 * MIB / 4

    @invariant()
    def nothing_else_can_be_read(self) -> None:
        if self.stage is None:
            return
        for namespace, shelves in enumerate(self.shelves):
            for key, block in shelves[0].sealed.items():
                name = namespace, key
                seen = bytes(self.on.memory.view(block.slot)[: block.length])
                assert any(seen == bytes_of(name, version) for version in self.readable[name]), name
            for lower, shelf in zip(self.on.lowers, shelves[1:], strict=True):
                disk = self.on.disks[self.on.lowers.index(lower)]
                for key, block in shelf.sealed.items():
                    name = namespace, key
                    assert self.readable[name], f"{name} is in {lower.name}"
                    if lower.tier.current and block.record not in disk.damaged:
                        assert block.record not in lower.tier.forgotten
                        seen = disk.bytes_of(block.record)
                        assert any(seen == bytes_of(name, version) for version in self.readable[name]), name

    @invariant()
    def loads_are_bounded(self) -> None:
        if self.stage is not None:
            lowers = self.stage.lowers
            assert all(0 <= lower.loading_bytes <= 2 * MIB / len(lowers) for lower in lowers)

    # The end.

    def teardown(self) -> None:
        try:
            if self.stage is not None:
                self.finish()
        finally:
            self.contexts.close()

    def finish(self) -> None:
        on = self.on
        for disk in on.disks:
            disk.failures = 0
        for tier in on.tiers:
            tier.holding = set()
        for waiting in self.waiting:
            waiting.task.cancel()

        def end() -> None:
            for tier in on.tiers:
                tier.release()
            on.store.holds.close()
            for holder in on.holders:
                on.store.end(holder)
            self.reads, self.writes = [], []

        self.do(end)
        self.reads, self.writes = [], []
        for _ in range(8):
            self.do(lambda: asyncio.sleep(60))
        assert not any(lower.breaker.open for lower in on.lowers)
        self.is_whole()
        self.nothing_else_can_be_read()
        if self.restarts:
            self.begin_anew()
            self.everything_here_can_be_had()
            on = self.on
        self.do(lambda: self.removed([(n, key) for n in (0, 1) for key in KEYS], True))
        assert not any(removal.task or any(removal.versions.values()) for removal in self.removals)
        self.is_whole()
        used = [tier.used_bytes for tier in on.store.statistics()]
        assert used == [0] * len(used)
        demoter, promoter = on.store.movements.demoter, on.store.movements.promoter
        assert not any((demoter._writes, demoter._hits, demoter._leaving_children, demoter._leaving_bytes))
        assert not any((demoter.writing, promoter.loading, *[lower.loading_bytes for lower in on.lowers]))
        assert not on.store.waiting._waiters
        assert not any(lower.unwritten or lower.calls or lower.writing for lower in on.lowers)
        following = self.loop.run_until_complete(on.crash())
        self.open(following)
        assert not any(self.on.log.readable.values()), "what was removed for good is back"
        self.loop.run_until_complete(self.on.__aexit__(None, None, None))

    def everything_here_can_be_had(self) -> None:
        on = self.on
        for namespace, shelves in enumerate(self.shelves):
            for key in KEYS:
                name = namespace, key
                if not on.store.readers.length_each([(shelves, key)])[0] or self.may_be_damaged(name):
                    continue
                lease = self.do(
                    lambda: patience.acquire(on.store, on.holder, shelves, [key], 10.0)  # noqa: B023
                )
                if not lease.blocks:
                    still = on.store.readers.length_each([(shelves, key)])[0] > 0
                    assert not still, f"{name} is here and cannot be had"
                    continue
                self.got(on.holder, lease, [name], self.readable)
                self.do(lambda: on.store.readers.release(on.holder, lease.id))  # noqa: B023

    def may_be_damaged(self, name: Name) -> bool:
        return any(
            disk.records[number].key == name[1]
            for disk in self.on.disks
            for number in disk.damaged & disk.records.keys()
        )


async def awaited(work: Any) -> None:
    """Make a coroutine of anything that can be awaited."""
    await work


TestStoreAgainstModel = States.TestCase
TestStoreAgainstModel.settings = settings(
    max_examples=250,
    stateful_step_count=50,
    deadline=None,
    phases=PHASES,
    suppress_health_check=list(HealthCheck),
)
