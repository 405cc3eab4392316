"""`python -m kvstore`, and the `kvstore` command."""

import sys


def main() -> None:
    """Run the command line, which needs more than the client does."""
    try:
        from kvstore.cli import app
    except ModuleNotFoundError as exc:
        sys.exit(f"kvstore: {exc.name} is not installed; pip install 'kvstore-service[daemon]'")
    app()


if __name__ == "__main__":
    main()
