"""A storage tier whose calls end when the test says so, and how; and a loop whose clock does not wait.

The tier keeps the contract of `StorageTier` and no more than that: what was forgotten comes back with a
restart until it was flushed or overwritten, memory is read and written at the moment when the test lets the
call go on, and the memory of a read that failed holds garbage. Whoever uses a slot, a record or memory in a
way that the contract rules out is found by `check`.
"""

import asyncio
import functools
import itertools
import selectors
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import inf
from types import SimpleNamespace, TracebackType
from typing import Any, ParamSpec, Self
from unittest.mock import patch

import xxhash

from kvstore.block import Medium, Namespace
from kvstore.errors import TierError
from kvstore.node import finder, patience, promote
from kvstore.node import lower as lower_module
from kvstore.node import store as store_module
from kvstore.node.arena import Arena
from kvstore.node.blocks import Block, State
from kvstore.node.directory import TierDirectory
from kvstore.node.lease import Grant, Holder, ReadLease
from kvstore.node.lower import Lower
from kvstore.node.origin import Origin
from kvstore.node.policy import LRU
from kvstore.node.promote import Shelves
from kvstore.node.rules import Rules
from kvstore.node.store import Store
from tiers.allocator import ALIGNMENT_BYTES, Allocator
from tiers.base import Slot, TierStatistics, Transfer
from tiers.dram import DramTier

MIB = 1 << 20
NAMESPACE = Namespace(model="scripted")
KINDS = ("read", "write", "flush", "same", "probe", "recover")

P = ParamSpec("P")


# Time.


class _Selector(selectors.SelectSelector):
    """Does not wait but turns the clock on."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits, and nothing is left that could happen"
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when nothing else is to be done, and then at once."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


@contextmanager
def virtual_time() -> Iterator[asyncio.AbstractEventLoop]:
    """A virtual loop, whose clock is also that of the store."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner, ExitStack() as stack:
        clock = SimpleNamespace(monotonic=runner.get_loop().time)
        for module in (patience, finder, lower_module, promote, store_module):
            stack.enter_context(patch.object(module, "time", clock))
        yield runner.get_loop()


def in_virtual_time(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Make a test of a coroutine function."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with virtual_time() as loop:
            loop.run_until_complete(test(*args, **kwargs))

    return run


async def quiet() -> None:
    """Until nothing happens any more unless time passes or a call is released."""
    loop = asyncio.get_running_loop()
    for _ in range(20_000):
        await asyncio.sleep(0)
        if not loop._ready:  # type: ignore[attr-defined]
            return
    raise AssertionError("it never comes to rest")


async def until(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    """Until the condition holds; fails when it does not within that time of the loop's clock."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    await quiet()
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)
        await quiet()


# The tier.


@dataclass(slots=True)
class Stored:
    """A record and where its bytes are."""

    namespace: Namespace
    key: bytes
    offset: int
    length: int
    checksum: int
    sequence: int

    @property
    def end(self) -> int:
        """Where its slot ends."""
        return self.offset + _pages(self.length)


class Disk:
    """What outlives a tier. The next `failures` calls end with an error."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.failures = 0.0
        self.numbers = itertools.count(1)
        self.sequences = itertools.count(1)
        self.replace()

    def tier(self, name: str, medium: Medium) -> "ScriptedTier":
        """A tier that is on it."""
        return ScriptedTier(self, name=name, medium=medium)

    def replace(self) -> None:
        """Have another disk in its place, which is empty."""
        self.identity = object()
        self.data = bytearray(self.capacity_bytes)
        self.records: dict[int, Stored] = {}
        self.damaged: set[int] = set()

    def damage(self, number: int) -> None:
        """Change a byte of a block."""
        stored = self.records[number]
        self.data[stored.offset + stored.length // 2] ^= 1
        self.damaged.add(number)

    def bytes_of(self, number: int) -> bytes:
        """A block's bytes as they are on the disk."""
        stored = self.records[number]
        return bytes(memoryview(self.data)[stored.offset : stored.offset + stored.length])

    def keys(self) -> list[bytes]:
        """Of all records, oldest first."""
        return [s.key for s in sorted(self.records.values(), key=lambda s: s.sequence)]


class Call:
    """A call of the tier that has not ended. `release` or `fail` ends it; `copy` and `put` come before."""

    def __init__(self, tier: "ScriptedTier", kind: str, transfers: Sequence[Transfer]) -> None:
        self.tier = tier
        self.kind = kind
        self.transfers = list(transfers)
        self.answer: Any = None
        self.answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._copied = self._put = False
        self._forgotten = set(tier.forgotten)
        if kind == "read":
            for transfer in transfers:
                _scribble(transfer, b"\xee")
        self._digests = [_digest(transfer) for transfer in transfers]

    def __repr__(self) -> str:
        return f"<{self.tier.name} {self.kind} {[t.key for t in self.transfers]}>"

    def copy(self) -> None:
        """Let the bytes go where they are to go, now."""
        if not self._copied:
            self._copied = True
            self._unchanged()
            for transfer in self.transfers:
                if self.kind == "read":
                    self.tier._read(transfer)
                elif not transfer.dropped:
                    self.tier._write(transfer)
            self._digests = [_digest(transfer) for transfer in self.transfers]

    def put(self) -> None:
        """Make the records of a write lasting, now."""
        self.copy()
        if self.kind == "write" and not self._put:
            self._put = True
            self.tier._put([transfer for transfer in self.transfers if not transfer.dropped])

    def release(self) -> None:
        """End it well, unless the disk fails."""
        if self.tier.disk.failures:
            self.tier.disk.failures -= 1
            self.fail()
            return
        try:
            if self.kind in ("read", "write"):
                self.put()
                self._unchanged()
            else:
                self.answer = getattr(self.tier, f"_{self.kind}")(self)
        except TierError as error:
            self._end(error)
        else:
            self._end(None)

    def fail(self, text: str = "scripted failure") -> None:
        """End it with an error."""
        self._unchanged()
        for transfer in self.transfers:
            if self.kind == "read":
                _scribble(transfer, b"\xbb")
            else:
                self.tier._take_back(transfer)
        self._end(TierError(f"{self.tier.name} tier: {text}"))

    def forgets(self) -> set[int]:
        """What a flush makes lasting: what was forgotten before it began."""
        return self._forgotten

    def _end(self, error: TierError | None) -> None:
        self.tier.calls.remove(self)
        if self.kind == "write":
            self.tier._dropped.update(t.record for t in self.transfers if t.dropped)
        if self.answered.done():
            return
        if error is None:
            self.answered.set_result(self.answer)
        else:
            self.answered.set_exception(error)
            self.answered.exception()  # perhaps nobody waits any more

    def _unchanged(self) -> None:
        for transfer, digest in zip(self.transfers, self._digests, strict=True):
            if _digest(transfer) != digest:
                self.tier.wrong.append(f"the memory of {transfer.key!r} was touched during its {self.kind}")


class ScriptedTier:
    """A storage tier on a `Disk`.

    Calls of a kind that is in `holding` wait in `calls` until they are released; others end at once.
    `started` is called with each call that begins.
    """

    slowest_bytes_per_s = inf

    def __init__(self, disk: Disk, *, name: str = "nvme", medium: Medium = Medium.NVME) -> None:
        self.disk = disk
        self.name = name
        self.medium = medium
        self.capacity_bytes = disk.capacity_bytes
        self.holding: set[str] = set()
        self.calls: list[Call] = []
        self.started: Callable[[Call], None] = lambda _: None
        self.interrupts = 0
        self.forgotten: set[int] = set()
        self.wrong: list[str] = []
        self._identity: object | None = None
        self._ever_forgotten: set[int] = set()
        self._dropped: set[int] = set()  # were never put: their numbers are to be given back all the same
        self._allocator = Allocator(self.capacity_bytes)
        self._closed = False

    # What tests do.

    def under_way(self, kind: str) -> list[Call]:
        """The calls of one kind."""
        return [call for call in self.calls if call.kind == kind]

    def release(self, *kinds: str) -> None:
        """End all calls of these kinds, or of all, in their order."""
        for call in list(self.calls):
            if not kinds or call.kind in kinds:
                call.release()

    # Calls: see StorageTier.

    async def recover(self) -> list[Transfer]:
        return await self._call("recover")

    async def write(self, transfers: Sequence[Transfer]) -> None:
        self._check_open()
        live = [s for n, s in self.disk.records.items() if n not in self.forgotten]
        for transfer in transfers:
            transfer.record = next(self.disk.numbers)
            begin, end = transfer.slot.offset, transfer.slot.offset + _pages(transfer.length)
            others = [t for call in self.calls for t in call.transfers if t is not transfer]
            if any(s.offset < end and begin < s.end for s in live):
                self.wrong.append(f"{transfer.key!r} is written over a block that was not forgotten")
            if any(t.slot.offset < end and begin < t.slot.offset + _pages(t.length) for t in others):
                self.wrong.append(f"{transfer.key!r} is written where another call is under way")
        await self._call("write", transfers)

    async def read(self, transfers: Sequence[Transfer]) -> None:
        self._check_open()
        await self._call("read", transfers)

    def forget(self, records: Sequence[Any]) -> None:
        for number in records:
            if number is None:
                continue
            if number in self._ever_forgotten:
                self.wrong.append(f"record {number} is forgotten twice: it may be another's by now")
            self._ever_forgotten.add(number)
            self.forgotten.add(number)

    def evict(self, records: Sequence[Any]) -> None:
        self.forget(records)

    async def flush(self, names: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self._check_open()
        await self._call("flush")

    async def same(self) -> bool:
        return self._identity is not None and bool(await self._call("same"))

    def interrupt(self) -> None:
        self.interrupts += 1

    async def probe(self) -> None:
        self._check_open()
        await self._call("probe")

    def close(self) -> None:
        self._closed = True

    # Space.

    def slot_length(self, length: int) -> int:
        return _pages(length)

    def take(self, length: int, owner: object, within: Slot | None = None) -> Slot | None:
        return self._allocator.take(_pages(length), owner, within)

    def free(self, slot: Slot) -> Slot:
        return self._allocator.free(slot)

    def largest(self, count: int) -> list[Slot]:
        return self._allocator.largest(count)

    @property
    def free_bytes(self) -> int:
        return self._allocator.free_bytes

    def statistics(self) -> TierStatistics:
        ready, free = self._allocator.ready_bytes, self._allocator.free_bytes
        largest = max((slot.length for slot in self._allocator.largest(1)), default=0)
        return TierStatistics(self.name, self.medium.value, self.capacity_bytes, ready, ready - free, largest)

    def check(self) -> list[str]:
        kept = [f"record {number} was never given back" for number in self._dropped - self._ever_forgotten]
        return [f"{self.name}: {line}" for line in (*self._allocator.check(), *self.wrong, *kept)]

    @property
    def current(self) -> bool:
        """Whether the disk is the one that was recovered."""
        return self._identity is self.disk.identity

    # What calls do when they are released.

    async def _call(self, kind: str, transfers: Sequence[Transfer] = ()) -> Any:
        if self._closed:
            raise TierError(f"{self.name} tier: closed")
        call = Call(self, kind, transfers)
        self.calls.append(call)
        self.started(call)
        if kind not in self.holding:
            call.release()
        return await asyncio.shield(call.answered)

    def _check_open(self) -> None:
        if self._identity is None:
            raise TierError(f"{self.name} tier: not open")

    def _recover(self, call: Call) -> list[Transfer]:
        others = [other for other in self.calls if other is not call]
        if any(other.kind in ("read", "write", "flush") for other in others):
            self.wrong.append(f"recovered while {others} are under way")
        if others:
            raise TierError(f"{self.name} tier: {len(others)} calls are under way")
        if self.current:
            self._forget_for_good(self.forgotten)
        else:  # the numbers are another disk's now
            self.forgotten.clear()
            self._ever_forgotten.clear()
            self._dropped.clear()
        self._identity = self.disk.identity
        latest: dict[tuple[bytes, bytes], int] = {}
        for number, stored in sorted(self.disk.records.items(), key=lambda item: item[1].sequence):
            identity = stored.namespace.id, stored.key
            if identity in latest:
                del self.disk.records[latest.pop(identity)]
            latest[identity] = number
        by_offset = sorted(self.disk.records.items(), key=lambda item: item[1].offset)
        self._allocator = Allocator(self.capacity_bytes)
        slots = self._allocator.claim([(s.offset, _pages(s.length), s.key) for _, s in by_offset])
        slot_of = dict(zip([number for number, _ in by_offset], slots, strict=True))
        return [
            Transfer(s.namespace, s.key, s.length, slot=slot_of[number], checksum=s.checksum, record=number)
            for number, s in sorted(self.disk.records.items(), key=lambda item: item[1].sequence)
        ]

    def _flush(self, call: Call) -> None:
        self._forget_for_good(call.forgets())

    def _same(self, _: Call) -> bool:
        return self.current

    def _probe(self, _: Call) -> None:
        pass

    def _forget_for_good(self, numbers: set[int]) -> None:
        for number in list(numbers):
            self.disk.records.pop(number, None)
            self.forgotten.discard(number)

    def _write(self, transfer: Transfer) -> None:
        assert transfer.memory is not None
        begin, end = transfer.slot.offset, transfer.slot.offset + _pages(transfer.length)
        self._forget_for_good(
            {n for n in self.forgotten & self.disk.records.keys() if self._overlaps(n, begin, end)}
        )
        transfer.checksum = transfer.checksum or _digest(transfer)
        if self.current:
            self.disk.data[begin:end] = transfer.memory[: end - begin]

    def _overlaps(self, number: int, begin: int, end: int) -> bool:
        stored = self.disk.records[number]
        return stored.offset < end and begin < stored.end

    def _put(self, transfers: Sequence[Transfer]) -> None:
        for t in transfers:
            assert t.checksum is not None
            stored = Stored(
                t.namespace, t.key, t.slot.offset, t.length, t.checksum, next(self.disk.sequences)
            )
            if self.current:
                self.disk.records[t.record] = stored

    def _take_back(self, transfer: Transfer) -> None:
        self.disk.records.pop(transfer.record, None)
        if not transfer.dropped:
            transfer.record = None

    def _read(self, transfer: Transfer) -> None:
        assert transfer.memory is not None
        offset, length = transfer.slot.offset, transfer.length
        data = memoryview(self.disk.data)[offset : offset + length]
        if xxhash.xxh3_64_intdigest(data) == transfer.checksum:
            transfer.memory[:length] = data
            return
        transfer.damaged = True
        _scribble(transfer, b"\xdd")
        if self.current and transfer.record not in self.disk.damaged:
            self.wrong.append(f"{transfer.key!r} is read where other bytes are by now")


def _pages(length: int) -> int:
    return -(-length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _digest(transfer: Transfer) -> int:
    assert transfer.memory is not None
    return xxhash.xxh3_64_intdigest(transfer.memory[: transfer.length])


def _scribble(transfer: Transfer, byte: bytes) -> None:
    assert transfer.memory is not None
    transfer.memory[:] = byte * len(transfer.memory)


# A store over such tiers.


@functools.lru_cache(maxsize=512)
def content(key: bytes, length: int, version: int = 0, namespace: Namespace = NAMESPACE) -> bytes:
    """The bytes of a block."""
    stamp = b"%s/%s/%d|" % (namespace.salt.encode(), key, version)
    return (stamp * (length // len(stamp) + 1))[:length]


class Log:
    """A listener that keeps what it is told, and who is readable by that."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, bytes]] = []
        self.readable: dict[str, dict[tuple[bytes, bytes], Block]] = {}
        self.wrong: list[str] = []

    def sealed(self, tier: str, blocks: Sequence[Block], origin: Origin | None) -> None:
        readable = self.readable.setdefault(tier, {})
        for block in blocks:
            self.lines.append(("sealed", tier, block.key))
            if block.identity in readable:
                self.wrong.append(f"{block} is announced twice in {tier}")
            readable[block.identity] = block

    def removed(self, tier: str, blocks: Sequence[Block]) -> None:
        readable = self.readable.setdefault(tier, {})
        for block in blocks:
            self.lines.append(("removed", tier, block.key))
            if readable.pop(block.identity, None) is not block:
                self.wrong.append(f"{block} is retracted in {tier} and was not announced")

    def of(self, key: bytes) -> list[tuple[str, str]]:
        """What was said of a key, and where."""
        return [(verb, tier) for verb, tier, named in self.lines if named == key]


class Stage:
    """An arena of real memory over scripted tiers. Leaving it checks everything and lets all calls end."""

    def __init__(
        self,
        disks: Sequence[Disk],
        rules: Rules | Sequence[Rules] = Rules(),  # noqa: B008
        *,
        media: Sequence[Medium] = (),
        arena_bytes: int = 2 * MIB,
        debug: bool = False,
    ) -> None:
        self.disks = list(disks)
        self.rules = [rules] * len(disks) if isinstance(rules, Rules) else list(rules)
        self.media = list(media) or [Medium.NVME] * len(disks)
        self.arena_bytes = arena_bytes
        self.debug = debug
        self._crashed = False
        self.log = Log()
        self.memory = DramTier(arena_bytes)
        directory = TierDirectory("dram", Medium.DRAM, LRU())
        self.arena = Arena(self.memory, directory, [self.log], debug=debug)
        self.tiers = [
            disk.tier(f"tier{number}", medium)
            for number, (disk, medium) in enumerate(zip(self.disks, self.media, strict=True))
        ]
        self.lowers = [
            Lower(tier, TierDirectory(tier.name, tier.medium, LRU()), rule, [self.log])
            for tier, rule in zip(self.tiers, self.rules, strict=True)
        ]
        for tier in self.tiers:
            tier.started = self._started
        self.store = Store(self.arena, self.lowers)
        self.shelves = self.store.directory.shelves(NAMESPACE)
        self.holders: list[Holder] = []
        self.holder = self.hold()
        steps: list[int] = []
        self.memory.populate(steps.append)
        for step in steps:
            self.store.grow(step)

    @property
    def tier(self) -> ScriptedTier:
        """The first."""
        return self.tiers[0]

    @property
    def lower(self) -> Lower:
        """The first."""
        return self.lowers[0]

    async def __aenter__(self) -> Self:
        await self.store.movements.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._crashed:
            return
        if error is None:
            await quiet()
            assert self.check() == []
            for tier in self.tiers:
                tier.holding = set()
                tier.release()
            await quiet()
            assert self.check() == []
            assert await self.store.movements.stop()
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        self.memory.close()

    async def crash(self) -> "Stage":
        """Be killed now; what comes after it on the same disks. It is to be entered."""
        assert self.check() == []
        self._crashed = True
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()
        await quiet()
        self.store.holds.close()  # whose timers would go on
        self.close()
        for tier in self.tiers:
            tier.close()
        return Stage(self.disks, self.rules, media=self.media, arena_bytes=self.arena_bytes, debug=self.debug)

    def check(self) -> list[str]:
        """All that is wrong in the store, in the tiers' use, and in what was announced."""
        wrong = [*self.store.check(self.holders), *self.log.wrong]
        for directory in self.store.directory.tiers:
            readable = {b.identity: b for shelf in directory.shelves() for b in shelf.sealed.values()}
            if readable != self.log.readable.get(directory.name, {}):
                wrong.append(f"{directory.name}: what is readable is not what was announced")
        return wrong

    def _started(self, call: Call) -> None:
        self.log.lines += [(call.kind, call.tier.name, transfer.key) for transfer in call.transfers]

    # Clients.

    def hold(self, *, maps: bool = True, fraction: float = 1.0) -> Holder:
        """Another client."""
        limit = int(self.arena_bytes * fraction)
        holder = Holder(f"client {len(self.holders)}", limit, limit, maps=maps)
        self.holders.append(holder)
        return holder

    def reserve(self, keys: Sequence[bytes], length: int, parent: bytes | None = None) -> Grant:
        """Reserve without waiting."""
        return self.store.writers.reserve(
            self.holder, self.shelves, keys, [length] * len(keys), parent=parent
        )

    async def reserve_waiting(self, keys: Sequence[bytes], length: int, wait_s: float) -> Grant:
        """Reserve, and wait for room."""
        return await patience.reserve(
            self.store, self.holder, lambda: self.reserve(keys, length), length * len(keys), wait_s
        )

    def fill(self, grant: Grant, keys: Sequence[bytes], version: int = 0) -> None:
        """Write what was granted, and commit."""
        granted = [key for key, status in zip(keys, grant.status, strict=True) if status == ord("g")]
        for key, slot, block in zip(granted, grant.slots, grant.lease.open, strict=True):
            assert block is not None
            self.memory.view(slot)[: block.length] = content(key, block.length, version)
        if granted:
            self.store.writers.commit(self.holder, grant.lease.id)

    def put(
        self, *keys: bytes, length: int = 64 << 10, parent: bytes | None = None, version: int = 0
    ) -> None:
        """Have blocks committed, which are a chain."""
        grant = self.reserve(keys, length, parent)
        assert set(grant.status) <= {ord("g"), ord("p")}, grant.status
        self.fill(grant, keys, version)

    def acquire(self, *keys: bytes) -> ReadLease:
        """What is in the arena."""
        return self.store.readers.acquire(self.holder, self.shelves[0], keys)

    def acquiring(
        self, *keys: bytes, wait_s: float = 10.0, holder: Holder | None = None
    ) -> "asyncio.Task[ReadLease]":
        """An acquire that waits."""
        waiting = patience.acquire(self.store, holder or self.holder, self.shelves, keys, wait_s)
        return asyncio.ensure_future(waiting)

    def bytes_of(self, lease: ReadLease) -> list[bytes]:
        """What a reader sees."""
        return [bytes(self.memory.view(block.slot)[: block.length]) for block in lease.blocks]

    def release(self, lease: ReadLease) -> None:
        """End it, where it holds anything."""
        if lease.blocks:
            self.store.readers.release(self.holder, lease.id)

    async def remove(self, *keys: bytes) -> int:
        """Remove for good. Raises TierError."""
        count, lasting = self.store.remove(self.shelves, keys)
        if lasting is not None:
            await lasting
        return count

    async def evict(self, *keys: bytes) -> None:
        """Have blocks leave the arena, by filling it with others of their length."""
        for number in range(1000):
            here = [self.block(key).length for key in keys if self.in_arena(key)]
            if not here:
                return
            self.put(b"filler %d" % number, length=here[0])
            await quiet()
        raise AssertionError("they do not leave")

    def in_arena(self, key: bytes) -> bool:
        """Whether it is readable there."""
        return key in self.shelves[0].sealed

    def is_below(self, key: bytes, number: int = 0) -> bool:
        """Whether it is readable in a tier below."""
        return key in self.shelves[1 + number].sealed

    def block_state(self, key: bytes) -> State:
        """Of whatever has the key in the arena."""
        block = self.shelves[0].resident(key)
        return State.ABSENT if block is None else block.state

    def block(self, key: bytes) -> Block:
        """In the arena."""
        return self.shelves[0].sealed[key]


def shelves_of(stage: Stage, namespace: Namespace) -> Shelves:
    """A namespace's shelves."""
    return stage.store.directory.shelves(namespace)


def ended(task: "asyncio.Future[Any]") -> Any:
    """The result of a task, which must be done."""
    assert task.done(), "it still waits"
    with suppress(asyncio.CancelledError):
        return task.result()
    return None
