"""What a client asks of an engine: its request, and what routing reads in it. Pure: it sends nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from kvstore.errors import InvalidRequest
from kvstore.tokens import TOKEN_MAX

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"

# What of a request engines make tokens of, beside the prompt or the messages themselves.
_TEMPLATE_FIELDS: Final = (
    "add_generation_prompt",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "reasoning_effort",
    "tool_choice",
    "tools",
)
# What would ask a prefill for more than the prompt's KV and one token.
_DECODE_FIELDS: Final = ("max_completion_tokens", "min_tokens", "stream_options", "best_of", "n")
_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: its path, its body as it came, what that says, and the headers that go on with it."""

    path: str
    raw: bytes
    body: Mapping[str, Any]
    headers: Mapping[str, str]

    @property
    def model(self) -> str:
        """The model or adapter that is asked for; empty where none is named."""
        return _text(self.body.get("model"))

    @property
    def salt(self) -> str:
        """What keeps its blocks apart from others'."""
        return _text(self.body.get("cache_salt"))

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""
        return self.body.get("stream") is True

    @property
    def tokens(self) -> list[int] | None:
        """The prompt, where it is given as token ids; of several prompts the first."""
        prompt = self.body.get("prompt")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], list):
            prompt = prompt[0]
        is_tokens = isinstance(prompt, list) and bool(prompt) and all(map(_is_token, prompt))
        return prompt if is_tokens else None

    @property
    def question(self) -> dict[str, Any] | None:
        """What an engine's `/tokenize` is asked; None where tokens alone would not say what the prompt is."""
        fields = {name: self.body[name] for name in _TEMPLATE_FIELDS if name in self.body}
        if self.path == CHAT:
            messages = self.body.get("messages")
            return {"messages": messages, **fields} if _is_plain(messages) else None
        prompt = self.body.get("prompt")
        if isinstance(prompt, list) and prompt:
            prompt = prompt[0]
        return {"prompt": prompt, **fields} if isinstance(prompt, str) else None

    @property
    def prefill(self) -> "Ask":
        """The same for an engine that only makes the prompt's KV, and one token."""
        body = {name: value for name, value in self.body.items() if name not in _DECODE_FIELDS}
        return self._with({**body, "max_tokens": 1, "stream": False})

    def after(self, transfer: Mapping[str, Any]) -> "Ask":
        """The same, with what the prefill said of its KV's whereabouts."""
        return self._with({**self.body, "kv_transfer_params": transfer})

    def _with(self, body: dict[str, Any]) -> "Ask":
        return replace(self, body=body, raw=msgspec.json.encode(body))


def ask_of(path: str, raw: bytes, headers: Mapping[str, str]) -> Ask:
    """The request of a body.

    Raises:
        InvalidRequest: it is no JSON object.
    """
    try:
        return Ask(path, raw, _decode(raw), headers)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(f"a body of {len(raw)} bytes that is no JSON object: {exc}") from exc


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= TOKEN_MAX


def _is_plain(messages: Any) -> bool:
    """Whether they are text alone: an engine would have to fetch images, and hashes them in another way."""
    if not isinstance(messages, list) or not messages:
        return False
    return all(isinstance(one, dict) and _is_text(one.get("content")) for one in messages)


def _is_text(content: Any) -> bool:
    if isinstance(content, list):
        return all(isinstance(part, dict) and part.get("type") == "text" for part in content)
    return content is None or isinstance(content, str)
