"""What routers say over HTTP, as types: msgspec checks them, and OpenAPI describes them. They do nothing."""

import re
from typing import Annotated, Any, Final, cast

import msgspec

from kvstore.block import KEY_BYTES_MAX
from kvstore.engine_hashes import MediaItem
from kvstore.errors import InvalidRequest
from kvstore.index.chooser import Load
from kvstore.index.query import KEYS_MAX, MEDIA_MAX, TOKENS_MAX, Query
from kvstore.index.routing import Wish
from kvstore.tokens import TOKEN_MAX

ENGINES_MAX: Final = 8192
_NAME_CHARS_MAX: Final = 255
# A day: who waits longer is not routed.
_WAIT_MS_MAX: Final = 86_400_000
RESERVE_MS_MAX: Final = 600_000
_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2})*")

_Token = Annotated[int, msgspec.Meta(ge=0, le=TOKEN_MAX)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
_Name = Annotated[str, msgspec.Meta(max_length=_NAME_CHARS_MAX)]
_Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=_WAIT_MS_MAX)]


def _at_most(items: int) -> msgspec.Meta:
    """For the document alone: what is longer is refused with its length."""
    return msgspec.Meta(extra_json_schema={"maxItems": items})


class Item(msgspec.Struct, forbid_unknown_fields=True):
    """An image or a clip of a prompt; `offset` and `length` in tokens."""

    identifier: str
    offset: Annotated[int, msgspec.Meta(ge=0, le=TOKEN_MAX)]
    length: Annotated[int, msgspec.Meta(ge=0, le=TOKEN_MAX)]


class AskedEngine(msgspec.Struct, forbid_unknown_fields=True):
    """An engine that the prompt could go to, and how busy it is now, as far as the router knows.

    `waiting_tokens` are of prompts that are not computed yet, `running` requests at once, `wait_ms`
    milliseconds until it would begin: that counts before the others.
    """

    name: _Name
    waiting_tokens: _Count | None = None
    running: _Count | None = None
    wait_ms: _Milliseconds | None = None

    @property
    def load(self) -> Load | None:
        """How busy it is; None is not said."""
        if self.waiting_tokens is self.running is self.wait_ms is None:
            return None
        return Load(self.waiting_tokens, self.running, None if self.wait_ms is None else self.wait_ms / 1000)


class Fields(msgspec.Struct, forbid_unknown_fields=True):
    """A namespace's fields but for model and salt, those that are known: see `kvstore.block.Namespace`."""

    block_tokens: int | msgspec.UnsetType = msgspec.UNSET
    dtype: str | msgspec.UnsetType = msgspec.UNSET
    layout: str | msgspec.UnsetType = msgspec.UNSET
    group: str | msgspec.UnsetType = msgspec.UNSET
    shard: str | msgspec.UnsetType = msgspec.UNSET
    scheme: str | msgspec.UnsetType = msgspec.UNSET

    def given(self) -> dict[str, Any]:
        """Those that are known, by their names."""
        return {
            name: value for name, value in msgspec.structs.asdict(self).items() if value is not msgspec.UNSET
        }


class Lookup(msgspec.Struct, forbid_unknown_fields=True):
    """A prompt, by `tokens` or by `keys` that somebody has made of them: numbers, or hex of bytes.

    `namespace` says where keys are looked for: fields of a namespace, as block_tokens and scheme. `engines`
    are the candidates, all that are known where there are none. `top_k` answers are given, or all.
    `explain` gives reasons in words. `route`: the prompt goes to the first one, and its work counts there
    until its outcome is reported. `reserve_ms` above 0 routes it, too, and holds its prefix in the DRAM of
    that engine's nodes so many milliseconds. Without tokens there is nothing to find: all have nothing.
    """

    model: Annotated[str, msgspec.Meta(extra_json_schema={"minLength": 1, "maxLength": 512})]
    tokens: Annotated[list[_Token], _at_most(TOKENS_MAX)] | None = None
    keys: Annotated[list[int | str], _at_most(KEYS_MAX)] | None = None
    namespace: Fields = msgspec.field(default_factory=Fields)
    salt: Annotated[str, msgspec.Meta(extra_json_schema={"maxLength": 512})] = ""
    lora: Annotated[str, msgspec.Meta(extra_json_schema={"maxLength": 512})] = ""
    media: Annotated[list[Item], _at_most(MEDIA_MAX)] = []
    engines: Annotated[list[_Name | AskedEngine], _at_most(ENGINES_MAX)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=1, le=ENGINES_MAX)] | None = None
    explain: bool = False
    route: bool = False
    reserve_ms: Annotated[int, msgspec.Meta(ge=0, le=RESERVE_MS_MAX)] = 0

    def query(self) -> Query:
        """What is asked of the index.

        Raises:
            InvalidRequest: a value is out of its limits, or does not go with another.
        """
        return Query(
            model=self.model,
            tokens=self.tokens,
            keys=None if self.keys is None else _keys(self.keys),
            fields=self.namespace.given(),
            salt=self.salt,
            lora=self.lora,
            media=[MediaItem(item.identifier, item.offset, item.length) for item in self.media],
        )

    def wish(self) -> Wish:
        """What is asked of routing.

        Raises:
            InvalidRequest: there are too many engines, or one twice.
        """
        if self.engines is None:
            return Wish(None, self.route, self.reserve_ms / 1000, self.top_k)
        if len(self.engines) > ENGINES_MAX:
            raise InvalidRequest(f"{len(self.engines)} engines; give at most {ENGINES_MAX}")
        loads: dict[str, Load | None] = {}
        for one in self.engines:
            name, load = (one, None) if isinstance(one, str) else (one.name, one.load)
            if name in loads:
                raise InvalidRequest(f"engine {name!r:.80} is named twice; give each candidate once")
            loads[name] = load
        return Wish(loads, self.route, self.reserve_ms / 1000, self.top_k)


class Report(msgspec.Struct, forbid_unknown_fields=True):
    """What became of the prompt that a lookup routed as `id`.

    `engine` is where it went, if not to the one that was first; `ttft_ms` the milliseconds to its first
    token, else it has come just now; `cached_tokens` what the engine says that it did not compute; `failed`:
    no first token will come; `ended`: it came, and nobody saw when, so nothing is learned from it.
    """

    id: str
    engine: _Name | None = None
    ttft_ms: _Milliseconds | None = None
    cached_tokens: _Count | None = None
    failed: bool = False
    ended: bool = False

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token.

        Raises:
            InvalidRequest: the report says what cannot be together.
        """
        given = {"ttft_ms": self.ttft_ms is not None, "failed": self.failed, "ended": self.ended}
        said = [name for name, is_said in given.items() if is_said]
        if len(said) > 1:
            raise InvalidRequest(f"{' and '.join(said)} exclude each other; give one of them")
        return None if self.ttft_ms is None else self.ttft_ms / 1000


def _keys(keys: list[int | str]) -> list[int] | list[bytes]:
    """Numbers as they are, strings as the bytes that they are hex of."""
    if set(map(type, keys)) <= {int}:  # in a third of the time that a comprehension takes
        return cast(list[int], keys)
    try:
        return list(map(bytes.fromhex, keys))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        bad = next(key for key in keys if not isinstance(key, str) or not _HEX.fullmatch(key))
        raise InvalidRequest(
            f"key {bad!r:.60} is no hex; give numbers alone, or hex of 1 to {KEY_BYTES_MAX} bytes each"
        ) from None
