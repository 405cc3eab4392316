"""How messages travel between client and daemon: their frames, their versions and their limits. No sockets.

A frame is a header of 16 bytes (body length u32, request id u32, payload length u64, little endian), a
msgpack body holding one message, and the payload: bytes of blocks, on connections that share no memory.
Answers carry the id of their request and come in any order. Request id 0 asks for no answer.

A connection begins with `Hello`, answered by `Welcome`, or by `Challenge` where a token is wanted.
"""

import hmac
import struct
from collections.abc import Callable
from functools import cache
from typing import Final

import msgspec

from kvstore.errors import KVStoreError, ProtocolError
from kvstore.messages import *  # noqa: F403 - the messages are the protocol's
from kvstore.messages import KEYS_MAX, Answer, Failure, Request

# Another major version is refused. A minor version adds messages or fields at the end.
MAJOR: Final = 2
MINOR: Final = 2

HEADER: Final = struct.Struct("<IIQ")
# A body holds at most KEYS_MAX keys of 64 bytes, their lengths and their token ids.
BODY_BYTES_MAX: Final = 16 << 20
# Before a connection is welcome it may only send a Hello, with the leases it still uses, and a Proof.
HELLO_BYTES_MAX: Final = 1 << 20
# Namespaces that the daemon keeps for a connection, those used last; more than a request can name. Salts make
# namespaces, so one engine may use many: this bounds what they cost to some 70 MB.
NAMESPACES_MAX: Final = 65_536
LIST_PAGE_MAX: Final = KEYS_MAX
WAIT_S_MAX: Final = 3600.0
# Token ids of one reserve: 8 MiB of them.
TOKENS_MAX: Final = 2 << 20

_encode = msgspec.msgpack.Encoder().encode
_decode_request: Callable[[bytes | memoryview], Request] = msgspec.msgpack.Decoder(Request).decode
_decode_answer: Callable[[bytes | memoryview], Answer] = msgspec.msgpack.Decoder(Answer).decode


def frame(request_id: int, message: Request | Answer, payload_bytes: int = 0) -> bytes:
    """Header and body; the payload is sent after them."""
    body = _encode(message)
    return HEADER.pack(len(body), request_id, payload_bytes) + body


def decode_request(body: bytes | memoryview) -> Request:
    """Raises ProtocolError when the body is no request."""
    try:
        return _decode_request(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"no request of protocol {MAJOR}.{MINOR}: {exc}") from None


def decode_answer(body: bytes | memoryview) -> Answer:
    """Raises ProtocolError when the body is no answer."""
    try:
        return _decode_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"no answer of protocol {MAJOR}.{MINOR}: {exc}") from None


def failure(error: KVStoreError) -> Failure:
    """The error as it travels."""
    return Failure(error.code, str(error))


def error_of(answer: Failure) -> KVStoreError:
    """The travelled error, as the exception that it was."""
    return _kinds().get(answer.code, KVStoreError)(answer.text)


@cache
def _kinds() -> dict[str, type[KVStoreError]]:
    """The errors that travel, by their codes."""
    direct = KVStoreError.__subclasses__()
    kinds = [*direct, *[child for kind in direct for child in kind.__subclasses__()]]
    return {kind.code: kind for kind in kinds if "code" in vars(kind)}


def token_mark(token: str) -> bytes:
    """What a client says of its token before it proves it, for who knows many: 8 bytes of a digest."""
    return hmac.digest(token.encode(), b"kvstore|mark", "sha256")[:8]


def token_proof(token: str, side: str, client_nonce: bytes, daemon_nonce: bytes) -> bytes:
    """What `side` ("client" or "daemon") shows to prove that it knows the token, which never travels."""
    text = b"|".join((b"kvstore", side.encode(), client_nonce.hex().encode(), daemon_nonce.hex().encode()))
    return hmac.digest(token.encode(), text, "sha256")
