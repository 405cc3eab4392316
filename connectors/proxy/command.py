"""The command `kvstore-proxy`. It parses and calls; it decides nothing."""

import os
from pathlib import Path
from typing import Annotated

import typer

from connectors.proxy.app import Tokens
from connectors.proxy.serving import serve_proxy
from connectors.proxy.settings import load
from kvstore.errors import ConfigError
from kvstore.options import errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def proxy(
    engine: Annotated[list[str] | None, typer.Option(help="URL of an engine; once for each")] = None,
    prefill: Annotated[
        list[str] | None, typer.Option(help="URL of an engine that only prefills; once for each")
    ] = None,
    index: Annotated[str | None, typer.Option(help="URL of the locality index")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="NAME=BASE of an adapter, where engines do not say; once for each"),
    ] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT for clients, port 0 for any")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; flags go before it")] = None,
) -> None:
    """Stand before engines as one, and send each request to whom it suits best, until SIGTERM.

    The environment has secrets: KVSTORE_TOKEN that of the index, KVSTORE_PROXY_TOKEN what clients must know,
    KVSTORE_ENGINE_TOKEN what engines are told.
    """
    with errors():
        named = {"engines": engine, "prefill": prefill, "index": index, "listen": listen}
        flags: dict[str, object] = {name: value for name, value in named.items() if value}
        if lora:
            flags["lora"] = dict(map(_adapter, lora))
        tokens = Tokens(_secret("KVSTORE_PROXY_TOKEN"), _secret("KVSTORE_ENGINE_TOKEN"))
        settings = load(config, flags, has_token=tokens.clients is not None)
        serve_proxy(settings, tokens, _secret("KVSTORE_TOKEN"))


def _secret(name: str) -> str | None:
    return os.environ.get(name) or None


def _adapter(text: str) -> tuple[str, str]:
    name, _, base = text.partition("=")
    if not name or not base:
        raise ConfigError(f"--lora is {text!r}; give NAME=BASE")
    return name, base
