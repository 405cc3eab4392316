"""What routers send that speak Dynamo's indexer or Mooncake's Conductor, and Dynamo's list of workers.

Fields that are not here are ignored, as Dynamo does. Limits that JSON's types cannot say are checked by those
who answer.
"""

from typing import Annotated, Final

import msgspec

from kvstore.errors import InvalidRequest
from kvstore.index.query import KEYS_MAX, TOKENS_MAX
from kvstore.tokens import TOKEN_MAX

U64_MAX: Final = (1 << 64) - 1

_Token = Annotated[int, msgspec.Meta(ge=0, le=TOKEN_MAX)]
_Tokens = Annotated[list[_Token], msgspec.Meta(extra_json_schema={"maxItems": TOKENS_MAX})]
_Hashes = Annotated[list[int], msgspec.Meta(extra_json_schema={"maxItems": KEYS_MAX})]


class Named(msgspec.Struct, kw_only=True):
    """Which instance, of which model, for whom, in either dialect."""

    instance_id: int | str
    model_name: str | None = None
    modelname: str | None = None
    routing_group: str | None = None
    tenant_id: str | None = None
    dp_rank: int | None = None

    @property
    def instance(self) -> str:
        """A number, in Dynamo's."""
        if self.model_name is not None and not _is_u64(self.instance_id):
            raise InvalidRequest(f"instance_id is {self.instance_id!r:.40}; give a number of 64 bits")
        return str(self.instance_id)


class Register(Named, kw_only=True):
    """Follow an engine from now on. The salt is of blocks whose events name none, and so is the adapter."""

    endpoint: str
    block_size: int
    replay_endpoint: str | None = None
    type: str = "vLLM"
    lora_name: str | None = None
    additionalsalt: str | None = None
    additional_salt: str | None = None


class Unregister(Named, kw_only=True):
    """Follow an engine no longer: one rank of it, or all."""


class Asked(msgspec.Struct, kw_only=True):
    """About which model, for whom, in either dialect."""

    model_name: str | None = None
    model: str | None = None
    routing_group: str | None = None
    tenant_id: str | None = None
    lora_name: str | None = None
    cache_salt: str | None = None
    instance_id: str | None = None
    block_size: int | None = None


class QueryTokens(Asked, kw_only=True):
    """What instances have of a prompt."""

    token_ids: _Tokens
    lora_id: int | None = None


class QueryHashes(Asked, kw_only=True):
    """The same by hashes: of single blocks, signed, in Dynamo's; of prefixes in the Conductor's."""

    block_hashes: _Hashes | None = None
    seq_hashes: _Hashes | None = None
    block_hash: _Hashes | None = None


class Listener(msgspec.Struct, frozen=True):
    """One rank's publisher."""

    endpoint: str
    status: str


class Worker(msgspec.Struct, frozen=True):
    """One instance, as Dynamo lists them."""

    instance_id: int
    source: str
    status: str
    model_name: str
    routing_group: str
    block_size: int
    endpoints: dict[str, str]
    listeners: dict[str, Listener]


def _is_u64(value: object) -> bool:
    return isinstance(value, int) and 0 <= value <= U64_MAX
