"""What LMCache's bench prints is believed only if all of it was stored, found, loaded and compared."""

import os
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import lmcache
from benchmarks.harness import KIB, OURS, BenchmarkError, Settings
from benchmarks.lmcache import LOAD, STORE, Objects, read_figures
from benchmarks.processes import cores_of_this_process
from tests.test_benchmarks import FIELDS, place, run_quick

__all__ = ["place"]

OBJECTS = Objects(2, 500 * KIB)
VERIFIED = "  [Verify] All 2 keys data verified OK.\n"
needs_lmcache = pytest.mark.skipif(find_spec("lmcache") is None, reason="LMCache is not installed")


def printed() -> str:
    """As LMCache 0.5.6 prints it."""
    lines = ["[Store] Running 1 warmup + 3 measurement rounds..."]
    for operation, noun in (("Store", "success_keys"), ("Lookup", "found"), ("Load", "loaded")):
        lines += [f"  [{operation}] Round {n + 1}: {ms} ms, {noun}=2/2" for n, ms in enumerate((99, 1, 4, 2))]
    return "\n".join([*lines, "", VERIFIED])


def test_a_figure_is_the_median_of_the_counted_rounds() -> None:
    assert read_figures(0, printed(), OBJECTS) == {STORE: 512.0, LOAD: 512.0}


@pytest.mark.parametrize(
    ("status", "old", "new", "message"),
    [
        (1, "", "", "ended with 1"),
        (0, "success_keys=2/2", "success_keys=1/2", "Store did 1 of 2"),
        (0, "found=2/2", "found=0/2", "Lookup did 0 of 2"),
        (0, "loaded=2/2", "loaded=0/2", "Load did 0 of 2"),
        (0, "Round 4: 2 ms", "Round 4: TIMEOUT", "Store did 3 of 4"),
        (0, VERIFIED, "", "equal"),
        (0, VERIFIED, "  [Verify] Key 1: MISMATCH (store 1 bytes vs load 1 bytes)\n", "equal"),
    ],
)
def test_a_bench_that_did_less_has_no_figures(status: int, old: str, new: str, message: str) -> None:
    output = printed()
    assert old in output
    with pytest.raises(BenchmarkError, match=message):
        read_figures(status, output.replace(old, new, 1) if old else output, OBJECTS)


def test_without_lmcache_nothing_is_measured_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(lmcache, "version", absent)
    report = lmcache.run(Settings(rounds=1, quick=True, cores=cores_of_this_process()))
    assert report.rows == []
    assert "pip install" in report.missing["lmcache"]


@needs_lmcache
def test_ours_is_benched_beside_lmcaches_own_adapters(place: Path) -> None:
    contents, _ = run_quick(["lmcache", "--rounds", "1"], place / "rows.json", KVSTORE_BENCH_DIR=str(place))
    assert [row["case"] for row in contents["rows"]] == ["store 2MiB", "load 2MiB"]
    for row in contents["rows"]:
        assert set(row) == FIELDS
        assert row[OURS] > 0
        assert set(row["peers"]) == {"fs", "fs_native", "resp"}
    assert "mooncake_store" in contents["missing"]
    assert [path.name for path in place.iterdir()] == ["rows.json"]


@needs_lmcache
def test_a_store_that_mixes_up_bytes_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMCache's own adapter that loads from files, with every file the same one."""
    (tmp_path / "damaged.py").write_text(
        "from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig\n"
        "class DamagedConfig(FSL2AdapterConfig): pass\n"
        "class Damaged(FSL2Adapter):\n"
        "    def __init__(self, config, l1_memory_desc=None): super().__init__(config)\n"
        "    def _key_to_path(self, key): return min(self._base_path.iterdir())\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    adapter = {"type": "plugin", "module_path": "damaged", "class_name": "Damaged"}
    adapter["adapter_params"] = {"base_path": str(tmp_path / "files")}  # type: ignore[assignment]
    commands = lmcache.Commands()
    try:
        log = tmp_path / "log"
        status = commands.run(OBJECTS.words(adapter), log)
        with pytest.raises(BenchmarkError, match="ended with 1"):
            read_figures(status, log.read_text(), OBJECTS)
        assert "MISMATCH" in log.read_text()
    finally:
        commands.close()
