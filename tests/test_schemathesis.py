"""An outside judge of the index's HTTP: Schemathesis reads its OpenAPI document and tries what that allows.

It makes requests that keep to the document and some that do not: there may be no server error, no status,
media type or body that the document does not have, and nothing wrong may be taken for right.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.block import Namespace
from kvstore.engine_hashes import vllm_block_hashes
from kvstore.engine_keys import vllm_scheme
from tests.locator import Locator
from tests.node import Node, wait_for

TOKEN = "known-to-the-judge"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locator]:
    """One that has something to tell of an engine."""
    path = tmp_path_factory.mktemp("node") / "node.toml"
    path.write_text('node = "n"\n[events]\nfeed = "127.0.0.1:0"\nengines = ["10.0.0.1:8000"]\n')
    path.write_text(path.read_text() + 'publish = "127.0.0.1:0"\nreplay = "127.0.0.1:0"\n')
    space = Namespace("m", 16, scheme=vllm_scheme())
    with (
        Node("16MiB", "--config", str(path)) as node,
        Locator("--node", node.endpoint("feed"), environ={"KVSTORE_TOKEN": TOKEN}) as index,
    ):
        index.ready()
        with node.client() as store, store.reserve(space, vllm_block_hashes([0] * 64, 16), 64) as write:
            write.commit()
        wait_for(lambda: index.metric("kvstore_index_keys") == 4)
        yield index


def test_no_answer_is_an_error_of_the_server_or_not_in_the_document(index: Locator, tmp_path: Path) -> None:
    words = [sys.executable, "-W", "ignore", "-m", "schemathesis.cli", "run"]
    words += [f"http://{index.http}/openapi.json", "-H", f"Authorization: Bearer {TOKEN}", "--no-color"]
    words += ["--checks=all", "--generation-deterministic"]
    # What keeps to the document may be refused all the same: values must go with one another.
    words += ["--exclude-checks=positive_data_acceptance"]
    words += ["--phases=coverage,fuzzing", "--max-examples=5", "--max-failures=3"]
    judge = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert judge.returncode == 0, judge.stdout[-4000:] + judge.stderr[-2000:]
    assert "Traceback" not in index.log
