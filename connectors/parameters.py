"""What a connector is told by its engine's configuration. Checked once; an unknown name is an error."""

import os
from typing import Any, Final, Self

import msgspec

from kvstore.errors import InvalidRequest

# LMCache lets go of the memory of a store or a load after 300 s; what came later would be somebody else's.
_TRANSFER_TIMEOUT_MAX_S: Final = 240.0


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Only `address` is required.

    `token` is KVSTORE_TOKEN of the environment by default. `dtype` and `layout` name what the bytes are;
    `block_tokens` and `hash_algorithm` must be what the engine hashes its tokens with. Processes of which any
    of these four differs share nothing. `timeout_s` bounds a question, and half of it how long the daemon may
    leave a call unanswered before it counts as away; `transfer_timeout_s` bounds a store or a load. `threads`
    copy. A lock that the engine has not undone after `lock_age_max_s` is ended.
    """

    address: str
    token: str | None = None
    block_tokens: int = 256
    dtype: str = ""
    layout: str = ""
    hash_algorithm: str = "blake3"
    timeout_s: float = 2.0
    transfer_timeout_s: float = 10.0
    threads: int = 4
    lock_age_max_s: float = 600.0

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The parameters; raises InvalidRequest for what is unknown, missing or out of range."""
        try:
            parameters = msgspec.convert(values, cls)
        except msgspec.ValidationError as exc:
            raise InvalidRequest(f"{exc}; known are {', '.join(cls.__struct_fields__)}") from None
        if not 1 <= parameters.threads <= 64:
            raise InvalidRequest(f"threads is {parameters.threads}; give 1 to 64")
        limits = {
            "timeout_s": 3600.0,
            "transfer_timeout_s": _TRANSFER_TIMEOUT_MAX_S,
            "lock_age_max_s": 3600.0,
        }
        for name, limit_s in limits.items():
            if not 0.01 <= getattr(parameters, name) <= limit_s:
                raise InvalidRequest(
                    f"{name} is {getattr(parameters, name)}; give 0.01 to {limit_s:g} seconds"
                )
        if parameters.transfer_timeout_s < parameters.timeout_s:
            raise InvalidRequest(
                f"transfer_timeout_s is {parameters.transfer_timeout_s}; give timeout_s, "
                f"{parameters.timeout_s}, or more"
            )
        return parameters

    @property
    def secret(self) -> str | None:
        """The token, if there is one."""
        return self.token or os.environ.get("KVSTORE_TOKEN")

    @property
    def silence_s(self) -> float:
        """How long a call may stay unanswered. The other half of `timeout_s` is for those before it."""
        return self.timeout_s / 2

    @property
    def ask_s(self) -> float:
        """How long the daemon may ask tiers that it shares with other nodes, beside `silence_s`."""
        return self.timeout_s / 4
