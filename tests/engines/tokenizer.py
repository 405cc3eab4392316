"""A tokenizer and a chat template for the small checkpoint: token 7 is the word "w7"."""

import json
from pathlib import Path
from typing import Final

from tests.engines.checkpoint import VOCABULARY

_SPECIAL: Final = ("<unk>", "<s>", "</s>")
# Each message begins with the token 1.
_TEMPLATE: Final = "{% for message in messages %}{{ '<s> ' + message['content'] + ' ' }}{% endfor %}"


def write_tokenizer(folder: Path) -> None:
    """Put it beside the checkpoint."""
    words = [*_SPECIAL, *(f"w{token}" for token in range(len(_SPECIAL), VOCABULARY))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [_added(token, word) for token, word in enumerate(_SPECIAL)],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: token for token, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": _TEMPLATE,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _added(token: int, word: str) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": word, "special": True, **flags}
