"""The documents' commands, so that tests run them word for word, but for what is of one machine."""

import re
import shlex
from functools import cache
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_DOCUMENTS = (_ROOT / "README.md", _ROOT / "docs" / "router.md")


def block(language: str, first: str) -> str:
    """The block of code that begins with `first`."""
    (found,) = [text for text in _blocks(language) if text.startswith(first)]
    return found


def command(first: str) -> list[str]:
    """The words of the command that begins with `first`, which has a block of its own."""
    return shlex.split(block("bash", first).replace("\\\n", " "))


def replaced(words: list[str], **options: object) -> list[str]:
    """The command with other values for its options: `http_port=` for --http-port, which it must have."""
    words = list(words)
    for name, value in options.items():
        words[words.index("--" + name.replace("_", "-")) + 1] = str(value)
    return words


@cache
def _blocks(language: str) -> list[str]:
    text = "\n".join([document.read_text() for document in _DOCUMENTS])
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
