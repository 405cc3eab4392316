"""What a client has of a streamed answer, so that another engine can go on where one has died. Pure.

An answer is a sequence of objects whose texts and lists add up: `choices[0].delta.content` of all of them is
the content. A second answer to the same request may be cut into other pieces, and has other ids.
"""

from collections.abc import Mapping
from itertools import chain, zip_longest
from typing import Any, Final

Path = tuple[str | int, ...]

# Texts that grow; others are said once.
_GROWING: Final = {"text", "content", "reasoning", "reasoning_content", "refusal", "arguments", "name"}
# Lists whose rows say by `index` what they add to.
_INDEXED: Final = {"choices", "tool_calls"}
# What every piece of an answer repeats.
_ENVELOPE: Final = ("id", "created", "model", "object", "system_fingerprint")


class Diverged(Exception):
    """A second answer does not begin with what the client has."""


class Transcript:
    """The pieces of an answer that a client has got."""

    def __init__(self) -> None:
        self.continued = False
        # As of the last answer's end, of this answer what went by, and what the client got of that.
        self._had: dict[Path, Any] = {}
        self._passed: dict[Path, int] = {}
        self._got: dict[Path, list[Any]] = {}
        self._said: set[Path] = set()
        self._envelope: dict[str, Any] = {}

    def again(self) -> None:
        """What is taken from now on is another answer to the same request."""
        for path, pieces in self._got.items():
            self._had[path] = _joined([self._had.get(path, pieces[0][:0]), *pieces])
        self._got.clear()
        self._passed.clear()
        self.continued = bool(self._envelope or self._said or self._had)

    def take(self, piece: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the client has not of the next piece, under the first answer's ids; None if that is nothing.

        It counts as got with this.

        Raises:
            Diverged: where the piece should be what the client has, it is not.
        """
        envelope = {name: piece[name] for name in _ENVELOPE if name in piece}
        self._envelope = self._envelope or envelope
        rest = {name: value for name, value in piece.items() if name not in envelope}
        cut, is_new = self._mapping(rest, ())
        if piece.get("usage") and not piece.get("choices"):
            is_new |= self._is_first(("usage",))
        return {**envelope, **self._envelope, **cut} if is_new else None

    def end(self) -> None:
        """The answer is over.

        Raises:
            Diverged: the client has more than it.
        """
        self._must_be_whole(())

    def _value(self, value: Any, path: Path) -> tuple[Any, bool]:
        """What is left of a value, and whether the client has not had it."""
        if isinstance(value, dict):
            return self._mapping(value, path)
        if isinstance(value, list):
            return self._rows(value, path) if path[-1] in _INDEXED else self._grown(value, path)
        if isinstance(value, str) and path[-1] in _GROWING:
            return self._grown(value, path)
        if isinstance(value, str):
            is_first = self._is_first(path)
            return (value if is_first else None), is_first
        return value, False

    def _mapping(self, values: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], bool]:
        cuts = {name: self._value(value, (*path, name)) for name, value in values.items()}
        if values.get("finish_reason") is not None:
            self._must_be_whole(path)
        # A text that was said is left out rather than said to be none.
        kept = {name: cut for name, (cut, _) in cuts.items() if cut is not None or values[name] is None}
        return kept, any(is_new for _, is_new in cuts.values())

    def _rows(self, rows: list[Any], path: Path) -> tuple[list[Any], bool]:
        kept = []
        for position, row in enumerate(rows):
            index = row.get("index", position) if isinstance(row, dict) else position
            cut, is_new = self._value(row, (*path, index))
            if is_new:
                kept.append(cut)
        return kept, bool(kept)

    def _grown(self, value: Any, path: Path) -> tuple[Any, bool]:
        """What a text or a list has beyond what the client has."""
        had = self._had.get(path, value[:0])
        passed = self._passed.get(path, 0)
        known = had[passed : passed + len(value)]
        if not _same(known, value[: len(known)]):
            raise Diverged(f"{_name(path)} differs after {passed} of {len(had)}")
        rest = value[len(known) :]
        self._passed[path] = passed + len(value)
        if rest:
            self._got.setdefault(path, []).append(rest)
        return rest, len(rest) > 0

    def _is_first(self, path: Path) -> bool:
        """Whether this is said for the first time; it is said with this."""
        is_first = path not in self._said
        self._said.add(path)
        return is_first

    def _must_be_whole(self, below: Path) -> None:
        for path, had in self._had.items():
            passed = self._passed.get(path, 0)
            if path[: len(below)] == below and passed < len(had):
                raise Diverged(f"{_name(path)} ends after {passed} of {len(had)}")


def _joined(pieces: list[Any]) -> Any:
    return "".join(pieces) if isinstance(pieces[0], str) else list(chain.from_iterable(pieces))


def _same(known: Any, value: Any) -> bool:
    """Whether texts are equal; of lists, the items that any engine gives in the same way: no logarithms."""
    if isinstance(known, str) or isinstance(value, str):
        return bool(known == value)
    return all(a == b or not isinstance(a, int | str) for a, b in zip_longest(known, value))


def _name(path: Path) -> str:
    return ".".join(map(str, path))
