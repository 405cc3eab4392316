"""`python -m connectors.proxy`, and the `kvstore-proxy` command."""

import sys


def main() -> None:
    """Run the command line, which needs more than connectors do."""
    try:
        from connectors.proxy.command import app
    except ModuleNotFoundError as exc:
        sys.exit(f"kvstore-proxy: {exc.name} is not installed; pip install 'kvstore-service[proxy]'")
    app()


if __name__ == "__main__":
    main()
