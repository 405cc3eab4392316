"""LMCache's own checks of what is below it, run on our adapter and our connector as they ship.

Their exit status proves nothing, so what they print is read, and what the daemon counted and has.
"""

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest

from kvstore.hashing import lmcache_namespace
from tests.lmcache_processes import adapter, figures, run
from tests.node import Node
from tests.readme import block, command, replaced

pytestmark = pytest.mark.skipif(find_spec("lmcache") is None, reason="LMCache is not installed")

DOCUMENTED_ADDRESS: Final = "unix:/run/kvstore/node.sock"
ROUNDS: Final = 3  # and one to warm up
# The bench never unlocks what it looks up, and lookups of one client may have a quarter of the arena pinned.
ARENA: Final = "320MiB"
VALIDATION: Final = re.compile(r"Validation.*: (\d+)/(\d+)")
# Before what the README has: this check knows a connector by a URL.
CONFIGURATION: Final = """\
chunk_size: 256
local_cpu: true
max_local_cpu_size: 1
remote_url: "plugin://kvstore"
"""
# It loads as the adapter does, all but one bit.
ONE_BIT_OFF: Final = """\
from connectors.lmcache import KVStoreL2Adapter

class OneBitOff(KVStoreL2Adapter):
    def submit_load_task(self, keys, objects):
        self.first = memoryview(objects[0].byte_array).cast("B")
        return super().submit_load_task(keys, objects)

    def query_load_result(self, task_id):
        loaded = super().query_load_result(task_id)
        if loaded is not None:
            self.first[100] ^= 1
        return loaded
"""


@pytest.fixture
def node() -> Iterator[Node]:
    """A daemon with room for a bench; at the end nothing may be wrong in it."""
    with Node(ARENA) as node:
        yield node
        node.check()


def bench(l2_adapter: str, size_kib: int, num_keys: int) -> list[str]:
    """The README's bench of an adapter, which compares the bytes of the last round."""
    words = command("lmcache bench l2")
    return replaced(words, l2_adapter=l2_adapter, data_size_kb=size_kib, num_keys=num_keys, rounds=ROUNDS)


@pytest.mark.parametrize(("size_kib", "num_keys"), [(256, 64), (2048, 8), (8192, 2)])
def test_the_adapter_bench_finds_every_key_and_every_byte(node: Node, size_kib: int, num_keys: int) -> None:
    output = run(bench(adapter(node.address), size_kib, num_keys))
    assert f"[Verify] All {num_keys} keys data verified OK." in output
    assert "MISMATCH" not in output
    printed = figures(output)
    for operation in ("Store", "Lookup", "Load"):
        assert int(printed[operation]["Total keys"]) == ROUNDS * num_keys
        assert printed[operation]["Total success"] == printed[operation]["Total keys"]
        assert printed[operation]["Rounds timed out"] == "0"
    assert printed["Lookup"]["Actual hit rate"] == "1.00"

    stored = (ROUNDS + 1) * num_keys
    with node.client() as store:
        statistics = store.statistics()
        assert statistics.counters.sealed_blocks == statistics.counters.hit_blocks == stored
        assert statistics.tiers[0].pinned_blocks == 0
        for number in range(stored):  # of all rounds, under the names that a router computes
            namespace = lmcache_namespace("bench-model", number, dtype="any", layout="any")
            stored_bytes = store.get(namespace, number.to_bytes(16, "big"))
            assert stored_bytes == bytes([number % num_keys]) * (size_kib << 10)


def test_the_adapter_bench_sees_one_wrong_bit(node: Node, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(ONE_BIT_OFF)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    wrong = adapter(node.address, module_path="wrong", class_name="OneBitOff")
    output = run(bench(wrong, 2048, 8), status=1, environ={"PYTHONPATH": path})
    assert output.count("MISMATCH") == 1
    assert "1/8 keys have data mismatches!" in output


def test_the_adapter_check_passes_all_validations(node: Node) -> None:
    words = ["python", "-m", "lmcache.v1.basic_check", "--mode", "test_l2_adapter"]
    output = run([*words, "--l2-adapter", adapter(node.address), "--num-keys", "16"])
    assert VALIDATION.findall(output) == [("16", "16")] * 4  # absent, found, loaded, and as they were
    assert "Batch store OK" in output
    with node.client() as store:
        statistics = store.statistics()
    assert statistics.counters.sealed_blocks == statistics.counters.hit_blocks == 16
    assert statistics.counters.missed_blocks >= 16


@pytest.mark.parametrize("save_chunk_meta", ["true", "false"])
def test_the_connector_check_passes_all_validations(node: Node, tmp_path: Path, save_chunk_meta: str) -> None:
    file = tmp_path / "lmcache.yaml"
    ours = block("yaml", "remote_storage_plugins").replace(DOCUMENTED_ADDRESS, node.address)
    file.write_text(f"{CONFIGURATION}{ours}  save_chunk_meta: {save_chunk_meta}\n")
    words = ["python", "-m", "lmcache.v1.basic_check", "--mode", "test_remote"]
    output = run(words, environ={"LMCACHE_CONFIG_FILE": str(file)})
    assert VALIDATION.findall(output) == [("5", "5")] * 5  # absent, put, there, got, and as they were
    with node.client() as store:
        statistics = store.statistics()
        (use,) = store.namespaces()
        assert set(store.list(use.namespace).lengths) == {1024 + 28 if save_chunk_meta == "true" else 1024}
    assert statistics.counters.sealed_blocks == statistics.counters.hit_blocks == use.blocks == 5
