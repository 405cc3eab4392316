"""Who may import whom, how long a file may be, and other rules that nobody should have to remember."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted(path for room in ("kvstore", "tiers", "connectors") for path in (ROOT / room).rglob("*.py"))
LINES_MAX = 400

# Module -> what of ours it may import; what is not here is checked by the rules below alone.
ALLOWED = {
    "kvstore.errors": set(),
    "kvstore.statistics": set(),
    "kvstore.fitting": set(),
    "kvstore.memory": set(),
    "kvstore.top": {"kvstore.block", "kvstore.statistics"},
    "kvstore.block": {"kvstore.errors"},
    "kvstore.node.policy": set(),
    "kvstore.node.ages": set(),
    "kvstore.node.breaker": set(),
    "kvstore.node.blocks": {
        "kvstore.block",
        "kvstore.node.accounts",
        "kvstore.node.directory",
    },  # types alone
    "kvstore.node.accounts": {"kvstore.node.policy"},
    "kvstore.node.directory": {
        "kvstore.block",
        "kvstore.errors",
        "kvstore.node.accounts",
        "kvstore.node.blocks",
        "kvstore.node.policy",
    },
}
TIERS_MAY = {"kvstore.block", "kvstore.errors", "kvstore.memory"}
CLIENT_SIDE = (
    "client",
    "channel",
    "incoming",
    "link",
    "leases",
    "keeper",
    "message",
    "messages",
    "packing",
    "protocol",
    "questions",
    "upkeep",
    "upkeep_messages",
    "memory",
    "hashing",
    "tokens",
    "engine_hashes",
    "content_keys",
    "engine_keys",
    "greeting",
    "hits",
    "index_client",
    "index_link",
    "lookup_messages",
)
# Library -> the modules that may import it.
ONLY_IN = {
    "fastapi": {
        "kvstore.http_server",
        "kvstore.node.http",
        "kvstore.gate",
        "kvstore.openapi",
        "connectors.proxy.app",
        "connectors.proxy.serving",
    },
    "uvicorn": {"kvstore.http_connection", "kvstore.http_server"},
    "uvloop": {"kvstore.serve", "kvstore.index.main", "connectors.proxy.serving"},
    "prometheus_client": {
        "kvstore.metrics",
        "kvstore.index.metrics",
        "kvstore.index.routing_metrics",
        "connectors.proxy.metrics",
    },
    "redis": {"kvstore.index.registry", "tiers.redis_servers"},
    "torch": set(),
    "aiohttp": {"connectors.proxy.answer", "connectors.proxy.engines", "connectors.proxy.index"},
    "zmq": {
        "kvstore.publishing",
        "kvstore.index.announcer",
        "kvstore.index.engine_subscriber",
        "kvstore.index.feed_server",
        "kvstore.index.node_subscriber",
        "kvstore.index.service",
        "kvstore.index.wire",
    },
    "typer": {
        "kvstore.cli",
        "kvstore.operate",
        "kvstore.options",
        "kvstore.screen",
        "kvstore.locate",
        "connectors.proxy.command",
    },
    "rich": {"kvstore.operate", "kvstore.screen", "kvstore.locate"},
}
PURE = (
    "connectors.proxy.ask",
    "connectors.proxy.events",
    "connectors.proxy.pause",
    "connectors.proxy.token_ids",
    "connectors.proxy.transcript",
    "connectors.proxy.whole",
    "kvstore.fitting",
    "kvstore.index.answer",
    "kvstore.index.asked",
    "kvstore.index.backlog",
    "kvstore.index.chooser",
    "kvstore.index.compact",
    "kvstore.index.correction",
    "kvstore.index.demand",
    "kvstore.index.dialect_requests",
    "kvstore.index.dump",
    "kvstore.index.engine_blocks",
    "kvstore.index.engine_group",
    "kvstore.index.engine_stream",
    "kvstore.index.estimate",
    "kvstore.index.explain",
    "kvstore.index.feed",
    "kvstore.index.feed_holds",
    "kvstore.index.held",
    "kvstore.index.holding",
    "kvstore.index.inquiry",
    "kvstore.index.keytable",
    "kvstore.index.lag",
    "kvstore.index.lineage",
    "kvstore.index.locality",
    "kvstore.index.masks",
    "kvstore.index.node_copy",
    "kvstore.index.node_stream",
    "kvstore.index.overlaps",
    "kvstore.index.packed",
    "kvstore.index.placement",
    "kvstore.index.query",
    "kvstore.index.questions",
    "kvstore.index.ranking",
    "kvstore.index.recent",
    "kvstore.index.salted",
    "kvstore.index.saved",
    "kvstore.index.searching",
    "kvstore.index.speeds",
    "kvstore.index.standing",
    "kvstore.index.told",
    "kvstore.index.traits",
    "kvstore.index.translation",
    "kvstore.node.accounts",
    "kvstore.node.ages",
    "kvstore.node.blocks",
    "kvstore.node.breaker",
    "kvstore.node.directory",
    "kvstore.node.policy",
    "kvstore.node.room",
    "kvstore.rate",
    "tiers.allocator",
)
IMPURE_LIBRARIES = {"asyncio", "time", "random", "os", "socket", "threading"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    names = {module_of(other) for other in PRODUCT}
    return {name for name in imports_of(path) if name in names} - {"kvstore", "tiers", "connectors"}


@pytest.mark.parametrize("path", PRODUCT, ids=module_of)
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    module, imported = module_of(path), ours(path)
    if module in ALLOWED:
        assert imported <= ALLOWED[module]
    if module.startswith("tiers."):
        assert {name for name in imported if not name.startswith("tiers.")} <= TIERS_MAY
    elif module != "kvstore.serve":
        assert {name for name in imported if name.startswith("tiers.")} <= {"tiers.base"}
    if module.removeprefix("kvstore.") in CLIENT_SIDE:
        assert not {name for name in imported if name.startswith(("kvstore.node", "kvstore.index.", "tiers"))}
    if module.startswith("kvstore.node."):
        assert not {name for name in imported if name.startswith("kvstore.index")}
    for library, modules in ONLY_IN.items():
        if library in {name.split(".")[0] for name in imports_of(path)}:
            assert module in modules, f"{library} in {module}"
    if module in PURE:
        assert not IMPURE_LIBRARIES & {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("path", PRODUCT, ids=module_of)
def test_a_product_file_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES_MAX


@pytest.mark.parametrize("path", [p for p in PRODUCT if p.name != "__init__.py"], ids=module_of)
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))
