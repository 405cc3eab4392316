"""Whether blocks, slots and leases agree with each other. Each of them checks itself; this looks across."""

from collections.abc import Collection

from kvstore.node.directory import TierDirectory
from kvstore.node.lease import Holder
from kvstore.node.lower import Lower
from tiers.base import Slot, SlotTier


def audit(
    directory: TierDirectory, tier: SlotTier, holders: Collection[Holder], late_bytes: int
) -> list[str]:
    """What is wrong, a line each. `holders` are all there are; `late_bytes` are freed and held back."""
    wrong: list[str] = []
    slots: dict[int, Slot] = {}
    for block in directory.all_blocks():
        slot = block.slot
        if slot.owner is not block or slot.length < block.length:
            wrong.append(f"{block} and its slot {slot} do not belong together")
        if slots.setdefault(slot.offset, slot) is not slot:
            wrong.append(f"{block} shares its slot with another block")
    orphans = [slot for holder in holders for lease in holder.writes.values() for slot in lease.orphans]
    accounted = sum(slot.length for slot in (*slots.values(), *orphans)) + late_bytes
    used = tier.statistics().used_bytes
    if used != accounted:
        wrong.append(f"{used} bytes of slots are taken, {accounted} are accounted for")
    pins: dict[object, int] = {}
    for holder in holders:
        pinned = sum(lease.block_bytes for lease in holder.reads.values())
        if pinned != holder.pinned_bytes:
            wrong.append(f"{holder.name}: {holder.pinned_bytes} bytes pinned counted, {pinned} found")
        for lease in holder.reads.values():
            for block in lease.blocks:
                pins[block] = pins.get(block, 0) + 1
    wrong += [
        f"{block} is pinned by {pins.get(block, 0)} leases"
        for block in directory.all_blocks()
        if block.pins != pins.get(block, 0)
    ]
    return wrong


def audit_lower(lower: Lower) -> list[str]:
    """As `audit`, for a tier that no client maps."""
    blocks = lower.directory.all_blocks()
    wrong = [
        f"{block} and its slot do not belong together" for block in blocks if block.slot.owner is not block
    ]
    used, accounted = lower.tier.statistics().used_bytes, sum([block.slot.length for block in blocks])
    if used != accounted and lower.recovered:
        wrong.append(f"{lower.name}: {used} bytes of slots are taken, {accounted} are accounted for")
    if not lower.calls:
        wrong += [f"{block} is kept by nobody" for block in blocks if block.pins or block.copies]
    return wrong
