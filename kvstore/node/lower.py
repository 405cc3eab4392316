"""One tier below the arena: its blocks, its space, its I/O, and whether it is trusted with more.

It decides nothing about which block goes where; that is for those who promote and demote.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from itertools import islice
from typing import Any, Final

from kvstore.block import Medium
from kvstore.errors import TierError
from kvstore.fitting import LineFit
from kvstore.node.accounts import Account
from kvstore.node.arena import Listener
from kvstore.node.blocks import Block, Shelf, State
from kvstore.node.breaker import Breaker
from kvstore.node.directory import TierDirectory
from kvstore.node.pace import Pace
from kvstore.node.room import Room
from kvstore.node.rules import Rules
from kvstore.statistics import Latencies, TierCounters
from tiers.base import Found, Slot, StorageTier

logger = logging.getLogger(__name__)

# Blocks entered into the directory before others have their turn: about 1 ms.
_TURN: Final = 256
# Bytes per second that a tier is believed to give until it has been measured.
_GUESSES: Final = {Medium.NVME: 1.5e9, Medium.REMOTE: 0.5e9}
# One line of the log at most in this time for damaged blocks.
_SILENCE_S: Final = 60.0
# A daemon that starts waits so long for what its disks hold, and then goes on without them.
_START_S: Final = 5.0


class Lower:
    """A storage tier with its directory. `unwritten` are blocks of the arena that it is still to get.

    The value there is whether the block is owed: kept in the arena until it has been written. Listeners may
    join `listeners` while no block is there yet.
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
        self._listeners = listeners
        # What readers are loading, or waiting to; how fast that goes.
        self.loading_bytes = 0
        self.pace = Pace(_GUESSES[tier.medium])
        self.line = LineFit()  # seconds until what was asked for at once was here, against its bytes
        self.recovered = False
        self._starting: asyncio.Future[None] | None = None
        # What was removed and the tier is still to be told of: (namespace id, key).
        self.graves: set[tuple[bytes, bytes]] = set()
        self.enabled = True
        self._reason = "what it holds is not known yet"
        self._log = logging.LoggerAdapter(logger, {"tier": tier.name})
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
        usable = self.room.limit_bytes
        return self.unwritten_bytes / usable, self.room.used_bytes / usable

    @property
    def backlog_blocks(self) -> int:
        """Blocks that the tier is still to get, or is getting now."""
        return len(self.unwritten) + self.writing_blocks

    @property
    def failing(self) -> str:
        """Why the tier is left alone; empty while it is not."""
        if not self.enabled:
            return "it is turned off"
        return self._reason if self.breaker.open else ""

    def turn(self, *, on: bool) -> None:
        """Leave the tier alone from now on, as if it failed, or look after it again."""
        if on != self.enabled:
            self.enabled = on
            self._reason = "it was turned off"
            self._log.warning("tier %s is turned %s", self.name, "on" if on else "off")
            if self.breaker.trip():
                self._on_breaker(self)

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

    def expected_s(self, length: int) -> float:
        """When a block of this length would be here, were it asked for now."""
        return self.pace.expected_s(self.loading_bytes + length)

    def readable(self, shelf: Shelf, key: bytes) -> Block | None:
        """The block, if it is here and the tier can be asked for it."""
        return None if self.breaker.open else shelf.sealed.get(key)

    def copy_of(self, block: Block) -> Block | None:
        """The block of the same content that can be read here, if there is one."""
        shelf = self.directory.known(block.shelf.namespace)
        return None if shelf is None else shelf.sealed.get(block.key)

    # I/O.

    async def attempt(
        self,
        operation: Coroutine[Any, Any, None],
        latencies: Latencies,
        late: Callable[[], None],
        *,
        nbytes: int = 0,
    ) -> bool:
        """Await a call of the tier to its very end, and keep the breaker informed. Whether it went well.

        `late` is called once if it takes longer than a call of `nbytes` may: whoever waits should wait no
        more, but memory and slots are the tier's until this returns.
        """
        in_time = True
        timeout_s = self.rules.timeout_s + nbytes / self.tier.slowest_bytes_per_s

        def on_late() -> None:
            nonlocal in_time
            in_time = False
            self.counters.late_calls += 1
            self.trip(f"no answer within {timeout_s:g} s")
            late()
            self.tier.interrupt()

        timer = asyncio.get_running_loop().call_later(timeout_s, on_late)
        started = time.monotonic()
        try:
            await operation
        except TierError as error:
            self._failed(str(error))
            return False
        except Exception:  # a mistake in a tier must not leave blocks on their way for ever
            logger.exception("tier %s: a call failed by a mistake", self.name, extra={"tier": self.name})
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
        """Recover what is there. A tier that cannot be opened now is left to who looks after it.

        Raises:
            ConfigError: the tier cannot be what it should be.
        """
        if not self.enabled:
            return
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
            self.breaker.probed(well=self.enabled)

    @property
    def starting(self) -> bool:
        """Whether `start` goes on."""
        return self._starting is not None and not self._starting.done()

    async def started(self) -> None:
        """Return once `start` is over, well or not."""
        if self._starting is not None:
            await asyncio.wait({self._starting})

    def probed(self, *, well: bool) -> None:
        """A look at the tier while it was left alone has ended."""
        if self.breaker.probed(well=well):
            self._log.warning("tier %s is back", self.name)
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
            stored = Found(transfer.length, transfer.checksum, transfer.record)
            block = self._add(shelf, transfer.key, stored, transfer.slot)
            if block.identity in self.graves:
                self._free(self.directory.abort(block), block)
                continue
            self.directory.seal([block])
            self.entered([block])
        self.counters.recovered_blocks += len(found)
        self.recovered = True
        if found:
            self._log.info("tier %s: %d blocks recovered", self.name, len(found))

    # Blocks.

    def take(self, length: int, account: Account) -> Slot | None:
        """A slot, made room for if need be; `settle` when done taking."""
        return self.room.take(length, account)

    def settle(self) -> None:
        """Announce and forget what left since `room.begin`."""
        evicted = self.room.evicted
        if evicted:
            self.tier.evict([block.record for block in evicted])
            self.announce_removed(evicted)
            self.evicted_stamp = evicted[-1].stamp
            self.counters.evicted_blocks += len(evicted)
            self.counters.evicted_bytes += sum([block.length for block in evicted])

    def enter(self, shelf: Shelf, key: bytes, found: Found) -> Block | None:
        """Know a block that somebody else has stored; None if it is known, removed, or there is no room.

        `settle` when done entering, and then say so by `entered`.
        """
        if shelf.resident(key) is not None or (shelf.namespace.id, key) in self.graves:
            return None
        slot = self.take(found.length, shelf.account)
        if slot is None:
            return None
        block = self._add(shelf, key, found, slot)
        self.directory.seal([block])
        return block

    def entered(self, blocks: Sequence[Block]) -> None:
        """These blocks can be read here from now on."""
        self.directory.requested(blocks)
        self.announce_sealed(blocks)

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
            self._log.warning(text, self.name, blocks[0])
        self.drop(blocks)
        self.counters.damaged_blocks += len(blocks)

    def missing(self, blocks: Sequence[Block]) -> None:
        """These blocks are here no more: another node, or the servers themselves, let go of them."""
        self.drop(blocks)
        self.counters.lost_blocks += len(blocks)

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
        self.graves.update(names)

    async def bury(self, names: Iterable[tuple[bytes, bytes]]) -> bool:
        """See to it that marked blocks never come back, with a restart either. False if not yet."""
        if self.breaker.open:
            return False
        names = list(names)
        flushed = asyncio.ensure_future(self._flush(names))
        done, _ = await asyncio.wait({flushed}, timeout=self.rules.timeout_s)
        if not done or not flushed.result():
            return False
        self.graves.difference_update(names)
        return True

    # Helpers.

    def _has_idle_thread(self) -> bool:
        return not self.breaker.open and self.reading + self.writing < self.rules.jobs

    def _add(self, shelf: Shelf, key: bytes, stored: Found, slot: Slot) -> Block:
        block = self.directory.add(shelf, key, stored.length, slot, State.RESERVED, None)
        slot.owner = block
        block.checksum, block.record = stored.checksum, stored.record
        return block

    async def _flush(self, names: Sequence[tuple[bytes, bytes]]) -> bool:
        self.calls += 1
        try:
            return await self.attempt(self.tier.flush(names), Latencies(), lambda: None)
        finally:
            self.calls -= 1

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

    def trip(self, reason: str) -> None:
        """The tier fails: leave it alone until it is back, and say why, once."""
        if self.breaker.trip():
            self._opened(reason)
        elif reason != self._reason:
            self._reason = reason
            self._log.warning("tier %s still fails: %s", self.name, reason)

    def _opened(self, reason: str) -> None:
        self._reason = reason
        self.counters.breaker_opened += 1
        self._log.warning("tier %s fails and is left alone until it is back: %s", self.name, reason)
        self._on_breaker(self)
