"""What routers ask an index, ours and Dynamo's, as bytes on their way; and the processes that they ask.

Both follow engines that publish the same blocks. Ours makes keys of their tokens, as Dynamo's does, so that
all questions are answered out of one table.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.batches import BLOCK_TOKENS, MODEL
from benchmarks.harness import BenchmarkError, Settings
from benchmarks.indexers import OurIndex, Publishers
from benchmarks.load import Caller, End, frame_end, http_end, http_request
from benchmarks.peers.dynamo import DynamoIndexer
from benchmarks.processes import pin, start_process, stop_process, wait_for
from kvstore.block import Namespace
from kvstore.content_keys import local_hashes
from kvstore.engine_keys import keys_for
from kvstore.hits import pack_keys
from kvstore.index.events import BlockStored, Hash, encode_batch, pack_tokens
from kvstore.lookup_messages import Find, Found, NameQuestion, decode_answer, frame
from kvstore.messages import Hello
from kvstore.protocol import HEADER, MAJOR, MINOR

BLOCKS: Final = 512
SPACE: Final = Namespace(MODEL, BLOCK_TOKENS, scheme="tokens")
CONNECTIONS: Final = 8
_EVENT_BLOCKS: Final = 64
_HASH_BITS: Final = 63
_VOCABULARY: Final = 128_000
_KNOWN_S_MAX: Final = 120.0
_POLL_S: Final = 0.05
_READY: Final = "echo ready: "
_HELLO: Final = (
    frame(1, Hello(MAJOR, MINOR, b"nonce")),
    frame(2, NameQuestion(MODEL, fields={"block_tokens": BLOCK_TOKENS, "scheme": SPACE.scheme})),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of BLOCKS, of which engines have `blocks`."""

    tokens: list[int]
    blocks: int

    @property
    def hit_tokens(self) -> int:
        """What the answer is for every engine."""
        return self.blocks * BLOCK_TOKENS

    def batches(self, random: Random) -> Iterator[bytes]:
        """What an engine publishes of it."""
        hashes: list[Hash] = [random.getrandbits(_HASH_BITS) for _ in range(self.blocks)]
        for start in range(0, self.blocks, _EVENT_BLOCKS):
            stop = min(start + _EVENT_BLOCKS, self.blocks)
            event = BlockStored(
                block_hashes=hashes[start:stop],
                parent_block_hash=hashes[start - 1] if start else None,
                token_ids=pack_tokens(self.tokens[start * BLOCK_TOKENS : stop * BLOCK_TOKENS]),
                block_size=BLOCK_TOKENS,
                medium="GPU",
            )
            yield encode_batch([event], 1.0, arrays=False, rank=0)


def prompts(count: int, blocks: int, seed: int) -> list[Prompt]:
    """So many different ones."""
    numbers = np.random.default_rng(seed)
    return [
        Prompt(numbers.integers(_VOCABULARY, size=BLOCKS * BLOCK_TOKENS).tolist(), blocks)
        for _ in range(count)
    ]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to ask: where, for what of a prompt, and what an answer says of the best engine, in tokens."""

    name: str
    path: str
    question: Callable[[Prompt], Any]
    answer: Callable[[bytes], int]
    end: End = http_end

    def request(self, prompt: Prompt) -> bytes:
        """The bytes of one."""
        if self.path:
            return http_request(self.path, msgspec.json.encode(self.question(prompt)))
        return bytes(self.question(prompt))

    def body_bytes(self, answer: bytes) -> int:
        """How long the body of an answer is."""
        return len(answer) - (answer.find(b"\r\n\r\n") + 4 if self.path else HEADER.size)


def _keys(prompt: Prompt) -> list[int]:
    keys = keys_for(SPACE, prompt.tokens)
    assert keys is not None
    return [key for key in keys if isinstance(key, int)]


def _signed_hashes(prompt: Prompt) -> list[int]:
    """Of each block alone, as Dynamo's routers send them."""
    hashes = local_hashes(prompt.tokens, BLOCK_TOKENS)
    return [number - (1 << 64) if number >> 63 else number for number in hashes]


def _found(answer: bytes) -> int:
    found = decode_answer(answer[HEADER.size :])
    return max(found.tokens, default=0) if isinstance(found, Found) else -1


def _json(answer: bytes) -> Any:
    return msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])


def _placed(answer: bytes) -> int:
    return max([each["gpu"] for each in _json(answer)["placements"]], default=0)


def _scored(answer: bytes) -> int:
    scores = _json(answer)["scores"].values()
    return max([tokens for ranks in scores for tokens in ranks.values()], default=0)


COMPACT: Final = Way(
    "compact, 512 keys", "", lambda prompt: frame(3, Find(1), pack_keys(_keys(prompt))[0]), _found, frame_end
)
LOOKUP_KEYS: Final = Way(
    "/v1/lookup, 512 keys",
    "/v1/lookup",
    lambda prompt: {
        "model": MODEL,
        "keys": _keys(prompt),
        "namespace": {"block_tokens": BLOCK_TOKENS, "scheme": SPACE.scheme},
    },
    _placed,
)
LOOKUP_TOKENS: Final = Way(
    "/v1/lookup, 8k tokens", "/v1/lookup", lambda prompt: {"model": MODEL, "tokens": prompt.tokens}, _placed
)
QUERY_HASHES: Final = Way(
    "/query_by_hash, 512 hashes",
    "/query_by_hash",
    lambda prompt: {"model_name": MODEL, "block_hashes": _signed_hashes(prompt)},
    _scored,
)
QUERY_TOKENS: Final = Way(
    "/query, 8k tokens",
    "/query",
    lambda prompt: {"model_name": MODEL, "token_ids": prompt.tokens},
    _scored,
)
# Each of ours, and which of Dynamo's it stands beside.
WAYS: Final = {
    COMPACT: QUERY_HASHES,
    QUERY_HASHES: QUERY_HASHES,
    LOOKUP_KEYS: QUERY_HASHES,
    LOOKUP_TOKENS: QUERY_TOKENS,
    QUERY_TOKENS: QUERY_TOKENS,
}


class Indexes:
    """Ours and, where it is installed, Dynamo's indexer, on the servers' core, with the same content."""

    def __init__(self, exits: ExitStack, directory: Path, settings: Settings, *, with_dynamo: bool) -> None:
        self._exits = exits
        self._directory = directory
        self._settings = settings
        self._with_dynamo = with_dynamo
        self.ours: OurIndex
        self.dynamo: DynamoIndexer | None = None

    def fill(self, engines: int, some: Sequence[Prompt]) -> None:
        """Start them; they follow so many engines, each of which has all of these prompts."""
        publishers = [self._publishers(engines)]
        self.ours = self._exits.enter_context(
            closing(OurIndex(self._directory, publishers[0].endpoints, algorithm=""))
        )
        if self._with_dynamo:
            publishers.append(self._publishers(engines))
            self.dynamo = self._exits.enter_context(
                closing(DynamoIndexer(self._directory, publishers[1].endpoints))
            )
        for each in publishers:
            each.wait_for_subscriber()
            for number in range(engines):
                random = Random(number)
                for prompt in some:
                    for payload in prompt.batches(random):
                        each.publish(number, payload)
        for pid in [self.ours.pid, *([self.dynamo.pid] if self.dynamo else [])]:
            pin(pid, {self._settings.cores.server})

    def connect(self, way: Way) -> Caller:
        """To ask ours."""
        port = self.ours.port if way.path else self.ours.data_port
        return Caller(port, self.ours.pid, way.end, CONNECTIONS, () if way.path else _HELLO)

    def connect_peer(self, way: Way) -> Caller:
        """To ask Dynamo's."""
        assert self.dynamo is not None
        return Caller(self.dynamo.port, self.dynamo.pid, way.end, CONNECTIONS)

    def _publishers(self, engines: int) -> Publishers:
        return self._exits.enter_context(closing(Publishers(engines)))


def wait_until_known(connect: Callable[[Way], Caller], way: Way, prompt: Prompt) -> bytes:
    """The answer, once it is the right one.

    Raises:
        BenchmarkError: it does not come to be.
    """
    request, deadline = way.request(prompt), time.monotonic() + _KNOWN_S_MAX
    with closing(connect(way)) as caller:
        while way.answer(answer := caller.ask(request)) != prompt.hit_tokens:
            if time.monotonic() > deadline:
                raise BenchmarkError(
                    f"{way.name}: {answer[:300]!r}, but {prompt.hit_tokens} tokens are there"
                )
            time.sleep(_POLL_S)
        return answer


class Echo:
    """`benchmarks.echo` on the servers' core, whose answers are as long as these."""

    def __init__(
        self, exits: ExitStack, directory: Path, settings: Settings, answers: Mapping[Way, bytes]
    ) -> None:
        log = directory / "echo.log"
        lengths = {way.path: way.body_bytes(answer) for way, answer in answers.items()}
        command = [sys.executable, "-m", "benchmarks.echo", msgspec.json.encode(lengths).decode()]
        process = start_process(command, log)
        exits.callback(stop_process, process)
        wait_for(lambda: "\n" in log.read_text().partition(_READY)[2], process, log)
        pin(process.pid, {settings.cores.server})
        self._pid = process.pid
        self._ports = [int(port) for port in log.read_text().partition(_READY)[2].split()]

    def connect(self, way: Way) -> Caller:
        """To ask it."""
        return Caller(self._ports[0 if way.path else 1], self._pid, way.end, CONNECTIONS)
