"""Batches that wait: how many, how much of them, and in what order they leave."""

from kvstore.index.held import Held


def test_what_is_held_leaves_by_its_number() -> None:
    held = Held()
    assert (held.first, held.pop(3), len(held)) == (None, None, 0)
    for seq in (5, 3, 5):
        assert held.add(seq, b"%d" % seq, 1.0 + seq)
    assert (held.first, held.since_s, len(held)) == (3, 6.0, 2)
    assert (held.pop(3), held.pop(5), held.pop(5)) == (b"3", b"5", None)
    assert held.add(9, b"", 20.0)
    assert held.since_s == 20.0


def test_no_more_is_held_than_one_turn_can_apply() -> None:
    held = Held()
    assert all(held.add(seq, b"", 0.0) for seq in range(256))
    assert not held.add(256, b"", 0.0)
    held = Held()
    for seq in range(2):
        assert held.add(seq, bytes(600 << 10), 0.0)
    assert held.full
    assert not held.add(2, b"", 0.0)
    held.pop(0)
    assert held.add(2, bytes(4 << 20), 0.0)  # one of any size
