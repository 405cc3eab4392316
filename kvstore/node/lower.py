"""One tier below the arena: its blocks, its space, its I/O, and whether it is trusted with more.

It decides nothing about which block goes where; that is for those who promote and demote.
"""

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from itertools import islice
from typing import Any, Final, TypeVar

from kvstore.errors import ConfigError, TierError
from kvstore.node.arena import Listener
from kvstore.node.aside import as_transfer, read_aside
from kvstore.node.blocks import Block, Shelf, State
from kvstore.node.breaker import Breaker
from kvstore.node.directory import TierDirectory
from kvstore.node.room import Room
from kvstore.node.rules import Rules
from kvstore.statistics import Latencies, TierCounters
from tiers.base import Slot, StorageTier

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Blocks entered into the directory before others have their turn: about 1 ms.
_TURN: Final = 256
# One line of the log at most in this time for damaged blocks.
_SILENCE_S: Final = 60.0
# A daemon that starts waits so long for what its disks hold, and then goes on without them.
_START_S: Final = 5.0


class Lower:
    """A storage tier with its directory. `unwritten` are blocks of the arena that it is still to get.

    The value there is whether the block is owed: kept in the arena until it has been written.
    """

    def __init__(
        self, tier: StorageTier, directory: TierDirectory, rules: Rules, listeners: Sequence[Listener]
    ) -> None:
        self.tier = tier
        self.directory = directory
        self.rules = rules
        self.room = Room(tier, directory)
        self.breaker = Breaker()
        self.breaker.trip()  # until recovered
        self.breaker.opened = 0
        self.unwritten: OrderedDict[Block, bool] = OrderedDict()
        self.unwritten_bytes = 0
        self.counters = TierCounters()
        self.reads, self.writes = Latencies(), Latencies()
        self.reading = self.writing = 0  # calls under way
        self.queued_reads = 0
        self.writing_blocks = self.writing_bytes = 0
        self.calls = 0  # under way or about to be, late ones included; kept by those who make them
        self.evicted_stamp = 0  # of the block that left last
        self._listeners = tuple(listeners)
        self.recovered = False
        self._starting: asyncio.Future[None] | None = None
        # What was removed while the tier could not be told: (namespace id, key).
        self._graves: set[tuple[bytes, bytes]] = set()
        self._reason = ""
        self._silent_until = 0.0
        self._on_breaker: Callable[[Lower], None] = lambda _: None
        self._on_end: Callable[[Lower], None] = lambda _: None

    def watch_calls(
        self, *, on_breaker: Callable[["Lower"], None], on_end: Callable[["Lower"], None]
    ) -> None:
        """Be told whenever the breaker has opened or closed, and whenever a call has ended."""
        self._on_breaker = on_breaker
        self._on_end = on_end

    @property
    def name(self) -> str:
        """The tier's."""
        return self.tier.name

    @property
    def load(self) -> tuple[float, float]:
        """How busy and how full the tier is, to be compared with others'."""
        capacity = self.tier.capacity_bytes
        return self.unwritten_bytes / capacity, 1 - self.tier.free_bytes / capacity

    def call_ended(self) -> None:
        """A thread is idle again."""
        self._on_end(self)

    # No more calls at once than the tier has threads: what waits for one would count as late. Where both
    # wait, writers have one of them and readers the rest.

    def may_read(self) -> bool:
        """Whether another call that reads may begin now."""
        others = 1 if self.unwritten and not self.rules.on_eviction else self.writing
        return self._has_idle_thread() and self.reading < max(1, self.rules.jobs - min(1, others))

    def may_write(self) -> bool:
        """Whether another call that writes may begin now."""
        most = 1 if self.queued_reads else max(1, self.rules.jobs - 1)
        return self._has_idle_thread() and self.writing < most

    def readable(self, shelf: Shelf, key: bytes) -> Block | None:
        """The block, if it is here and the tier can be asked for it."""
        return None if self.breaker.open else shelf.sealed.get(key)

    def copy_of(self, block: Block) -> Block | None:
        """The block of the same content that can be read here, if there is one."""
        shelf = self.directory.known(block.shelf.namespace)
        return None if shelf is None else shelf.sealed.get(block.key)

    # I/O.

    async def attempt(
        self, operation: Coroutine[Any, Any, None], latencies: Latencies, late: Callable[[], None]
    ) -> bool:
        """Await a call of the tier to its very end, and keep the breaker informed. Whether it went well.

        `late` is called once if it takes longer than it may: whoever waits should wait no more, but memory
        and slots are the tier's until this returns.
        """
        in_time = True

        def on_late() -> None:
            nonlocal in_time
            in_time = False
            self.counters.late_calls += 1
            self._trip(f"no answer within {self.rules.timeout_s} s")
            late()

        timer = asyncio.get_running_loop().call_later(self.rules.timeout_s, on_late)
        started = time.monotonic()
        try:
            await operation
        except TierError as error:
            self._failed(str(error))
            return False
        except Exception:  # a mistake in a tier must not leave blocks on their way for ever
            logger.exception("tier %s: a call failed by a mistake", self.name)
            self._failed("a mistake; the log says which")
            return False
        else:
            if in_time:
                self.breaker.succeeded()
            latencies.observe(time.monotonic() - started)
            return True
        finally:
            timer.cancel()

    async def start(self) -> None:
        """Recover what is there. A tier that cannot be opened now is looked after by `watch`.

        Raises:
            ConfigError: the tier cannot be what it should be.
        """
        self._starting = asyncio.ensure_future(self.recover())
        try:
            done, _ = await asyncio.wait({self._starting}, timeout=_START_S)
            if not done:
                self._opened(f"it is not open after {_START_S} s")
                return
            await self._starting
        except TierError as error:
            self._opened(str(error))
        else:
            self.breaker.probed(well=True)

    async def watch(self) -> None:
        """Look after the tier, for as long as it is there: open the breaker, and close it."""
        if self._starting is not None:
            await asyncio.wait({self._starting})
        while True:
            await asyncio.sleep(self.breaker.pause_s(random.random()))
            before = self.breaker.open
            # Late calls must be over before it is trusted again.
            well = False if before and self.calls else await self._looked_after()
            if before and self.breaker.probed(well=well):
                logger.warning("tier %s is back", self.name)
                self._on_breaker(self)

    async def recover(self) -> None:
        """Open the tier and enter what it holds.

        Raises:
            ConfigError: the tier cannot be what it should be.
            TierError: not now.
        """
        self.recovered = False
        await self._forget_all()
        found = await self.tier.recover()
        for index, transfer in enumerate(found):
            if index % _TURN == 0:
                await asyncio.sleep(0)
            shelf = self.directory.shelf(transfer.namespace)
            block = self.directory.add(
                shelf, transfer.key, transfer.length, transfer.slot, State.RESERVED, None
            )
            transfer.slot.owner = block
            block.checksum, block.record = transfer.checksum, transfer.record
            if block.identity in self._graves:
                self._free(self.directory.abort(block), block)
                continue
            self.directory.seal([block])
            self.directory.requested([block])
            self.announce_sealed([block])
        self.counters.recovered_blocks += len(found)
        self.recovered = True
        if found:
            logger.info("tier %s: %d blocks recovered", self.name, len(found))

    # Blocks.

    def take(self, length: int) -> Slot | None:
        """A slot, made room for if need be; `settle` when done taking."""
        return self.room.take(length)

    def settle(self) -> None:
        """Announce and forget what left since `room.begin`."""
        evicted = self.room.evicted
        if evicted:
            self.tier.forget([block.record for block in evicted])
            self.announce_removed(evicted)
            self.evicted_stamp = evicted[-1].stamp
            self.counters.evicted_blocks += len(evicted)
            self.counters.evicted_bytes += sum([block.length for block in evicted])

    def drop(self, blocks: Iterable[Block]) -> None:
        """Take readable blocks out, for good once the tier has flushed. Pinned ones keep their slots."""
        gone = list(blocks)
        for block in gone:
            free, slot = self.directory.remove(block)
            self.tier.forget([block.record])
            if free:
                self.room.free(slot)
        self.announce_removed(gone)

    def damaged(self, blocks: Sequence[Block]) -> None:
        """These blocks are not what was written: drop them, and say so now and then."""
        if blocks and time.monotonic() >= self._silent_until:
            self._silent_until = time.monotonic() + _SILENCE_S
            text = "tier %s: a block is damaged and dropped, %s; the count of others is in damaged_blocks"
            logger.warning(text, self.name, blocks[0])
        self.drop(blocks)
        self.counters.damaged_blocks += len(blocks)

    def unpin(self, blocks: Sequence[Block]) -> None:
        """End reading these blocks."""
        for slot in self.directory.unpin(blocks):
            self.room.free(slot)

    def announce_sealed(self, blocks: Sequence[Block]) -> None:
        """Tell the listeners."""
        for listener in self._listeners:
            listener.sealed(self.name, blocks, None)

    def announce_removed(self, blocks: Sequence[Block]) -> None:
        """Tell the listeners."""
        for listener in self._listeners:
            listener.removed(self.name, blocks)

    def mark(self, names: Iterable[tuple[bytes, bytes]]) -> None:
        """These blocks (namespace id, key) were removed: should they be found here, they are not to be."""
        self._graves.update(names)

    async def bury(self, names: Iterable[tuple[bytes, bytes]]) -> bool:
        """See to it that marked blocks never come back, with a restart either. False if not yet."""
        if self.breaker.open:
            return False
        flushed = asyncio.ensure_future(self._flush())
        done, _ = await asyncio.wait({flushed}, timeout=self.rules.timeout_s)
        if not done or not flushed.result():
            return False
        self._graves.difference_update(names)
        return True

    # Helpers.

    def _has_idle_thread(self) -> bool:
        return not self.breaker.open and self.reading + self.writing < self.rules.jobs

    async def _flush(self) -> bool:
        self.calls += 1
        try:
            return await self.attempt(self.tier.flush(), Latencies(), lambda: None)
        finally:
            self.calls -= 1

    async def _looked_after(self) -> bool:
        try:
            if self.recovered:
                same = await self._in_time(self.tier.same())
                if same and self.breaker.open:
                    await self._in_time(self._probe())
                if not same:
                    self.recovered = False
                    self._trip("its files are gone or not the same")
            if not self.recovered:
                if self.calls:
                    return False
                await self.recover()
            if self._graves:
                buried = set(self._graves)
                await self._in_time(self.tier.flush())
                self._graves -= buried
        except TimeoutError:
            self._trip(f"no answer within {self.rules.timeout_s} s")
            return False
        except (TierError, ConfigError) as error:
            self._trip(str(error))
            return False
        except Exception:  # whatever it was, somebody must go on looking after the tier
            logger.exception("tier %s: looking after it failed by a mistake", self.name)
            self._trip("a mistake; the log says which")
            return False
        return True

    async def _probe(self) -> None:
        """Write a little and read a block, if there is one: a disk may do the one and not the other."""
        await self.tier.probe()
        stored = next((block for shelf in self.directory.shelves() for block in shelf.sealed.values()), None)
        if stored is not None:
            self.directory.pin([stored])
            try:
                await read_aside(self.tier, [as_transfer(stored)])
            finally:
                self.unpin([stored])

    async def _in_time(self, operation: Coroutine[Any, Any, T]) -> T:
        """Await a call of the tier for as long as it may take.

        Raises:
            TimeoutError: it takes longer, and goes on by itself.
        """
        self.calls += 1
        task = asyncio.ensure_future(operation)
        task.add_done_callback(self._over)
        done, _ = await asyncio.wait({task}, timeout=self.rules.timeout_s)
        if not done:
            raise TimeoutError
        return task.result()

    def _over(self, task: "asyncio.Future[Any]") -> None:
        self.calls -= 1
        if not task.cancelled():
            task.exception()  # whoever waited has it; if nobody did, the breaker is open already

    async def _forget_all(self) -> None:
        """Take every block out of the directory: the files that they were in are not there any more."""
        blocks = [block for shelf in self.directory.shelves() for block in shelf.sealed.values()]
        for start in range(0, len(blocks), _TURN):
            turn = list(islice(blocks, start, start + _TURN))
            gone = [block for block in turn if block.state is State.SEALED]
            for block in gone:
                self.directory.remove(block)
            self.announce_removed(gone)
            await asyncio.sleep(0)

    def _free(self, slot: Slot, block: Block) -> None:
        self.tier.forget([block.record])
        self.room.free(slot)

    def _failed(self, reason: str) -> None:
        self.counters.failed_calls += 1
        if self.breaker.failed():
            self._opened(reason)

    def _trip(self, reason: str) -> None:
        if self.breaker.trip():
            self._opened(reason)
        elif reason != self._reason:
            self._reason = reason
            logger.warning("tier %s still fails: %s", self.name, reason)

    def _opened(self, reason: str) -> None:
        self._reason = reason
        self.counters.breaker_opened += 1
        logger.warning("tier %s fails and is left alone until it is back: %s", self.name, reason)
        self._on_breaker(self)
