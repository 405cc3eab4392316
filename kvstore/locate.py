"""The commands of the locality index: run one, and ask where a prefix is. They parse, call and print."""

import json
import os
import sys
import urllib.error
import urllib.request
from dataclasses import asdict
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from kvstore.block import Namespace
from kvstore.config import load
from kvstore.options import HERE, Address, AsJson, ConfigFile, Model, Salt, client, errors, key_of

app = typer.Typer()

_HERE: Final = "http://127.0.0.1:7405"
_MEDIA: Final = ("gpu", "dram", "nvme", "remote")


@app.command()
def index(
    node: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of a daemon's feed; once for each daemon")
    ] = None,
    http: Annotated[str | None, typer.Option(help="HOST:PORT of lookups, port 0 for any")] = None,
    data: Annotated[str | None, typer.Option(help="HOST:PORT of compact lookups; empty for none")] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="file that holds what it knows across restarts")
    ] = None,
    config: ConfigFile = None,
    child_of: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run a locality index until SIGTERM: it follows daemons and engines, and tells routers who has what."""
    from kvstore.child import settings_of_parent
    from kvstore.index.main import serve_index

    flags = {"nodes": node, "http": http, "snapshot": snapshot}
    given = {name: value for name, value in flags.items() if value}
    if data is not None:
        given["data"] = data
    with errors():
        if child_of is not None:
            settings = settings_of_parent(child_of)
        else:
            settings = load(config, {"index": given} if given else {})
        serve_index(settings)


@app.command()
def lookup(
    model: Model,
    keys: Annotated[list[str] | None, typer.Argument(help="a prefix: keys, head first")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="file with a prompt's token ids instead, - for standard input")
    ] = None,
    salt: Salt = "",
    lora: Annotated[str, typer.Option(help="the LoRA adapter's name; with --tokens")] = "",
    scheme: Annotated[str | None, typer.Option(help="how the keys are made; with --index and keys")] = None,
    block_tokens: Annotated[int | None, typer.Option(help="of each key; with --index and keys")] = None,
    group: Annotated[str | None, typer.Option(help="the KV-cache group; with --index and keys")] = None,
    at_index: Annotated[
        str | None, typer.Option("--index", help=f"URL of an index to ask; with --tokens {_HERE}")
    ] = None,
    top: Annotated[int | None, typer.Option(help="so many engines at most; with --index or --tokens")] = None,
    explain: Annotated[bool, typer.Option(help="say why, too; with --index or --tokens")] = False,
    wait_s: Annotated[float, typer.Option("--wait", help="seconds for shared tiers; 0: ask none")] = 1.0,
    address: Address = HERE,
    as_json: AsJson = False,
) -> None:
    """Say how many leading keys are there, per medium; or, of an index, which engine has how many tokens."""
    if bool(keys) == (tokens is not None):
        raise typer.BadParameter("give keys, or --tokens FILE")
    given = {"scheme": scheme, "block_tokens": block_tokens, "group": group}
    namespace = {name: value for name, value in given.items() if value is not None}
    if namespace and (tokens is not None or at_index is None):
        raise typer.BadParameter("a namespace is for keys with --index")
    if tokens is not None or at_index is not None:
        question: dict[str, Any] = {"model": model, "salt": salt, "lora": lora, "namespace": namespace}
        question |= {"top_k": top, "explain": explain}
        if tokens is not None:
            question["tokens"] = _tokens(tokens)
        else:
            question["keys"] = [key_of(key).hex() for key in keys or ()]
        _print_placements(_asked(at_index or _HERE, question), as_json=as_json)
        return
    with client(address) as store:
        names = [key_of(key) for key in keys or ()]
        hits = asdict(store.hit_length(Namespace(model=model, salt=salt), names, wait_s=wait_s))
    print(json.dumps(hits) if as_json else "  ".join(f"{medium} {count}" for medium, count in hits.items()))


def _tokens(file: str) -> list[int]:
    """Token ids of a file: JSON, or numbers with space between them."""
    with errors():
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
    try:
        return list(map(int, json.loads(text) if text.lstrip().startswith("[") else text.split()))
    except (ValueError, TypeError) as exc:
        sys.exit(f"kvstore: {file} holds no token ids: {exc}; give numbers, or a JSON list of them")


def _asked(url: str, question: dict[str, Any]) -> list[dict[str, Any]]:
    """The placements that an index answers with."""
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("KVSTORE_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    try:
        request = urllib.request.Request(f"{url}/v1/lookup", json.dumps(question).encode(), headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            placements: list[dict[str, Any]] = json.load(answer)["placements"]
            return placements
    except urllib.error.HTTPError as error:
        with error:
            sys.exit(f"kvstore: {error.read().decode(errors='replace').strip()}")
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        sys.exit(f"kvstore: the index at {url}: {getattr(error, 'reason', None) or error}")


def _print_placements(placements: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(placements))
        return
    table = Table("engine", *_MEDIA, "age", "first token")
    for one in placements:
        age = "never heard" if one["age_ms"] is None else f"{one['age_ms'] / 1000:.1f} s"
        had = [f"{one[medium]:,}" for medium in _MEDIA]
        table.add_row(one["engine"], *had, age, f"{one['estimate']['ttft_ms']:,.0f} ms")
    Console().print(table)
    for one in placements:
        for reason in one.get("reasons", ()):
            print(f"{one['engine']}: {reason}")
