"""A real locality index in a process of its own, and questions to it, for tests."""

import json
import os
import re
import signal
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.forked import Forked
from tests.node import wait_for


class Locator:
    """`kvstore index` on a port of its own. Stops, or is killed, with the test."""

    def __init__(self, *flags: str, environ: dict[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvstore-index-")
        self.folder = Path(self._folder.name)
        self._words = ["kvstore", "index", "--http", "127.0.0.1:0", "--data", "127.0.0.1:0", *flags]
        self._environ = {**os.environ, **(environ or {})}
        self.start()

    def start(self) -> None:
        """Start it, or start it again after it has ended."""
        self.process = Forked(self._words, self.folder / "log", self._environ)
        line = self.process.stdout.readline()
        assert line.startswith("kvstore index ready: http="), self.log
        self.http, _, self.data = line.strip().partition("http=")[2].partition(" data=")

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return (self.folder / "log").read_text()

    def ask(self, path: str = "/v1/lookup", body: Any = None, token: str = "") -> tuple[int, str]:
        """Status and text of the answer; `body` is bytes as they are, or becomes JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"http://{self.http}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def placements(self, **question: Any) -> dict[str, dict[str, Any]]:
        """The answers to a lookup by their engines, in their order."""
        status, text = self.ask(body=question)
        assert status == 200, text
        return {one["engine"]: one for one in json.loads(text)["placements"]}

    def finds(self, medium: str, hit: int, engine: str = "", /, **question: Any) -> bool:
        """Whether an engine, or the best one, has exactly so many tokens."""
        placements = self.placements(**question)
        one = placements.get(engine) if engine else next(iter(placements.values()), None)
        return one is not None and one[medium] == hit

    def metric(self, name: str) -> float:
        """The value of a sample, whose labels are part of the name."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.ask("/metrics")[1], re.MULTILINE)
        assert found, name
        return float(found[1])

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(20)
        self.process.stdout.close()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        finally:
            self.kill()

    def ready(self) -> None:
        """Wait until every publisher was heard."""
        wait_for(lambda: self.ask("/readyz")[0] == 200)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.process.stdout.closed:
            self.stop()
        self._folder.cleanup()
