"""What a client asks of an engine: its request, and what routing reads in it. Pure: it sends nothing.

Bodies are long, and what makes them so stays the JSON that it is: to make it objects would hold up everybody.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, TypeVar

import msgspec

from connectors.proxy.token_ids import TokenIds, token_ids_in
from kvstore.errors import InvalidRequest

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"

# What would ask a prefill for more than the prompt's KV and one token.
_DECODE_FIELDS: Final = ("max_completion_tokens", "min_tokens", "stream_options", "best_of", "n")
# What is looked into: longer prompts, or those in more parts, are none that tokens are known of.
_LOOKED_AT_BYTES: Final = 4 << 20
_PARTS_MAX: Final = 1 << 16
# Of a request that is written anew, beside its prompt.
_REST_BYTES_MAX: Final = 1 << 20
_NONE: Final = msgspec.Raw()
T = TypeVar("T")


class Template(msgspec.Struct, kw_only=True):
    """What engines make tokens of, beside the prompt or the messages themselves."""

    add_generation_prompt: msgspec.Raw = _NONE
    add_special_tokens: msgspec.Raw = _NONE
    chat_template: msgspec.Raw = _NONE
    chat_template_kwargs: msgspec.Raw = _NONE
    continue_final_message: msgspec.Raw = _NONE
    reasoning_effort: msgspec.Raw = _NONE
    tool_choice: msgspec.Raw = _NONE
    tools: msgspec.Raw = _NONE


class Said(Template, kw_only=True):
    """What is read of a request, each value as it is written there; empty where there is none."""

    model: msgspec.Raw = _NONE
    cache_salt: msgspec.Raw = _NONE
    stream: msgspec.Raw = _NONE
    prompt: msgspec.Raw = _NONE
    messages: msgspec.Raw = _NONE


class _Part(msgspec.Struct):
    type: str = ""


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None

    @property
    def is_text(self) -> bool:
        return not isinstance(self.content, list) or all(part.type == "text" for part in self.content)


_said: Final = msgspec.json.Decoder(Said).decode
_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_messages: Final = msgspec.json.Decoder(list[_Message]).decode
_texts: Final = msgspec.json.Decoder(list[str]).decode


@dataclass(frozen=True)
class Ask:
    """A request: its path, its body as it came, what that says, and the headers that go on with it.

    `model` is the model or adapter that is asked for, empty where none is named; `salt` keeps its blocks
    apart from others'; `streams` says whether the answer comes in pieces.
    """

    path: str
    raw: bytes
    said: Said
    headers: Mapping[str, str]
    model: str
    salt: str
    streams: bool

    @cached_property
    def tokens(self) -> TokenIds | None:
        """The prompt, where it is given as token ids; of several prompts the first."""
        return token_ids_in(self.said.prompt)

    @property
    def question(self) -> bytes | None:
        """What an engine's `/tokenize` is asked; None where tokens alone would not say what the prompt is."""
        is_chat = self.path == CHAT
        prompt = _plain(self.said.messages) if is_chat else _first_text(self.said.prompt)
        if prompt is None:
            return None
        fields = {name: raw for name in Template.__struct_fields__ if (raw := getattr(self.said, name))}
        named = {"messages" if is_chat else "prompt": prompt}
        return msgspec.json.encode({"model": self.model, **named, **fields})

    @property
    def prefill(self) -> "Ask | None":
        """The same for an engine that only makes the prompt's KV, and one token; None where it would take too
        long to write."""
        if len(self.raw) - len(self.said.prompt) - len(self.said.messages) > _REST_BYTES_MAX:
            return None
        fields = {name: raw for name, raw in _fields(self.raw).items() if name not in _DECODE_FIELDS}
        raw = msgspec.json.encode({**fields, "max_tokens": 1, "stream": False})
        return replace(self, raw=raw, streams=False)

    def after(self, transfer: Mapping[str, Any]) -> "Ask":
        """The same, with what the prefill said of its KV's whereabouts."""
        return replace(self, raw=msgspec.json.encode({**_fields(self.raw), "kv_transfer_params": transfer}))


def ask_of(path: str, raw: bytes, headers: Mapping[str, str]) -> Ask:
    """The request of a body.

    Raises:
        InvalidRequest: it is no JSON object.
    """
    try:
        said = _said(raw)
        model, salt = _value(said.model, ""), _value(said.cache_salt, "")
        return Ask(path, raw, said, headers, model, salt, _value(said.stream, False))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(f"a body of {len(raw)} bytes that is no JSON object: {exc}") from exc


def _value(raw: msgspec.Raw, default: T) -> T:
    """What is written there, if it is of this type."""
    try:
        return msgspec.json.decode(raw, type=type(default)) if raw else default
    except msgspec.ValidationError:
        return default


def _first_text(prompt: msgspec.Raw) -> msgspec.Raw | str | None:
    """A prompt that is a text, or of several the first."""
    if bytes(prompt).startswith(b'"'):
        return prompt
    try:
        return _texts(prompt)[0] if _is_short(prompt, b'"') else None
    except (msgspec.DecodeError, UnicodeDecodeError, IndexError):
        return None


def _plain(messages: msgspec.Raw) -> msgspec.Raw | None:
    """Messages that are text alone: an engine would have to fetch images, and hashes them in another way."""
    try:
        found = _messages(messages) if _is_short(messages, b"{") else []
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return messages if found and all(one.is_text for one in found) else None


def _is_short(raw: msgspec.Raw, mark: bytes) -> bool:
    """Whether it may be looked into: each of its parts has a mark."""
    return len(raw) <= _LOOKED_AT_BYTES and bytes(raw).count(mark) <= _PARTS_MAX
