"""Who asks: names by tokens. The token of the store is for everything, that of a router for its work alone.

Nothing is compared that a clock could tell of: a token is looked for by its digest, under a key that this
process has made up. Where a token is not shown but proved, it is looked for by its mark, so that one proof is
compared however many tokens there are.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvstore.errors import ConfigError
from kvstore.protocol import token_mark

_LINES_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks; `all` may do everything, others look up and report what came of it."""

    name: str
    all: bool


class Callers:
    """Knows who has which token. Without any token, everybody may do everything."""

    def __init__(self, token: str | None, router_to_token: Mapping[str, str] | None = None) -> None:
        self._key = os.urandom(32)
        self._anybody = Caller("anybody", all=True)
        known = [(Caller(name, all=False), secret) for name, secret in (router_to_token or {}).items()]
        store = Caller("store", all=True)
        if token is not None:
            known.append((store, token))
        self._callers = {self._digest(secret.encode()): caller for caller, secret in known}
        self._marked = {token_mark(secret): (caller, secret) for caller, secret in known}
        # Where only routers have tokens, the store's is one that nobody knows.
        self._unmarked = (store, token or os.urandom(32).hex()) if known else (self._anybody, None)

    def of(self, header: bytes) -> Caller | None:
        """Who says "Bearer TOKEN"; None is nobody that is known."""
        if not self._callers:
            return self._anybody
        scheme, _, given = header.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        return self._callers.get(self._digest(given.strip()))

    def marked(self, mark: bytes) -> tuple[Caller, str | None]:
        """Who has a token with this mark, if it can prove that it has it; None: nothing is to be proved.

        Who has none that is known must prove the store's.
        """
        return self._marked.get(mark, self._unmarked)

    def _digest(self, token: bytes) -> bytes:
        return hashlib.blake2b(token, digest_size=32, key=self._key).digest()


def load_routers(path: str) -> dict[str, str]:
    """Tokens by their routers' names, of a file with a line "NAME TOKEN" for each; # begins a comment.

    Raises:
        ConfigError: it cannot be read, or says the same twice.
    """
    if not path:
        return {}
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"index.router_tokens {path}: {exc}") from exc
    words = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if len(words) > _LINES_MAX:
        raise ConfigError(f"index.router_tokens {path}: {len(words)} routers; give at most {_LINES_MAX}")
    for number, each in enumerate(words, 1):
        if len(each) != 2:
            raise ConfigError(
                f"index.router_tokens {path}: router {number} has {len(each)} words; give NAME TOKEN"
            )
    names, tokens = {name for name, _ in words}, {token for _, token in words}
    if len(names) < len(words) or len(tokens) < len(words):
        raise ConfigError(
            f"index.router_tokens {path}: a name or a token is there twice; give each router its own"
        )
    return {each[0]: each[1] for each in words}
