"""An engine as the router sees it: its address, whether it is there, and what is under way at it."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from yarl import URL

from kvstore.errors import ConfigError

logger = logging.getLogger(__name__)


class Work:
    """One request at an engine. Its prompt waits there until the first token."""

    def __init__(self, tokens: int) -> None:
        self.waiting_tokens = tokens
        self.has_begun = False

    def began(self) -> None:
        """The first token is there."""
        self.waiting_tokens = 0
        self.has_begun = True


class Engine:
    """One address. `away` is what the watch thinks of it, and who fails there."""

    def __init__(self, url: str) -> None:
        self.url = _checked(url)
        self.name = f"{self.url.host_subcomponent}:{self.url.port}"
        self.away = asyncio.Event()
        self.away.set()
        self.why_away = "was not asked yet"
        self.models: dict[str, dict[str, Any]] = {}
        self._works: set[Work] = set()

    @property
    def is_there(self) -> bool:
        """Whether the watch thinks so."""
        return not self.away.is_set()

    @property
    def waiting_tokens(self) -> int:
        """Of prompts that wait for their first token."""
        return sum(work.waiting_tokens for work in self._works)

    @property
    def running(self) -> int:
        """Requests under way."""
        return len(self._works)

    def failed(self, why: str) -> None:
        """Leave it alone until the watch has seen it well."""
        if self.is_there:
            logger.warning("engine %s is away: %s", self.name, why)
        self.why_away = why
        self.away.set()

    def is_well(self) -> None:
        """The watch has seen it."""
        if not self.is_there:
            logger.info("engine %s is there", self.name)
        self.away.clear()

    @contextmanager
    def work(self, tokens: int) -> Iterator[Work]:
        """A request with so long a prompt is under way."""
        work = Work(tokens)
        self._works.add(work)
        try:
            yield work
        finally:
            self._works.discard(work)


def _checked(url: str) -> URL:
    try:
        checked = URL(url)
    except ValueError as exc:
        raise ConfigError(f"engine {url!r}: {exc}; give http://HOST:PORT") from exc
    if checked.scheme not in ("http", "https") or not checked.host or checked.query_string:
        raise ConfigError(f"engine {url!r} is no address; give http://HOST:PORT")
    return checked
