"""Blocks whose engine's hash no router can reproduce: keys from tokens, and the way back from hashes."""

import itertools
import random
from collections.abc import Sequence
from typing import Any, Final

import pytest

from kvstore.block import Medium, Namespace
from kvstore.content_keys import content_keys
from kvstore.engine_hashes import MediaItem, sglang_page_hashes, vllm_block_hashes
from kvstore.engine_keys import engine_keys, vllm_scheme
from kvstore.index.engine_blocks import EngineBlocks
from kvstore.index.engine_source import EngineKind, EngineSource
from kvstore.index.events import AllBlocksCleared, Batch, BlockRemoved, BlockStored, Event, pack_tokens
from kvstore.index.locality import Engine, Locality
from kvstore.index.translation import Translation

SIZE: Final = 4
PROMPT: Final = random.Random(1).choices(range(100_000), k=4 * SIZE)
OWN: Final = Namespace("m", SIZE, scheme="tokens")
ENGINES: Final = Namespace("m", SIZE, scheme="vllm-x")


class Bench:
    """An engine's blocks, by the engine's hashes or (`scheme` "tokens") by their tokens."""

    def __init__(self, scheme: str = "tokens", blocks_max: int = 1000) -> None:
        self.locality = Locality(blocks_max=blocks_max)
        holding = self.locality.open("e")
        self.locality.show(holding)
        source = EngineSource("e", EngineKind.VLLM, "m", SIZE, scheme, "tcp://e")
        self.blocks = EngineBlocks(source, holding)

    def apply(self, *events: Event) -> None:
        self.blocks.apply(Batch(1.0, events))

    def hits(self, keys: Sequence[int], space: Namespace = OWN) -> tuple[int, int]:
        """Leading blocks in gpu, and in gpu or dram."""
        (found,) = self.locality.find({space: keys}, [Engine("e")])
        return found.gpu // space.block_tokens, found.dram // space.block_tokens


def stored(hashes: list[Any], parent: Any = None, first: int = 0, **rest: Any) -> BlockStored:
    """Blocks of PROMPT from the `first` on."""
    tokens = PROMPT[first * SIZE : (first + len(hashes)) * SIZE]
    fields = {"medium": "GPU", **rest}
    return BlockStored(hashes, parent, pack_tokens(tokens), SIZE, **fields)


def placeholder(hashes: list[Any], medium: str = "CPU") -> BlockStored:
    return BlockStored(hashes, None, pack_tokens([]), 0, medium=medium)


KEYS: Final = content_keys(PROMPT, SIZE)


def test_keys_follow_from_the_tokens_and_what_precedes_them() -> None:
    bench = Bench()
    bench.apply(stored([11, 12]), stored([13], 12, 2), stored([-14, b"x" * 32], 13, 3))
    assert bench.hits(KEYS) == (3, 3)
    assert bench.blocks.ignored == {"malformed": 1}  # two blocks, tokens of one
    bench.apply(stored([14], 13, 3))
    assert bench.hits(KEYS) == (4, 4)


def test_an_event_without_tokens_finds_the_block_by_its_hash() -> None:
    bench = Bench()
    bench.apply(stored([11, 12]), placeholder([12]), placeholder([99]))
    assert bench.blocks.orphans == 1
    bench.apply(BlockRemoved([11, 12], "GPU"))
    assert bench.hits(KEYS[1:]) == (0, 1)
    bench.apply(BlockRemoved([12], "CPU"))
    assert bench.hits(KEYS[1:]) == (0, 0)
    bench.apply(placeholder([11, 12], "GPU"))  # remembered, though it was gone everywhere
    assert bench.hits(KEYS) == (2, 2)


def test_a_block_that_follows_an_unknown_one_is_counted_and_begins_no_prompt() -> None:
    bench = Bench()
    bench.apply(stored([12], 11))
    assert (bench.blocks.orphans, bench.blocks.holding.blocks) == (1, 0)
    assert bench.hits(KEYS) == (0, 0)


def test_a_block_may_follow_one_of_which_a_copy_was_removed() -> None:
    bench = Bench()
    bench.apply(stored([11]), stored([11]), BlockRemoved([11], "GPU"), stored([12], 11, 1))
    assert bench.hits(KEYS[1:]) == (1, 1)


@pytest.mark.parametrize(
    ("event", "prompt"),
    [
        ({"lora_name": "a", "extra_keys": [("a",), ("a",)]}, {"lora": "a"}),
        ({"lora_name": "a"}, {"lora": "a"}),
        ({"extra_keys": [("s",), None]}, {"salt": "s"}),
        ({"cache_salt": "s"}, {"salt": "s"}),
        ({"lora_name": "a", "extra_keys": [("a", "s"), ("a",)]}, {"lora": "a", "salt": "s"}),
        (
            {"extra_keys": [(("image", 1),), (("image", -3),)]},
            {"media": [MediaItem("image", 1, SIZE)]},
        ),
    ],
)
def test_lora_salt_and_media_are_part_of_the_key(event: dict[str, Any], prompt: dict[str, Any]) -> None:
    bench = Bench()
    bench.apply(stored([11, 12], **event))
    assert bench.hits(content_keys(PROMPT, SIZE, **prompt)) == (2, 2)
    assert bench.hits(KEYS) == (0, 0)
    others = ({"lora": "b"}, {"salt": "t"}, {"media": [MediaItem("other", 1, SIZE)]})
    for other in others:
        assert bench.hits(content_keys(PROMPT, SIZE, **other)) == (0, 0)  # type: ignore[arg-type]


def test_unsalted_blocks_answer_no_salted_prompt() -> None:
    bench = Bench()
    bench.apply(stored([11, 12]))
    assert bench.hits(content_keys(PROMPT, SIZE, salt="s")) == (0, 0)


def test_blocks_of_an_adapter_have_keys_of_our_own_whatever_the_scheme() -> None:
    bench = Bench("vllm-x")
    bench.apply(stored([1, 2]), stored([11, 12], lora_name="a"), placeholder([12]))
    keys = content_keys(PROMPT, SIZE, lora="a")
    assert bench.hits([1, 2], ENGINES) == (2, 2)
    assert bench.hits([11], ENGINES) == bench.hits([12], ENGINES) == (0, 0)
    assert bench.hits(keys) == (2, 2)
    bench.apply(BlockRemoved([2, 12], "GPU"))
    assert (bench.hits([1, 2], ENGINES), bench.hits(keys)) == ((1, 1), (1, 2))


@pytest.mark.parametrize("scheme", ["tokens", "vllm-x"])
def test_blocks_of_an_adapter_without_a_name_and_what_follows_them_answer_for_nobody(scheme: str) -> None:
    bench = Bench(scheme)
    numbered = stored([11, 12], lora_id=7)
    bench.apply(numbered, stored([13], 12, 2), stored([14], 11, 1), stored([15], 13, 3))
    assert (bench.blocks.holding.blocks, bench.blocks.ignored) == (0, {"lora": 1, "refused": 3})
    assert bench.hits(KEYS) == bench.hits([11, 12, 13], ENGINES) == (0, 0)
    bench.apply(stored([21, 22], lora_id=7, lora_name="a"), stored([1, 2]))
    assert bench.hits(content_keys(PROMPT, SIZE, lora="a")) == (2, 2)
    assert bench.hits(*((KEYS,) if scheme == "tokens" else ([1, 2], ENGINES))) == (2, 2)


SALTED: Final[list[tuple[str, dict[str, Any], list[Any], list[Any]]]] = [
    (
        vllm_scheme(),
        {"extra_keys": [("a",), None]},
        vllm_block_hashes(PROMPT, SIZE, salt="a")[:2],
        vllm_block_hashes(PROMPT, SIZE)[:2],
    ),
    (
        vllm_scheme("sha256_cbor"),
        {"extra_keys": [(("image", 1), "a"), (("image", -3),)], "cache_salt": "a"},
        vllm_block_hashes(PROMPT, SIZE, "sha256_cbor", salt="a", media=[MediaItem("image", 1, SIZE)])[:2],
        vllm_block_hashes(PROMPT, SIZE, "sha256_cbor", media=[MediaItem("image", 1, SIZE)])[:2],
    ),
    (
        "sglang",
        {"cache_salt": "a"},
        sglang_page_hashes(PROMPT, SIZE, salt="a")[:2],
        sglang_page_hashes(PROMPT, SIZE)[:2],
    ),
    (vllm_scheme(), {"cache_salt": "a"}, vllm_block_hashes(PROMPT, SIZE, salt="a")[:2], [1, 2]),
]


@pytest.mark.parametrize(("scheme", "event", "right", "wrong"), SALTED)
def test_salted_blocks_whose_hash_does_not_hold_the_salt_are_refused(
    scheme: str,
    event: dict[str, Any],
    right: list[Any],
    wrong: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench, space = Bench(scheme), Namespace("m", SIZE, scheme=scheme)
    bench.apply(stored(right, **event))
    assert bench.hits(engine_keys(right), space) == (2, 2)
    assert not caplog.records
    bench.apply(stored(wrong, **event), stored(wrong, **event), stored([7], wrong[0], 1))
    assert bench.hits(engine_keys(wrong), space) == (0, 0)
    assert (bench.blocks.holding.blocks, bench.blocks.ignored) == (2, {"salt": 2, "refused": 1})
    assert [scheme in record.message for record in caplog.records] == [True]


def test_salted_pages_of_pairs_are_looked_at_too() -> None:
    bench, space = Bench("sglang-eagle"), Namespace("m", SIZE, scheme="sglang-eagle")
    tokens = pack_tokens(list(itertools.pairwise(PROMPT))[:SIZE])
    for salt, blocks in (("a", (1, 1)), ("", (0, 0))):
        pages = sglang_page_hashes(PROMPT, SIZE, salt=salt, eagle=True)[:1]
        bench.apply(BlockStored(list(pages), None, tokens, SIZE, medium="GPU", cache_salt="a"))
        assert bench.hits(engine_keys(pages), space) == blocks


def test_salted_blocks_of_a_scheme_that_nobody_can_reproduce_are_taken_as_they_are() -> None:
    bench = Bench("vllm-x")
    bench.apply(stored([1, 2], cache_salt="a"))
    assert bench.hits([1, 2], ENGINES) == (2, 2)


@pytest.mark.parametrize("scheme", ["tokens", "vllm-x"])
def test_a_group_that_turns_out_to_be_no_prefix_group_answers_no_more(scheme: str) -> None:
    bench = Bench(scheme)
    bench.apply(stored([11, 12], group_idx=1))
    space = Namespace("m", SIZE, group="1", scheme=scheme)
    keys = KEYS if scheme == "tokens" else [11, 12]
    assert bench.hits(keys, space) == (2, 2)
    bench.apply(stored([13], group_idx=1, kv_cache_spec_kind="sliding_window"))
    assert bench.hits(keys, space) == (0, 0)
    assert (bench.blocks.holding.blocks, bench.blocks.incomplete) == (0, True)
    bench.apply(BlockRemoved([11, 12], "GPU", 1), stored([11, 12], group_idx=1), stored([11, 12]))
    assert (bench.hits(keys, space), bench.blocks.holding.blocks) == ((0, 0), 2)


def test_what_a_batch_has_too_much_of_is_counted_and_its_removals_count_all_the_same() -> None:
    for scheme in ("tokens", "vllm-x"):
        bench = Bench(scheme, blocks_max=100_000)
        bench.apply(stored([1]))
        bench.apply(*[stored([number]) for number in range(2, 20_000)], BlockRemoved([1], "GPU"))
        assert bench.blocks.ignored["limit"] > 3000
        assert bench.blocks.incomplete
        assert bench.hits([1], ENGINES) == (0, 0)
        bench.apply(stored([30_000], first=1))
        assert bench.blocks.ignored["limit"] < 20_000


def test_removals_that_follow_each_other_count_each_in_its_medium_and_group() -> None:
    bench = Bench("vllm-x")
    bench.apply(stored([1, 2, 3]), stored([1, 2, 3], group_idx=1), stored([1, 2, 3], medium="CPU"))
    bench.apply(
        BlockRemoved([3], "GPU"),
        BlockRemoved([2], "GPU"),
        BlockRemoved([3], "CPU"),
        BlockRemoved([3], "GPU", 1),
        BlockRemoved([b"none"], "GPU", 1),
    )
    assert bench.hits([1, 2, 3], ENGINES) == (1, 2)
    bench.apply(BlockRemoved([2], "GPU", 1), stored([2], 1), BlockRemoved([3], "GPU", 1))
    assert bench.hits([1, 2, 3], ENGINES) == (2, 2)
    assert bench.hits([1, 2], Namespace("m", SIZE, group="1", scheme="vllm-x")) == (1, 1)


def test_more_tokens_than_a_turn_has_time_for_are_not_hashed() -> None:
    bench = Bench(blocks_max=1_000_000)
    for tokens, blocks in ((131_072, 32_768), (1_000_000, 0)):
        numbers = list(range(tokens // SIZE))
        bench.apply(AllBlocksCleared())
        bench.apply(BlockStored(list(numbers), None, pack_tokens([7] * tokens), SIZE))
        assert len(bench.blocks.save()[0].translations) == (1 if blocks else 0)


def test_of_a_batch_what_comes_before_its_last_clear_does_not_matter() -> None:
    bench = Bench("vllm-x")
    bench.apply(*[stored([1], first=1), AllBlocksCleared()] * 20_000, stored([2]))
    assert (bench.hits([1], ENGINES), bench.hits([2], ENGINES)) == ((0, 0), (1, 1))
    assert bench.blocks.ignored == {}


def test_pairs_of_tokens_have_a_scheme_of_their_own() -> None:
    bench = Bench()
    pairs = list(itertools.pairwise(PROMPT))[: 2 * SIZE]
    bench.apply(BlockStored([11, 12], None, pack_tokens(pairs), SIZE, medium="GPU"))
    space = Namespace("m", SIZE, scheme="tokens-eagle")
    assert bench.hits(content_keys(PROMPT, SIZE, eagle=True)[:2], space) == (2, 2)


def test_a_clear_forgets_the_hashes_too() -> None:
    bench = Bench()
    bench.apply(stored([11]), AllBlocksCleared(), placeholder([11]))
    assert (bench.blocks.holding.blocks, bench.blocks.orphans) == (0, 1)


def test_a_flood_of_hashes_for_one_block_ends_at_the_limit() -> None:
    bench = Bench(blocks_max=10)
    bench.apply(*[stored([number]) for number in range(20)])
    assert (bench.blocks.ignored, bench.blocks.incomplete) == ({"limit": 10}, True)


def test_a_translation_agrees_with_a_naive_one() -> None:
    choose = random.Random(3)
    translation = Translation()
    there: dict[int, set[Medium]] = {}
    for _ in range(5000):
        number, medium = choose.randrange(20), choose.choice(list(Medium))
        if choose.random() < 0.5:
            translation.stored([number], [number + 100], medium)
            there.setdefault(number, set()).add(medium)
        else:
            had = medium in there.get(number, ())
            keys, others = translation.removed([number], medium)
            assert keys == ([number + 100] if had else [])
            assert others == ([] if there.get(number) else [number])
            there.get(number, set()).discard(medium)
        assert len(translation) == sum(map(bool, there.values()))
