"""What the reports of the three processes prove. It compares and prints, and runs nothing."""

from collections.abc import Sequence
from statistics import median

import msgspec

from benchmarks.demo.geometry import BLOCK_BYTES, BLOCK_TOKENS, PROMPT_BLOCKS, PROMPT_TOKENS
from benchmarks.demo.reports import (
    AloneReport,
    Control,
    DecodeReport,
    Generation,
    PrefillReport,
    ReturnReport,
)

_MIB = 1 << 20


class Comparison(msgspec.Struct, frozen=True):
    """One decode against the run without the store.

    `first_difference` is the index of the first token that differs, None where all are equal. `bytes_equal`
    compares its KV with what was published. `as_expected` says whether the decode from the store is equal
    in both, or a control differs as it has to.
    """

    name: str
    first_difference: int | None
    bytes_equal: bool
    as_expected: bool


class Verdict(msgspec.Struct, frozen=True):
    """All that the demo shows; `python -m benchmarks.demo --json FILE` writes it.

    `elsewhere` is another node, None where there is no Redis to reach it by.
    """

    passed: bool
    comparisons: list[Comparison]
    tokens: list[int]
    least_gap: float
    blocks: int
    block_bytes: int
    published_bytes: int
    fetched_bytes: int
    held_bytes: int
    ttft_without_store_s: float
    ttft_with_store_s: float
    ttft_after_kill_s: float
    loaded_bytes: int
    ttft_elsewhere_s: float | None
    elsewhere_bytes: int | None
    ttft_ratio: float
    rounds: int


def judge(
    alone: AloneReport,
    prefill: PrefillReport,
    decode: DecodeReport,
    back: ReturnReport,
    elsewhere: ReturnReport | None,
) -> Verdict:
    """Compare. The bytes moved must be those of the prompt's blocks; the daemon holds one block more."""
    comparisons = [
        _compare_decode("decode from the store", alone, prefill, decode.generation, decode.digests),
        _compare_decode("decode after the daemon was killed", alone, prefill, back.generation, back.digests),
    ]
    loaded = [back]
    if elsewhere is not None:
        name = "decode on another node"
        comparisons.append(_compare_decode(name, alone, prefill, elsewhere.generation, elsewhere.digests))
        loaded.append(elsewhere)
    comparisons += [_compare_control(alone, prefill, control) for control in decode.controls]
    moved = [prefill.written_bytes, decode.read_bytes, *(report.loaded_bytes for report in loaded)]
    all_moved = all(moved_bytes == PROMPT_BLOCKS * BLOCK_BYTES for moved_bytes in moved)
    all_held = decode.held_bytes == (PROMPT_BLOCKS + 1) * BLOCK_BYTES
    without_store_s, with_store_s = median(alone.ttft_s), median(decode.ttft_s)
    return Verdict(
        passed=all_moved and all_held and all(comparison.as_expected for comparison in comparisons),
        comparisons=comparisons,
        tokens=decode.generation.tokens,
        least_gap=alone.generation.least_gap,
        blocks=PROMPT_BLOCKS,
        block_bytes=BLOCK_BYTES,
        published_bytes=prefill.written_bytes,
        fetched_bytes=decode.read_bytes,
        held_bytes=decode.held_bytes,
        ttft_without_store_s=without_store_s,
        ttft_with_store_s=with_store_s,
        ttft_after_kill_s=back.ttft_s,
        loaded_bytes=back.loaded_bytes,
        ttft_elsewhere_s=None if elsewhere is None else elsewhere.ttft_s,
        elsewhere_bytes=None if elsewhere is None else elsewhere.loaded_bytes,
        ttft_ratio=without_store_s / with_store_s,
        rounds=len(decode.ttft_s),
    )


def table(verdict: Verdict) -> str:
    """The verdict for a reader, one fact a line."""
    lines = [
        f"A prompt of {PROMPT_TOKENS:,} tokens, {verdict.blocks} blocks of {BLOCK_TOKENS} tokens "
        f"({verdict.block_bytes / _MIB:.0f} MiB each); {len(verdict.tokens)} tokens generated greedily.",
        "",
        f"{'against the run without the store':50}{'tokens':18}{'KV bytes':12}",
    ]
    lines += [_row(comparison) for comparison in verdict.comparisons]
    lines += [
        "",
        f"{'TTFT without the store':50}{_ms(verdict.ttft_without_store_s)}   median of {verdict.rounds}",
        f"{'TTFT with the store':50}{_ms(verdict.ttft_with_store_s)}   median of {verdict.rounds}, "
        f"{verdict.ttft_ratio:.0f} times sooner",
        f"{'TTFT from disk, after SIGKILL and a new daemon':50}{_ms(verdict.ttft_after_kill_s)}   once",
        *_on_another_node(verdict),
        f"{'bytes published by the prefill process':50}{verdict.published_bytes:>10,}",
        f"{'bytes fetched by the decode process':50}{verdict.fetched_bytes:>10,}",
        f"{'bytes loaded from disk after SIGKILL':50}{verdict.loaded_bytes:>10,}",
        f"{'bytes held by the daemon, one more block':50}{verdict.held_bytes:>10,}",
        f"{'least gap between the two best logits':50}{verdict.least_gap:10.4f}   rounding: 1e-6",
        "",
        "passed" if verdict.passed else "FAILED",
    ]
    return "\n".join(lines)


def _on_another_node(verdict: Verdict) -> list[str]:
    if verdict.ttft_elsewhere_s is None:
        return ["no TTFT on another node: there is no redis-server here"]
    return [
        f"{'TTFT on another node, through Redis':50}{_ms(verdict.ttft_elsewhere_s)}   once",
        f"{'bytes loaded from Redis by another node':50}{verdict.elsewhere_bytes:>10,}",
    ]


def _compare_decode(
    name: str, alone: AloneReport, prefill: PrefillReport, generation: Generation, digests: Sequence[str]
) -> Comparison:
    first = _first_difference(alone.generation.tokens, generation.tokens)
    bytes_equal = prefill.digests == list(digests)
    return Comparison(name, first, bytes_equal, first is None and bytes_equal)


def _compare_control(alone: AloneReport, prefill: PrefillReport, control: Control) -> Comparison:
    """A control differs in its bytes always, in its tokens where it must."""
    first = _first_difference(alone.generation.tokens, control.tokens)
    bytes_equal = control.digests == prefill.digests[: len(control.digests)]
    as_expected = not bytes_equal and (first is not None or not control.must_change_tokens)
    return Comparison(control.name, first, bytes_equal, as_expected)


def _first_difference(expected: Sequence[int], tokens: Sequence[int]) -> int | None:
    pairs = zip(expected, tokens, strict=True)
    return next((index for index, (left, right) in enumerate(pairs) if left != right), None)


def _row(comparison: Comparison) -> str:
    first = comparison.first_difference
    tokens = "equal" if first is None else f"differ from #{first + 1}"
    kv_bytes = "equal" if comparison.bytes_equal else "differ"
    return f"{comparison.name:50}{tokens:18}{kv_bytes:12}{'ok' if comparison.as_expected else 'FAILED'}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:7.1f} ms"
