"""Our hashes beside those of vLLM's own functions, and what its events say beside what a prompt says."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.content_keys import event_extras, event_hashes, local_hashes, salt_of
from kvstore.engine_hashes import VLLM_ALGORITHMS, MediaItem, vllm_block_hashes
from kvstore.hashing import VLLM_SEED

PYTHON: Final = Path(__file__).parents[2] / ".venv-engines" / "bin" / "python"
# Both sides of each width that pickle and CBOR know.
WIDTHS: Final = [0, 1, 23, 24, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]
BLOCK_SIZES: Final = [1, 2, 3, 4, 16, 32, 256]
# Nothing in PYTHONHASHSEED, vLLM's default, may be asked of the cryptographic ones alone.
SEEDED: Final = [(name, "0") for name in VLLM_ALGORITHMS] + [("sha256", None), ("sha256_cbor", None)]

Ask = Callable[..., dict[str, list[Any]]]

token_ids = st.sampled_from(WIDTHS) | st.integers(0, 2**32 - 1) | st.integers(0, 300)
prompts = st.lists(token_ids, max_size=600)
# Of one letter, too: such strings are one object wherever they are.
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300) | st.sampled_from("ab")
media_items = st.builds(
    MediaItem, names | st.sampled_from(["mm", "lora", "twice"]), st.integers(0, 600), st.integers(1, 300)
)
extras = st.fixed_dictionaries(
    {
        "lora": st.none() | st.tuples(names, names),
        "salt": st.just("") | names,
        "media": st.lists(media_items, max_size=6),
    }
)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def vllm() -> Iterator[Ask]:
    """vLLM's functions in a process of their own."""
    assert PYTHON.exists(), "no .venv-engines here; run these tests with `make test-engines`"
    with subprocess.Popen(
        [str(PYTHON), str(Path(__file__).with_name("hashes.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        questions, answers = process.stdin, process.stdout
        assert answers.readline() == "\n"

        def ask(
            tokens: Sequence[int], block_tokens: int, algorithm: str, seed: str | None, **extra: Any
        ) -> Any:
            media = sorted(extra.get("media", ()), key=lambda item: item.offset)
            question = {
                "tokens": tokens,
                "block_tokens": block_tokens,
                "algorithm": algorithm,
                "seed": seed,
                "lora": extra.get("lora"),
                "salt": extra.get("salt", ""),
                "media": [(item.identifier, item.offset, item.length) for item in media],
            }
            print(json.dumps(question), file=questions, flush=True)
            return json.loads(answers.readline())

        yield ask


@pytest.mark.parametrize(("algorithm", "seed"), SEEDED)
@settings(deadline=None, max_examples=60)
@given(tokens=prompts, block_tokens=st.sampled_from(BLOCK_SIZES), extra=extras)
def test_any_prompt_hashes_as_in_vllm(
    vllm: Ask, algorithm: str, seed: str | None, tokens: list[int], block_tokens: int, extra: dict[str, Any]
) -> None:
    theirs = vllm(tokens, block_tokens, algorithm, seed, **extra)["hashes"]
    ours = vllm_block_hashes(tokens, block_tokens, algorithm, seed or VLLM_SEED, **extra)
    assert [one.hex() for one in ours] == theirs


@pytest.mark.parametrize(("algorithm", "seed"), SEEDED)
def test_a_block_beyond_the_frames_of_pickle_hashes_as_in_vllm(
    vllm: Ask, algorithm: str, seed: str | None
) -> None:
    tokens = WIDTHS * 8000  # blocks of 160 KiB; a frame has 64 KiB
    extra = {"salt": "tenant", "media": [MediaItem("one", 5, 30000), MediaItem("two", 39000, 100)]}
    theirs = vllm(tokens, 40000, algorithm, seed, **extra)["hashes"]
    assert len(theirs) == 2
    ours = vllm_block_hashes(tokens, 40000, algorithm, seed or VLLM_SEED, **extra)
    assert [one.hex() for one in ours] == theirs


@settings(deadline=None, max_examples=60)
@given(tokens=prompts, block_tokens=st.sampled_from(BLOCK_SIZES), extra=extras)
def test_a_prompt_meets_the_keys_of_what_vllm_announces(
    vllm: Ask, tokens: list[int], block_tokens: int, extra: dict[str, Any]
) -> None:
    announced = vllm(tokens, block_tokens, "sha256", None, **extra)["extra_keys"]
    lora = extra["lora"][0] if extra["lora"] else None
    parsed = [event_extras(lora, None, keys, first=i == 0) for i, keys in enumerate(announced)]
    salt = salt_of(parsed[0] if parsed else None)
    asked = local_hashes(tokens, block_tokens, lora=lora or "", salt=extra["salt"], media=extra["media"])
    assert event_hashes(tokens, block_tokens, parsed, salt=salt) == asked
