"""What each salt has in one tier, and how much it may have. It counts and orders; it evicts nothing.

A quota is a ceiling and no reservation: whoever is below it gives way to others as ever. Salts that have one
have their blocks in an order of their own beside the tier's, so that the coldest of them is found at once;
a tier without quotas has one order and pays for none.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import attrgetter
from typing import Any, Final
from weakref import WeakValueDictionary

from kvstore.node.policy import Entry, Policy

_ACCOUNT: Final[Callable[[Any], "Account"]] = attrgetter("shelf.account")


@dataclass(frozen=True, slots=True)
class Quotas:
    """Bytes that a salt may have, by the length of its blocks; None for no quota.

    `default` is for each salt that is not in `salt_to_bytes`.
    """

    default: int | None = None
    salt_to_bytes: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def limited(self) -> bool:
        """Whether any salt has one."""
        return self.default is not None or any(n is not None for n in self.salt_to_bytes.values())

    def of(self, salt: str) -> int | None:
        """One salt's."""
        return self.salt_to_bytes.get(salt, self.default)

    def share(self, part: float) -> "Quotas":
        """The quotas in a tier that is this part of its medium."""

        def shared(nbytes: int | None) -> int | None:
            return None if nbytes is None else int(nbytes * part)

        return Quotas(shared(self.default), {s: shared(n) for s, n in self.salt_to_bytes.items()})


class Account:
    """One salt in one tier. Lives as long as a shelf of the salt, so that salts not used are forgotten.

    `blocks` and `block_bytes` are of all that have a slot: being written or loaded, readable, or doomed.
    Hits and misses are those of readers, counted in the arena. With a quota, `order` has its readable blocks,
    `wanted_bytes` is what found no room below it, and `leaving_bytes` what is being demoted.
    """

    __slots__ = (
        "__weakref__",
        "block_bytes",
        "blocks",
        "hit_blocks",
        "leaving_bytes",
        "missed_blocks",
        "order",
        "quota_bytes",
        "salt",
        "wanted_bytes",
    )

    def __init__(self, salt: str) -> None:
        self.salt = salt
        self.blocks = self.block_bytes = 0
        self.hit_blocks = self.missed_blocks = 0
        self.quota_bytes: int | None = None
        self.order: Policy | None = None
        self.wanted_bytes = self.leaving_bytes = 0

    def excess_bytes(self, more_bytes: int = 0) -> int:
        """By how much it would be above its quota with so many bytes more; 0 when it would not."""
        return 0 if self.quota_bytes is None else max(0, self.block_bytes + more_bytes - self.quota_bytes)

    def ordered(self, kind: Callable[[], Policy]) -> Policy:
        """Its order, made of this kind if need be."""
        if self.order is None:
            self.order = kind()
        return self.order

    def is_over(self, spare_bytes: int) -> bool:
        """Whether it has or wants more than its quota, without what is leaving and so many bytes."""
        return self.excess_bytes(self.wanted_bytes) > self.leaving_bytes + spare_bytes


class Together:
    """What one request wants of salts' quotas at a time, beside these blocks that it has."""

    def __init__(self, blocks: Iterable[Any]) -> None:
        self._wanted: dict[Account, int] = {}
        for block in blocks:
            self.fits(_ACCOUNT(block), block.length)

    def fits(self, account: Account, length: int) -> bool:
        """Whether its salt may have so many bytes more, all that was asked for before included."""
        if account.quota_bytes is None:
            return True
        wanted = self._wanted[account] = self._wanted.get(account, 0) + length
        return wanted <= account.quota_bytes


class Accounts:
    """The accounts of one tier. `over` are those above their quota, or that found no room below it."""

    def __init__(self, policy: Policy) -> None:
        self._plain = policy
        self._accounts: WeakValueDictionary[str, Account] = WeakValueDictionary()
        self._quotas = Quotas()
        self.over: dict[Account, None] = {}
        # Readable blocks, coldest first, of salts that had no order before, which are still to enter it.
        self._entering: Iterator[Any] = iter(())
        self._fresh: set[Account] = set()

    def of(self, salt: str) -> Account:
        """The salt's account, made if need be."""
        account = self._accounts.get(salt)
        if account is None:
            account = self._accounts[salt] = Account(salt)
            self._set_quota(account)
        return account

    def known(self, salt: str) -> Account | None:
        """The salt's account, if it is in use."""
        return self._accounts.get(salt)

    def all(self) -> list[Account]:
        """All accounts in use."""
        return list(self._accounts.values())

    def set_quotas(self, quotas: Quotas) -> Policy:
        """Have these quotas from now on. The policy that the tier is to use."""
        self._quotas = quotas
        for account in self.all():
            self._set_quota(account)
        # A copy, at 20 ns a block: the order changes before all of it has been entered, in turns.
        self._entering = iter(list(self._plain.coldest()) if self._fresh else ())
        return BySalt(self._plain) if quotas.limited else self._plain

    def set_policy(self, kind: Callable[[], Policy]) -> Policy:
        """Order by this kind of policy from now on, each salt's too. The policy that the tier is to use."""
        if type(self._plain) is not kind:
            self._plain = _heir(kind, self._plain)
            for account in self.all():
                if account.order is not None:
                    account.order = _heir(kind, account.order)
        return BySalt(self._plain) if self._quotas.limited else self._plain

    def enter(self, blocks_max: int) -> None:
        """Put so many blocks more, coldest first, into the orders that are not complete."""
        if not self._fresh:
            return
        turn = list(islice(self._entering, blocks_max))
        for block in turn:
            account = _ACCOUNT(block)
            if account in self._fresh and block.readable:
                account.ordered(type(self._plain)).requested([block])
        if len(turn) < blocks_max:
            self._fresh.clear()

    def check(self, readable: Sequence[Any], slots: Sequence[Any]) -> list[str]:
        """Recount: `readable` are all readable blocks of the tier, `slots` all that have a slot."""
        found: dict[Account, list[int]] = {account: [0, 0, 0] for account in self.all()}
        for block in slots:
            counts = found.setdefault(_ACCOUNT(block), [0, 0, 0])
            counts[0] += 1
            counts[1] += block.length
        for block in readable:
            found[_ACCOUNT(block)][2] += 1
        wrong = []
        for account, (blocks, nbytes, ordered) in found.items():
            name = f"salt {account.salt[:20]!r}"
            if (account.blocks, account.block_bytes) != (blocks, nbytes):
                counted = f"{account.blocks} blocks of {account.block_bytes} bytes counted"
                wrong.append(f"{name}: {counted}, {blocks} of {nbytes} found")
            in_order = len(account.order or ())
            if account.quota_bytes is not None and account not in self._fresh and in_order != ordered:
                wrong.append(f"{name}: {in_order} in its order, {ordered} readable")
            if account.excess_bytes() and account not in self.over:
                wrong.append(f"{name}: {account.excess_bytes()} bytes above its quota, and nobody knows")
        return wrong

    def _set_quota(self, account: Account) -> None:
        account.quota_bytes = self._quotas.of(account.salt)
        account.wanted_bytes = 0
        if account.quota_bytes is None:
            account.order = None
            self._fresh.discard(account)
            self.over.pop(account, None)
            return
        if account.order is None and account.blocks:
            self._fresh.add(account)
        if account.excess_bytes():
            self.over[account] = None


def _heir(kind: Callable[[], Policy], previous: Policy) -> Policy:
    policy = kind()
    policy.inherit(previous)
    return policy


class BySalt:
    """A tier's policy, which also keeps the orders of those salts that have one of their own."""

    def __init__(self, policy: Policy) -> None:
        self._all = policy
        self.victims = policy.victims
        self.coldest = policy.coldest

    def requested(self, prefix: Sequence[Entry]) -> None:
        self._all.requested(prefix)
        # Tail first, as the orders have it: of salts that alternate, too, tails are to leave before heads.
        for account, run in groupby(reversed(prefix), _ACCOUNT):
            if account.quota_bytes is not None:
                account.ordered(type(self._all)).requested(list(run)[::-1])

    def freed(self, blocks: Sequence[Entry]) -> None:
        self._all.freed(blocks)
        for account, run in groupby(blocks, _ACCOUNT):
            if account.order is not None:
                account.order.freed(list(run))

    def left(self, block: Entry, *, evicted: bool) -> None:
        self._all.left(block, evicted=evicted)
        order = _ACCOUNT(block).order
        if order is not None:
            order.left(block, evicted=evicted)

    def inherit(self, other: Any) -> None:
        raise NotImplementedError("the tier's own policy inherits, and each salt's")

    def __len__(self) -> int:
        return len(self._all)
