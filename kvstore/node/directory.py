"""The directory: which blocks a node has, in which tiers, in which state, pinned how often.

Pure: it does no I/O, moves no bytes, reads no clock and knows no client. Every method is synchronous and
leaves the directory whole. The life of a block in one tier:

    absent -> reserved -> sealed -> absent               what clients write
    absent -> loading  -> sealed                         what is promoted from below
    sealed -> demoting -> absent                         what makes room, its bytes copied below first
    sealed -> doomed   -> absent                         what is removed while pinned

A slot belongs to its block until the block is absent; only then does a method hand it back, and only then
may it be reused. Readers see `sealed` and `demoting`, nothing else. What the node itself reads from a slot
or into it, to move a block between tiers, is a copy: like a pin it keeps the slot, unlike a pin it does not
end a demotion. A load that is given up while its copy goes on is doomed as well.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any
from weakref import WeakValueDictionary

from kvstore.block import HitLength, Medium, Namespace
from kvstore.errors import InvalidRequest
from kvstore.node.accounts import Accounts, Quotas
from kvstore.node.blocks import Block, Shelf, State
from kvstore.node.policy import Policy


@dataclass(frozen=True, slots=True)
class DirectoryStatistics:
    """Counts and bytes of one tier, by the length of blocks (slots may be a little longer)."""

    blocks: int
    block_bytes: int
    pending_blocks: int
    pinned_blocks: int
    pinned_bytes: int
    doomed_blocks: int


class TierDirectory:
    """The blocks of one tier, and the policy that orders them."""

    def __init__(self, name: str, medium: Medium, policy: Policy) -> None:
        self.name = name
        self.medium = medium
        self.policy = policy
        self.accounts = Accounts(policy)
        self._shelves: WeakValueDictionary[bytes, Shelf] = WeakValueDictionary()
        self.generation = 0
        self.requests = 0
        self._sealed = self._sealed_bytes = 0
        self._pending = 0
        self._pinned = self._pinned_bytes = 0
        self._doomed: set[Block] = set()

    def shelf(self, namespace: Namespace) -> Shelf:
        """The namespace's shelf, made if need be.

        Raises:
            InvalidRequest: another namespace with the same id is here (compared in full).
        """
        self.compare(namespace.id, namespace)
        shelf = self._shelves.get(namespace.id)
        if shelf is None:
            shelf = self._shelves[namespace.id] = Shelf(self, namespace)
        return shelf

    def known(self, namespace: Namespace) -> Shelf | None:
        """The namespace's shelf, if it is in use."""
        return self._shelves.get(namespace.id)

    def compare(self, namespace_id: bytes, namespace: Namespace) -> None:
        """Raise InvalidRequest if another namespace than this one has that id here; all fields count."""
        shelf = self._shelves.get(namespace_id)
        if shelf is not None and shelf.namespace != namespace:
            raise InvalidRequest(
                f"namespace id {namespace_id.hex()} stands for {shelf.namespace!r} here, and not for "
                f"{namespace!r}; a salt makes the two differ"
            )

    def shelves(self) -> list[Shelf]:
        """All shelves in use."""
        return list(self._shelves.values())

    def shelves_in_use(self) -> list[Callable[[], Shelf | None]]:
        """The same to be looked up one by one, None where it is no more: 100,000 take 1 ms."""
        return list(self._shelves.valuerefs())

    def some_shelves(self, most: int) -> list[Shelf]:
        """So many of them, those that are longest in use."""
        return list(islice(self._shelves.values(), most))

    def set_quotas(self, quotas: Quotas) -> None:
        """Have these quotas from now on. What is beyond them leaves by `Room.shed`."""
        self.policy = self.accounts.set_quotas(quotas)

    def set_policy(self, kind: Callable[[], Policy]) -> None:
        """Order blocks by a policy of this kind from now on; it begins with the order of the present one."""
        self.policy = self.accounts.set_policy(kind)

    # What writers and loads do: absent -> reserved | loading -> sealed | absent.

    def add(
        self, shelf: Shelf, key: bytes, length: int, slot: Any, state: State, parent: Block | None
    ) -> Block:
        """Enter an absent block as reserved or loading. `parent` is the resident block it continues."""
        block = Block(shelf, key, length, slot, state)
        block.generation = self._next_generation()
        shelf.pending[key] = block
        self._pending += 1
        account = shelf.account
        account.blocks += 1
        account.block_bytes += length
        if account.quota_bytes is not None and account.block_bytes > account.quota_bytes:
            self.accounts.over[account] = None  # what was found when the tier was recovered
        if parent is not None and parent.state is not State.ABSENT:
            block.parent = parent
            parent.children += 1
        return block

    def seal(self, blocks: Iterable[Block]) -> None:
        """Make reserved or loading blocks readable."""
        for block in blocks:
            del block.shelf.pending[block.key]
            block.shelf.sealed[block.key] = block
            block.state = State.SEALED
            block.place = block.generation = self._next_generation()
            self._pending -= 1
            self._sealed += 1
            self._sealed_bytes += block.length
            block.shelf.sealed_bytes += block.length

    def finish(self, block: Block, generation: int) -> bool:
        """Seal a loading block, unless it is no longer what it was when the load began."""
        if block.state is not State.LOADING or block.generation != generation:
            return False
        self.seal([block])
        return True

    def abort(self, block: Block) -> Any:
        """Drop a reserved or loading block and hand back its slot, which nobody may be writing."""
        del block.shelf.pending[block.key]
        self._pending -= 1
        return self._absent(block)

    # What the node's own I/O does.

    def hold(self, blocks: Iterable[Block]) -> None:
        """Begin copies from or to these blocks' slots: each keeps its slot until let go."""
        for block in blocks:
            block.copies += 1

    def let_go(self, block: Block) -> Any:
        """End one copy. The slot, if the block was doomed and this was all that kept it, else None."""
        block.copies -= 1
        if block.copies == 0:
            if block.state is State.DOOMED and block.pins == 0:
                self._doomed.remove(block)
                return self._absent(block)
            self.policy.freed([block])
        return None

    def give_up(self, block: Block) -> None:
        """Nobody waits for this reserved or loading block any more; its copy goes on and keeps the slot."""
        del block.shelf.pending[block.key]
        self._pending -= 1
        block.state = State.DOOMED
        block.generation = self._next_generation()
        self._doomed.add(block)
        self._unlink(block)

    # What readers do.

    def pin(self, blocks: Sequence[Block]) -> None:
        """Keep these readable blocks where they are until unpinned; this also ends their demotion."""
        first = first_bytes = 0
        for block in blocks:
            pins = block.pins
            if pins == 0:
                first += 1
                first_bytes += block.length
                if block.state is State.DEMOTING:
                    self.resume(block)
            block.pins = pins + 1
        self._pinned += first
        self._pinned_bytes += first_bytes

    def unpin(self, blocks: Sequence[Block]) -> list[Any]:
        """Undo one `pin` of each block. The slots of blocks that were doomed are handed back."""
        slots = []
        last = last_bytes = 0
        for block in blocks:
            pins = block.pins = block.pins - 1
            if pins == 0:
                last += 1
                last_bytes += block.length
                if block.state is State.DOOMED and block.copies == 0:
                    self._doomed.remove(block)
                    slots.append(self._absent(block))
        self._pinned -= last
        self._pinned_bytes -= last_bytes
        self.policy.freed(blocks)
        return slots

    def requested(self, prefix: Sequence[Block]) -> None:
        """One request stored or hit these readable blocks, head first."""
        self.requests = stamp = self.requests + 1
        for block in prefix:
            block.stamp = stamp
        self.policy.requested(prefix)

    # What makes room: sealed -> absent at once, or through demoting.

    def evict(self, block: Block) -> Any:
        """Drop a readable block that is not pinned, and hand back its slot."""
        self._hide(block)
        self.policy.left(block, evicted=True)
        return self._absent(block)

    def demote(self, block: Block) -> int:
        """Begin to move an evictable block down; the generation is for `finish_demotion`."""
        block.state = State.DEMOTING
        block.generation = self._next_generation()
        return block.generation

    def resume(self, block: Block) -> None:
        """End a demotion without effect here: the copy below stays, and so does this one."""
        block.state = State.SEALED
        block.generation = self._next_generation()
        self.policy.freed([block])

    def finish_demotion(self, block: Block, generation: int) -> tuple[bool, Any]:
        """Drop a block whose bytes are below now: (True, slot), or (False, None) if it moved on since."""
        if block.state is not State.DEMOTING or block.generation != generation:
            return False, None
        if block.children:  # a writer has continued the prefix meanwhile
            self.resume(block)
            return False, None
        return True, self.evict(block)

    def remove(self, block: Block) -> tuple[bool, Any]:
        """Hide a readable block for good: (True, slot), or (False, None) while pins or copies keep it."""
        self._hide(block)
        self.policy.left(block, evicted=False)
        if block.pins or block.copies:
            block.state = State.DOOMED
            self._doomed.add(block)
            self._unlink(block)
            return False, None
        return True, self._absent(block)

    def all_blocks(self) -> list[Block]:
        """Readable, pending and doomed ones."""
        on_shelves = [b for s in self.shelves() for b in (*s.sealed.values(), *s.pending.values())]
        return [*on_shelves, *self._doomed]

    def statistics(self) -> DirectoryStatistics:
        """What the tier holds now."""
        return DirectoryStatistics(
            self._sealed,
            self._sealed_bytes,
            self._pending,
            self._pinned,
            self._pinned_bytes,
            len(self._doomed),
        )

    def check(self) -> list[str]:
        """Recount everything; each line says what is wrong, and no line that all is well."""
        sealed = [b for s in self.shelves() for b in s.sealed.values()]
        pending = [b for s in self._shelves.values() for b in s.pending.values()]
        resident = {*sealed, *pending}
        children: dict[Block, int] = {}
        for block in resident:
            if block.parent is not None:
                children[block.parent] = children.get(block.parent, 0) + 1
        pinned = [b for b in (*sealed, *self._doomed) if b.pins]
        wrong = [
            (self._sealed != len(sealed), f"{self._sealed} sealed counted, {len(sealed)} found"),
            (self._sealed_bytes != sum(b.length for b in sealed), "bytes of sealed blocks do not add up"),
            *(
                (s.sealed_bytes != sum(b.length for b in s.sealed.values()), f"bytes of {s.namespace}")
                for s in self.shelves()
            ),
            (self._pending != len(pending), f"{self._pending} pending counted, {len(pending)} found"),
            (self._pinned != len(pinned), f"{self._pinned} pinned counted, {len(pinned)} found"),
            (self._pinned_bytes != sum(b.length for b in pinned), "bytes of pinned blocks do not add up"),
            (len(self.policy) != len(sealed), f"{len(self.policy)} in the policy, {len(sealed)} sealed"),
            *((b.pins < 0, f"{b} has negative pins") for b in resident),
            *((b.state not in (State.SEALED, State.DEMOTING), f"{b} is readable") for b in sealed),
            *((b.state not in (State.RESERVED, State.LOADING), f"{b} is pending") for b in pending),
            *((not (b.pins or b.copies), f"{b} is doomed and nobody keeps it") for b in self._doomed),
            *(
                (b.copies < 0 or b.owed < 0, f"{b} has negative copies or is owed less than 0")
                for b in resident
            ),
            *((b.children != children.get(b, 0), f"{b} has {b.children} children counted") for b in resident),
        ]
        salts = self.accounts.check(sealed, [*resident, *self._doomed])
        return [f"{self.name}: {text}" for text in (*[text for bad, text in wrong if bad], *salts)]

    def _hide(self, block: Block) -> None:
        del block.shelf.sealed[block.key]
        self._sealed -= 1
        self._sealed_bytes -= block.length
        block.shelf.sealed_bytes -= block.length

    def _absent(self, block: Block) -> Any:
        block.state = State.ABSENT
        self._unlink(block)
        account = block.shelf.account
        account.blocks -= 1
        account.block_bytes -= block.length
        slot, block.slot = block.slot, None
        return slot

    def _unlink(self, block: Block) -> None:
        parent, block.parent = block.parent, None
        if parent is not None:
            parent.children -= 1
            if parent.children == 0:
                self.policy.freed([parent])

    def _next_generation(self) -> int:
        self.generation += 1
        return self.generation


class Directory:
    """The tiers of a node, fastest first, and what they hold together."""

    def __init__(self, tiers: Sequence[TierDirectory]) -> None:
        self.tiers = tuple(tiers)

    def shelves(self, namespace: Namespace) -> tuple[Shelf, ...]:
        """The namespace's shelf in each tier, made if need be; raises as `TierDirectory.shelf` does."""
        return tuple([tier.shelf(namespace) for tier in self.tiers])

    def hit_length(self, shelves: Sequence[Shelf], keys: Sequence[bytes]) -> HitLength:
        """How many leading keys are here, cumulative per medium; `shelves` one per tier, fastest first."""
        reached = 0
        by_medium: dict[Medium, int] = {}
        for depth, tier in enumerate(self.tiers, start=1):
            # Tiers above hold everything before `reached`: go on from there with one more tier.
            within = shelves[:depth]
            if depth == 1:
                readable = within[0].sealed.__contains__
                everything = all(map(readable, keys))  # the usual case, and the fastest to tell
                reached = len(keys) if everything else len(list(takewhile(readable, keys)))
            else:
                while reached < len(keys) and any(keys[reached] in shelf.sealed for shelf in within):
                    reached += 1
            by_medium[tier.medium] = reached
        gpu = by_medium.get(Medium.GPU, 0)
        dram = max(gpu, by_medium.get(Medium.DRAM, 0))
        nvme = max(dram, by_medium.get(Medium.NVME, 0))
        return HitLength(gpu, dram, nvme, max(nvme, by_medium.get(Medium.REMOTE, 0)))

    def check(self) -> list[str]:
        """All that is wrong in any tier."""
        return [line for tier in self.tiers for line in tier.check()]
