"""How the daemon logs: what a machine may rely on in JSON, and that nothing escapes it."""

import json
import logging
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.logs import JsonLines
from tests.node import Node, wait_for
from tests.test_reload import post


def record(message: str, *arguments: object, **fields: Any) -> logging.LogRecord:
    logger = logging.Logger("kvstore.test")
    error = fields.pop("exc_info", None)
    return logger.makeRecord(
        logger.name, logging.WARNING, "file.py", 1, message, arguments, error, extra=fields
    )


def written(entry: logging.LogRecord) -> dict[str, Any]:
    """The record as it is read back, from its one line."""
    line = JsonLines("gpu-17").format(entry)
    assert "\n" not in line
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_record_has_its_time_level_logger_message_node_and_the_callers_fields() -> None:
    found = written(record("tier %s is back", "nvme", tier="nvme", path=Path("/mnt")))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("ts"))
    assert found == {
        "level": "warning",
        "logger": "kvstore.test",
        "message": "tier nvme is back",
        "node": "gpu-17",
        "tier": "nvme",
        "path": "/mnt",
    }


@pytest.mark.parametrize("message", ["two\nlines", '"quoted"', "\x00\x7f\ud800", "\u00fc\u2028", "100 %"])
def test_a_message_may_hold_anything(message: str) -> None:
    assert written(record(message))["message"] == message


def test_a_traceback_stays_on_the_line() -> None:
    try:
        raise ValueError("what\nit was")
    except ValueError:
        found = written(record("failed", exc_info=sys.exc_info()))
    assert found["message"] == "failed"
    assert found["traceback"].startswith("Traceback (most recent call last):\n")
    assert found["traceback"].endswith("ValueError: what\nit was")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def write(folder: Path, form: str, *, enabled: bool) -> None:
    (folder / "node.toml").write_text(
        f'node = "gpu-17"\nlog_format = "{form}"\n'
        f'[nvme]\ndirectories = ["{folder}/nvme:16MiB"]\nenabled = {str(enabled).lower()}\n'
    )


@pytest.fixture(scope="module")
def node(folder: Path) -> Iterator[Node]:
    """A daemon that logs JSON."""
    write(folder, "json", enabled=True)
    with Node("4MiB", "--config", str(folder / "node.toml")) as node:
        yield node


def test_all_that_a_daemon_logs_is_json_its_libraries_too(node: Node, folder: Path) -> None:
    host, port = node.endpoint("http").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(b"\xff" * 100 + b"\r\n\r\n")
        sock.recv(1000)
    wait_for(lambda: "uvicorn" in node.log)
    write(folder, "json", enabled=False)
    assert post(node)[0] == 200
    entries = [json.loads(line) for line in node.log.splitlines()]
    assert {"kvstore.serve", "uvicorn.error"} <= {entry["logger"] for entry in entries}
    assert {entry["node"] for entry in entries} == {"gpu-17"}
    (turned_off,) = [entry for entry in entries if entry["message"] == "tier nvme is turned off"]
    assert (turned_off["tier"], turned_off["level"]) == ("nvme", "warning")
    # Plain, without a restart.
    write(folder, "plain", enabled=False)
    assert post(node)[0] == 200
    wait_for(lambda: node.log.endswith("INFO kvstore.live: reload: changed log_format\n"))
