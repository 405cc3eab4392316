"""What the processes of the demo tell the one that started them. Values; nothing here compares them."""

import msgspec


class Generation(msgspec.Struct, frozen=True):
    """Greedy tokens, and the least gap between the two best logits of any step.

    The same sums in another order move a logit by about 1e-6. A gap far above that means that rounding
    cannot make equal KV give other tokens.
    """

    tokens: list[int]
    least_gap: float


class AloneReport(msgspec.Struct, frozen=True):
    """The run without the store, and its times to first token."""

    generation: Generation
    ttft_s: list[float]


class PrefillReport(msgspec.Struct, frozen=True):
    """What was published for the prompt: one digest a block, and the bytes written into slots."""

    digests: list[str]
    written_bytes: int


class Control(msgspec.Struct, frozen=True):
    """A decode over KV that is wrong on purpose. `must_change_tokens` is what it has to show."""

    name: str
    tokens: list[int]
    digests: list[str]
    must_change_tokens: bool


class DecodeReport(msgspec.Struct, frozen=True):
    """The run with the store: its first fetch and what came of it, then controls and times.

    `held_bytes` is the daemon's own count of the bytes in its blocks.
    """

    generation: Generation
    digests: list[str]
    read_bytes: int
    held_bytes: int
    ttft_s: list[float]
    controls: list[Control]


class ReturnReport(msgspec.Struct, frozen=True):
    """A run with a daemon that has nothing in its arena: one that was killed and is back, from its disk, or
    one of another node, from Redis.

    `loaded_bytes` is the daemon's own count of what it read there.
    """

    generation: Generation
    digests: list[str]
    ttft_s: float
    loaded_bytes: int
