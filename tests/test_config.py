"""The configuration: sizes and addresses, unknown keys, wrong types, and flags before the file."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from kvstore.config import (
    Config,
    DramConfig,
    EventsConfig,
    LimitsConfig,
    NvmeConfig,
    as_toml,
    default_socket,
    load,
    parse_endpoint,
    parse_size,
)
from kvstore.errors import ConfigError
from kvstore.knobs import QuotasConfig, RedisConfig
from tests import readme

DRAM = {"dram": {"capacity": "4MiB"}}


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have one."""
    monkeypatch.delenv("KVSTORE_TOKEN", raising=False)


def written(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("4GiB", 4 << 30),
        ("512MiB", 512 << 20),
        ("1KiB", 1024),
        ("2TiB", 2 << 40),
        ("1.5GiB", 3 << 29),
        ("1048576", 1048576),
        (1048576, 1048576),
    ],
)
def test_sizes_are_bytes_or_numbers_with_a_binary_unit(value: str | int, size: int) -> None:
    assert parse_size(value) == size


@pytest.mark.parametrize(
    "value",
    [
        *(
            "4GB",
            "4 giB",
            "4 GiB",
            "4gib",
            "4G",
            "GiB",
            "",
            " ",
            "-1",
            "-1GiB",
            "0",
            "0GiB",
            "0.0001KiB",
            "1e9",
        ),
        *("1.5", "1.GiB", ".5GiB", "4GiB ", "4GiB\n", "0x10", "1_000", "inf", "nan", "infGiB"),
        *(0, -1, 1.5, True, False, None, [], {}, float("inf")),
        *("9" * 400 + "GiB", "9" * 5000, "9" * 5000 + "GiB"),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_any_other_size_is_an_error_that_names_it_and_shows_a_right_one(value: Any) -> None:
    with pytest.raises(ConfigError, match=r'dram\.capacity is .*; give bytes as "4GiB", "512MiB"') as caught:
        parse_size(value, "dram.capacity")
    assert repr(value)[:100] in str(caught.value)


@pytest.mark.parametrize(
    ("value", "endpoint"),
    [
        ("127.0.0.1:7400", ("127.0.0.1", 7400)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_an_address_is_a_host_and_a_port(value: str, endpoint: tuple[str, int]) -> None:
    assert parse_endpoint(value) == endpoint


@pytest.mark.parametrize(
    "value", ["", "7400", ":7400", "host", "host:", "host:port", "host:65536", "host:-1", "[]:1", 7400, None]
)
def test_any_other_address_is_an_error_that_names_it(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_endpoint(value, "http")
    assert str(caught.value) == f'http is {value!r}; give HOST:PORT, as "127.0.0.1:7400"'


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ('sokcet = "/x"', "sokcet", "socket"),
        ('htpp = "127.0.0.1:1"', "htpp", "http"),
        ('[dram]\ncapcity = "4GiB"', "dram.capcity", "dram.capacity"),
        ("[limit]\nclients = 1", "limit", "limits"),
        ("[nvme]\ndirectory = 1", "nvme.directory", "nvme.directories"),
        ("[nvme]\ntimeout = 1", "nvme.timeout", "nvme.timeout_s"),
        ("[dram]\nhigh_water = 0.9", "dram.high_water", "dram.high_watermark"),
        ("[limits]\nclient_pinned = 0.5", "limits.client_pinned", "limits.client_pinned_fraction"),
        ('"" = 1', "", ""),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(
    tmp_path: Path, text: str, unknown: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, text), DRAM)
    assert f"unknown configuration key {unknown}; the nearest known one is {nearest}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("socket = 5", "socket is 5; give a str, as "),
        ("http = true", "http is True; give a str, as '127.0.0.1:7400'"),
        ("node = []", "node is []; give a str, as "),
        ("[limits]\nclients = 1.5", "limits.clients is 1.5; give a int, as 4096"),
        ("[limits]\nclients = true", "limits.clients is True; give a int, as 4096"),
        (
            '[limits]\nclient_pinned_fraction = "half"',
            "limits.client_pinned_fraction is 'half'; give a float",
        ),
        ("[dram]\npolicy = 1", "dram.policy is 1; give a str, as 'lru'"),
        ("[dram]\ncapacity = true", "dram.capacity is True; give bytes as"),
        ("[dram]\ncapacity = 1.5", "dram.capacity is 1.5; give bytes as"),
        ('[dram]\ncapacity = "4GB"', "dram.capacity is '4GB'; give bytes as"),
        ('dram = "4GiB"', "dram is '4GiB'; it is a section: write [dram]"),
        ("limits = 3", "limits is 3; it is a section: write [limits]"),
        ('[dram]\nhigh_watermark = "high"', "dram.high_watermark is 'high'; give a float, as 0.95"),
        ('nvme = "/mnt:1GiB"', "nvme is '/mnt:1GiB'; it is a section: write [nvme]"),
        ('[nvme]\ndirectories = "/mnt:1GiB"', "nvme.directories is '/mnt:1GiB'; give a"),
        ("[nvme]\ndirectories = [1]", "nvme.directories is [1]; give a"),
        ("[nvme]\nexclusive = 1", "nvme.exclusive is 1; give a bool, as False"),
        ("[nvme]\nadmit_hits = 1.5", "nvme.admit_hits is 1.5; give a int, as 0"),
        ("[nvme]\nthreads = true", "nvme.threads is True; give a int, as 4"),
        ('[nvme]\ntimeout_s = "2s"', "nvme.timeout_s is '2s'; give a float, as 2.0"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, {} if "dram" in text else DRAM)
    assert message in str(caught.value)


def test_a_flag_beside_a_section_that_is_none_is_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dram is '4GiB'; it is a section"):
        load(written(tmp_path, 'dram = "4GiB"'), DRAM)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dram": {"policy": "mru"}}, "dram.policy is 'mru'; give lru or fifo"),
        ({"limits": {"client_pinned_fraction": 0}}, "limits.client_pinned_fraction is 0.0; give more than 0"),
        ({"quotas": {"dram": "much"}}, "quotas.dram is 'much'; give bytes as"),
        ({"quotas": {"nvme_salts": ["a:0"]}}, "quotas.nvme_salts a is '0'; give bytes as"),
        ({"quotas": {"dram_salts": ["tenant"]}}, "quotas.dram_salts: 'tenant' has no salt; give SALT:BYTES"),
        ({"quotas": {"dram_salts": ["a:1", "a:"]}}, "quotas.dram_salts: 'a:' names a salt twice; give"),
        ({"limits": {"client_reserved_fraction": 1.1}}, "limits.client_reserved_fraction is 1.1; give more"),
        ({"limits": {"client_pinned_fraction": float("nan")}}, "limits.client_pinned_fraction is nan; give"),
        ({"limits": {"clients": 0}}, "limits.clients is 0; give 1 or more"),
        ({"socket_mode": "rw"}, "socket_mode is 'rw'; give three octal digits, as 0660"),
        ({"socket_mode": "0888"}, "socket_mode is '0888'; give three octal digits, as 0660"),
        ({"log_level": "loud"}, "log_level is 'loud'; give debug, info, warning or error"),
        ({"tls_key": "key.pem"}, "tls_certificate and tls_key go together; give both or none"),
        ({"tls_certificate": "cert.pem"}, "tls_certificate and tls_key go together; give both or none"),
        ({"http": "7400"}, "http is '7400'; give HOST:PORT"),
        ({"data": "7401"}, "data is '7401'; give HOST:PORT"),
        ({"data": "0.0.0.0:7401"}, "data is 0.0.0.0:7401, which is beyond loopback, and no token is set"),
        ({"data": "127.example.org:7401"}, "data is 127.example.org:7401, which is beyond loopback"),
        ({"data": "localhost.example.org:7401"}, "which is beyond loopback, and no token is set"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_it_and_the_limit(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {**settings, "dram": {"capacity": "4MiB", **settings.get("dram", {})}})
    assert message in str(caught.value)


DISK = {"directories": ["/mnt/a:1GiB"]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, 'nvme.directories is empty; give ["/mnt/nvme0:500GiB"], or leave [nvme] out'),
        ({"directories": ["/mnt"]}, "nvme.directories is '/mnt'; give PATH:CAPACITY"),
        ({"directories": [":1GiB"]}, "nvme.directories is ':1GiB'; give PATH:CAPACITY"),
        ({"directories": ["/mnt:1GB"]}, "nvme.directories /mnt is '1GB'; give bytes as"),
        ({"directories": ["/mnt:0"]}, "nvme.directories /mnt is '0'; give bytes as"),
        ({"directories": ["/mnt:1GiB", "/mnt:2GiB"]}, "names a directory twice: /mnt:1GiB, /mnt:2GiB"),
        ({**DISK, "policy": "mru"}, "nvme.policy is 'mru'; give lru or fifo"),
        ({**DISK, "write": "through"}, "nvme.write is 'through'; give behind or on-eviction"),
        ({**DISK, "exclusive": True}, 'nvme.exclusive is true, and nvme.write "behind"'),
        ({**DISK, "admit_hits": -1}, "nvme.admit_hits is -1; give 0 or more"),
        ({**DISK, "threads": 0}, "nvme.threads is 0; give 2 to 64"),
        ({**DISK, "threads": 65}, "nvme.threads is 65; give 2 to 64"),
        ({**DISK, "timeout_s": 0}, "nvme.timeout_s is 0.0; give 0.01 to 600 seconds"),
        ({**DISK, "timeout_s": 601}, "nvme.timeout_s is 601.0; give 0.01 to 600 seconds"),
        ({**DISK, "timeout_s": float("nan")}, "nvme.timeout_s is nan; give 0.01 to 600 seconds"),
    ],
)
def test_a_setting_of_the_disk_out_of_range_is_an_error_that_names_it_and_the_limit(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {**DRAM, "nvme": settings})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feed": "7404"}, "events.feed is '7404'; give HOST:PORT"),
        (
            {"feed": "0.0.0.0:7404"},
            "events.feed is 0.0.0.0:7404, which is beyond loopback, and no key is set",
        ),
        (
            {"publish": "0.0.0.0:7402"},
            "events.publish is 0.0.0.0:7402, which is beyond loopback, and whoever",
        ),
        (
            {"replay": "node:7403"},
            "events.replay is node:7403, which is beyond loopback, and whoever can connect",
        ),
        ({"ports": "some"}, "events.ports is 'some'; give shared or each"),
        ({"topology": "eu/r7/u3"}, 'events.topology is \'eu/r7/u3\'; give "zone/rack" or "zone"'),
        ({"format": "json"}, "events.format is 'json'; give maps or arrays"),
        ({"engines": [""]}, "events.engines: ''; give ADDRESS or ADDRESS@MODEL"),
        ({"engines": ["@m"]}, "events.engines: '@m'; give ADDRESS or ADDRESS@MODEL"),
        ({"engines": ["a@"]}, "events.engines: 'a@'; give ADDRESS or ADDRESS@MODEL"),
        ({"engines": ["a", "a"]}, "events.engines names an engine twice: a, a"),
        ({"engines": ["a"], "replay": "127.0.0.1:7402"}, "publish 127.0.0.1:7402 and replay 127.0.0.1:7402"),
        ({"engines": ["a", "b"], "ports": "each"}, "with 2 ports each meet; give others"),
        ({"engines": ["a", "b"], "ports": "each", "replay": "127.0.0.1:65535"}, "with 2 ports each meet"),
        ({"tokens": 1}, "events.tokens is 1"),
    ],
)
def test_a_setting_of_events_out_of_range_is_an_error_that_names_it_and_the_remedy(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {**DRAM, "events": settings})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"feed": "0.0.0.0:7404", "key_file": "key"},
        {
            "publish": "0.0.0.0:0",
            "replay": "node:0",
            "plain": True,
            "engines": ["a:8000", "[::1]:80@org/m@1"],
        },
        {
            "engines": ["a", "b", "b@m"],
            "ports": "each",
            "publish": "127.0.0.1:7405",
            "replay": "127.0.0.1:7407",
        },
        {"engines": ["a"] * 1, "feed": "127.0.0.1:0", "publish": "127.0.0.1:0", "replay": "127.0.0.1:0"},
    ],
)
def test_settings_of_events_that_are_possible(settings: dict[str, Any]) -> None:
    assert load(None, {**DRAM, "events": settings}).events is not None


@pytest.mark.parametrize(("low", "high"), [(0.9, 0.8), (0, 0.5), (0.5, 1.1), (-1, 0.5), (float("nan"), 1)])
def test_watermarks_out_of_order_are_an_error_that_names_both(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match=r"give 0 < low <= high <= 1") as caught:
        load(None, {"dram": {"capacity": "4MiB", "low_watermark": low, "high_watermark": high}})
    assert f"dram.low_watermark is {float(low)} and dram.high_watermark {float(high)}" in str(caught.value)


def test_a_disk_is_configured_by_its_file_and_by_flags(tmp_path: Path) -> None:
    path = written(tmp_path, '[nvme]\ndirectories = ["/mnt/a:1GiB"]\nwrite = "on-eviction"\nthreads = 8\n')
    config = load(path, {**DRAM, "nvme": {"directories": ["/mnt/a:b:2GiB"]}})
    assert config.nvme is not None
    assert config.nvme.places == [(Path("/mnt/a:b"), 2 << 30)]
    assert (config.nvme.write, config.nvme.threads) == ("on-eviction", 8)
    assert load(None, DRAM).nvme is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "[::1]"])
def test_loopback_wants_no_token(host: str) -> None:
    assert load(None, {**DRAM, "data": f"{host}:0"}).token is None


def test_a_token_opens_the_way_beyond_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("secret\n")
    config = load(None, {**DRAM, "data": "0.0.0.0:7401", "token_file": str(tmp_path / "token")})
    assert config.token == "secret"
    monkeypatch.setenv("KVSTORE_TOKEN", "other")
    assert load(None, {**DRAM, "data": "0.0.0.0:7401"}).token == "other"
    assert config.token == "secret"
    assert "secret" not in repr(config)


def test_a_token_file_that_holds_none_is_an_error(tmp_path: Path) -> None:
    data = {**DRAM, "data": "0.0.0.0:7401"}
    missing, empty, binary = tmp_path / "missing", tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"token_file .*missing: No such file or directory"):
        load(None, {**data, "token_file": str(missing)})
    with pytest.raises(ConfigError, match=r"token_file .*empty is empty; put the token into it"):
        load(None, {**data, "token_file": str(empty)})
    with pytest.raises(ConfigError, match=r"token_file .*binary"):
        load(None, {**data, "token_file": str(binary)})


def test_flags_go_before_the_file_and_the_file_before_defaults(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        'node = "from-file"\nhttp = "127.0.0.1:1"\n'
        '[dram]\ncapacity = "8MiB"\npolicy = "fifo"\n[limits]\nclients = 7\nclient_pinned_fraction = 1\n',
    )
    config = load(path, {"http": "127.0.0.1:2", "dram": {"capacity": "4MiB"}})
    assert config.http == "127.0.0.1:2"
    assert config.dram == DramConfig("4MiB", "fifo")
    assert config.dram.capacity_bytes == 4 << 20
    assert config.node == "from-file"
    assert config.limits == LimitsConfig(client_pinned_fraction=1.0, clients=7)
    assert config.socket == default_socket()
    assert load(None, DRAM) == Config(dram=DramConfig("4MiB"))


FULL = """
node = "a \\"quoted\\" \\\\ \u00fc \\u0000\\u007f name"
log_format = "json"
[dram]
capacity = 8388608
low_watermark = 1e-05
[nvme]
directories = ["/mnt/a b:1GiB", "/mnt/b:2GiB"]
exclusive = true
write = "on-eviction"
[redis]
url = "redis://somebody@host:6379/1"
[quotas]
dram_salts = ["tenant:1MiB"]
"""


@pytest.mark.parametrize("text", [FULL, "[dram]\n", '[dram]\n[nvme]\ndirectories = ["/mnt:1GiB"]\n'])
def test_what_is_printed_reads_back_as_the_same_and_says_it_again(tmp_path: Path, text: str) -> None:
    config = load(written(tmp_path, text), {})
    printed = as_toml(config)
    assert load(written(tmp_path, printed), {}) == config
    assert as_toml(load(written(tmp_path, printed), {})) == printed


def test_every_knob_is_printed_with_what_it_is_for_and_whether_it_is_live() -> None:
    printed = as_toml(load(None, {"dram": {"capacity": "4MiB"}}))
    assert '(live) (default "1GiB")\ncapacity = "4MiB"\n' in printed
    assert "\n#[nvme]\n" in printed
    sections = (DramConfig(), NvmeConfig(), RedisConfig(), LimitsConfig(), QuotasConfig(), EventsConfig())
    for section in (Config(), *sections):
        for knob in fields(section):
            if "doc" in knob.metadata:
                doc = re.escape(knob.metadata["doc"] + " (live)" * knob.metadata["live"])
                assert re.search(rf"^# {doc}( \(default .*\))?\n#?{knob.name} = ", printed, re.MULTILINE)


@pytest.mark.parametrize(
    "url", ["redis://:s3cr3t@host", "redis://me:s3cr3t@host/1", "redis://me:a/s3cr3t@b@host"]
)
def test_no_secret_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("KVSTORE_TOKEN", "s3cr3t")
    (tmp_path / "token").write_text("s3cr3t")
    printed = as_toml(load(None, {**DRAM, "token_file": str(tmp_path / "token"), "redis": {"url": url}}))
    assert "s3cr3t" not in printed
    assert "host" in printed


def test_tiers_are_there_only_when_asked_for(tmp_path: Path) -> None:
    for path in (None, written(tmp_path, 'node = "a"\n')):
        assert load(path, {}).dram is None
    assert load(written(tmp_path, "[dram]\n"), {}).dram == DramConfig()


def test_sections_that_are_not_there_are_printed_as_comments(tmp_path: Path) -> None:
    printed = as_toml(load(None, {}))
    for name in ("dram", "nvme", "redis", "events"):
        assert f"\n\n#[{name}]\n# " in printed
    assert "\n\n[limits]\n" in printed
    assert "\n#\n" not in printed
    assert load(written(tmp_path, printed), {}) == load(None, {})


@pytest.mark.parametrize(
    "content",
    [b"node = ", b"[dram", b"a = 1\na = 2", b'node = "\xff\xfe"', b"\x00", b"dram.capacity = 1\ndram = 2"],
)
def test_a_file_that_is_no_toml_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        load(path, DRAM)


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            load(path, DRAM)


def test_the_socket_lies_where_its_user_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_socket() == "/run/user/1000/kvstore/node.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_socket() == "/tmp/kvstore-1000/kvstore/node.sock"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_socket() == "/run/kvstore/node.sock"


@pytest.mark.parametrize("first", ["# node.toml", "# index.toml", "# of a node"])
def test_the_readme_s_files_are_configurations(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_TOKEN", "any")
    text = readme.block("toml", first).replace("/etc/kvstore/token", str(tmp_path / "token"))
    (tmp_path / "token").write_text("secret")
    load(written(tmp_path, text), {})
