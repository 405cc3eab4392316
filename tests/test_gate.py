"""What stands before every request: tokens, rates, bodies, and what is said of those that are none."""

import asyncio
import http.client
import json
import socket
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest

from kvstore.callers import Callers, load_routers
from kvstore.client import IndexClient
from kvstore.decoding import LONG_BYTES, WHOLE_BYTES_MAX, NotJson, RequestDecoder
from kvstore.errors import ConfigError, InvalidRequest, Unauthorized
from kvstore.rate import Rate
from kvstore.request_body import BODY_S
from tests.locator import Locator
from tests.node import wait_for

SLOW_CONNECTIONS = 150


class Numbers(msgspec.Struct, forbid_unknown_fields=True):
    """A request for these tests."""

    tokens: list[Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]] | None = None
    keys: list[int | str] | None = None
    name: str = ""


class Lenient(msgspec.Struct):
    """One that may have fields that nobody knows."""

    tokens: list[Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]] = []
    engines: list[str | Numbers] = []
    name: str = ""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locator]:
    folder = tmp_path_factory.mktemp("index")
    (folder / "routers").write_text("# routers\nalpha alpha-token\n\nbeta beta-token\n")
    (folder / "index.toml").write_text(f'[index]\nrouter_tokens = "{folder}/routers"\nrate = 100\n')
    flags = ("--config", str(folder / "index.toml"))
    with Locator(*flags, environ={"KVSTORE_TOKEN": "store-token"}) as index:
        yield index


def connected(index: Locator) -> http.client.HTTPConnection:
    host, _, port = index.http.partition(":")
    return http.client.HTTPConnection(host, int(port), timeout=20)


def asked(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# Rates and tokens, by themselves.


def test_a_bucket_gives_its_burst_and_then_what_has_come_together_since() -> None:
    rate = Rate(10.0, burst=3)
    assert [rate.wait_s("a", 0.0) for _ in range(4)] == [0, 0, 0, pytest.approx(0.1)]
    assert rate.wait_s("b", 0.0) == 0
    assert rate.wait_s("a", 0.1) == 0
    assert rate.wait_s("a", 0.15) == pytest.approx(0.05)
    assert [rate.wait_s("a", 100.0) for _ in range(4)] == [0, 0, 0, pytest.approx(0.1)]


def test_no_rate_limits_nobody() -> None:
    rate = Rate(0.0)
    assert not any(rate.wait_s("a", 0.0) for _ in range(1000))


def test_a_token_names_who_has_it() -> None:
    callers = Callers("all", {"alpha": "one"})
    store, alpha = callers.of(b"Bearer all"), callers.of(b"bearer  one ")
    assert store is not None
    assert alpha is not None
    assert (store.all, alpha.name, alpha.all) == (True, "alpha", False)
    for header in (
        b"",
        b"all",
        b"Basic all",
        b"Bearer",
        b"Bearer al",
        b"Bearer all one",
        "Bearer é".encode(),
    ):
        assert callers.of(header) is None
    anybody = Callers(None).of(b"")
    assert anybody is not None
    assert anybody.all


def test_routers_and_store_ask_on_the_compact_port_with_their_tokens(index: Locator) -> None:
    for token in ("alpha-token", "store-token"):
        with IndexClient.connect(f"tcp://{index.data}", token=token) as client:
            assert client.engines() == ()
    with pytest.raises(Unauthorized):
        IndexClient.connect(f"tcp://{index.data}", token="another")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha", "router 1 has 1 words; give NAME TOKEN"),
        ("a b\nc d e", "router 2 has 3 words; give NAME TOKEN"),
        ("a b\na c", "a name or a token is there twice"),
        ("a b\nc b", "a name or a token is there twice"),
        (None, "No such file"),
    ],
)
def test_a_file_of_routers_that_is_none_says_where(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "routers").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_routers(str(tmp_path / "routers"))


# Decoding, by itself.


def decoded(body: bytes) -> Numbers:
    return asyncio.run(RequestDecoder(Numbers).decode(body))


def test_a_long_list_is_decoded_in_slices_as_it_would_be_at_once() -> None:
    tokens = [number * 7919 % (1 << 32) for number in range(60_000)]
    for separators in ((",", ":"), (", ", ": "), (" ,\n", " : ")):
        body = json.dumps({"name": "a, [b]", "tokens": tokens}, separators=separators).encode()
        assert len(body) > LONG_BYTES
        request = decoded(body)
        assert (request.name, request.tokens) == ("a, [b]", array("I", tokens))
    keys = [f"{number:08x}" for number in range(40_000)]
    request = decoded(json.dumps({"keys": keys, "tokens": tokens}).encode())
    assert (request.keys, request.tokens) == (keys, array("I", tokens))


LONG = json.dumps(list(range(100_000, 160_000)))


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (f'{{"tokens":[1],"other":{LONG}}}', 1),
        (f'{{"tokens":[1],"other":{{"deep":[{LONG}]}}}}', 1),
        (f'{{"tokens":{LONG},"tokens":[1]}}', 1),
        (f'{{"tokens":[1],"tokens":{LONG}}}', 60_000),
        (f'{{"tokens":{LONG},"other":"{LONG}"}}', 60_000),
        (f'{{"tokens":{LONG},"engines":["0"]}}', 60_000),
        (f'{{"tokens":{LONG},"engines":{json.dumps([{"name": "e, [1]"}] * 8000)}}}', 60_000),
    ],
    ids=["unknown", "nested", "twice", "twice, long", "in a string", "short", "objects"],
)
def test_a_long_list_wherever_it_is_changes_nothing(body: str, tokens: int) -> None:
    decoder = RequestDecoder(Lenient)
    assert len(body) > LONG_BYTES
    request = asyncio.run(decoder.decode(body.encode()))
    assert len(request.tokens) == tokens
    assert list(request.tokens[:1]) == [1 if tokens == 1 else 100_000]
    assert len(request.engines) == body.count('"name"') + body.count('"0"')


@pytest.mark.parametrize(
    "body",
    [
        b'{"name":"%b"}' % (b"a" * WHOLE_BYTES_MAX),
        b'{"engines":[%b]}' % b",".join([b'{"name":""}'] * 100_000),
        b'{"tokens":[%b],"x":{%b}}' % (b",".join([b"1"] * 50_000), b",".join([b'"a":1'] * 200_000)),
        b"[" * WHOLE_BYTES_MAX * 2,
        b'{"tokens":["%b"]}' % b",".join([b"1"] * 1_000_000),
    ],
    ids=["a string", "objects", "fields", "no JSON", "a string in a list"],
)
def test_a_long_body_that_cannot_be_decoded_in_slices_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match=rf"body of {len(body)} bytes, .* give at most 1048576 beside"):
        asyncio.run(RequestDecoder(Lenient).decode(body))


def test_a_list_that_is_much_too_long_is_refused_before_it_is_decoded() -> None:
    class Few(msgspec.Struct):
        keys: Annotated[list[int | str], msgspec.Meta(extra_json_schema={"maxItems": 7})] | None = None

    body = b'{"keys":[%b]}' % b",".join([b'"00"'] * 100_000)
    with pytest.raises(InvalidRequest, match=r"^100000 keys; give at most 7$"):
        asyncio.run(RequestDecoder(Few).decode(body))


@pytest.mark.parametrize("name", ["keys", "name"])
def test_long_strings_with_commas_and_brackets_are_decoded_all_the_same(name: str) -> None:
    text = "a, ]b[" * 50_000
    value: Any = [text, "1"] if name == "keys" else text
    assert getattr(decoded(json.dumps({name: value}).encode()), name) == value


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"tokens":[1,-2]}', r"Expected `int` >= 0 - at `\$.tokens\[1\]`; it is -2$"),
        (b'{"tokens":[1099511627776]}', r"<= 4294967295 - at `\$.tokens\[0\]`; it is 1099511627776$"),
        (b'{"name":7}', r"Expected `str`, got `int` - at `\$.name`; it is 7$"),
        (b'{"tokens":[%b,-2]}' % b",".join([b"1234567"] * 50_000), r"`\$.tokens\[50000\]`; it is -2$"),
        (b'{"tokens":[%b],"x":1}' % b",".join([b"1234567"] * 50_000), "unknown field `x`"),
        (b"[1]", "Expected `object`, got `array`"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        decoded(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"tokens":[1,]}',
        b'{"tokens":[NaN]}',
        b'{"name":"\xff"}',
        b'{"tokens":[%b,]}' % b",".join([b"1234567"] * 50_000),
        b'{"tokens":[%b' % b",".join([b"1234567"] * 50_000),
        b'{"tokens":[%b}' % b",".join([b"1234567"] * 50_000),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_no_json_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(NotJson, match=f"a body of {len(body)} bytes that is no JSON"):
        decoded(body)


# The gate of a real index.


def test_a_router_s_token_is_for_lookups_and_outcomes(index: Locator) -> None:
    question = {"model": "m", "tokens": []}
    assert index.ask(body=question, token="alpha-token")[0] == 200
    assert index.ask("/v1/outcome", {"id": "x"}, token="alpha-token")[0] == 404
    status, text = index.ask("/openapi.json", token="alpha-token")
    assert (status, text) == (
        403,
        "a router's token is for lookups and outcomes; /openapi.json needs the store's\n",
    )
    for token in ("", "alpha", "wrong"):
        assert index.ask(body=question, token=token)[0] == 401
    assert index.ask("/openapi.json", token="store-token")[0] == 200
    assert index.metric('kvstore_index_caller_requests_total{caller="alpha",status="200"}') >= 1
    assert "alpha-token" not in index.ask("/metrics")[1]


@pytest.mark.parametrize("path", ["/v1/lookup", "/register", "/dump"])
def test_a_page_in_a_browser_is_refused_whatever_it_knows(index: Locator, path: str) -> None:
    connection = connected(index)
    headers = {**asked("store-token"), "Origin": "http://evil.example"}
    connection.request("GET" if path == "/dump" else "POST", path, b"{}", headers)
    answer = connection.getresponse()
    assert (answer.status, b"http://evil.example" in answer.read()) == (403, True)
    connection.close()


def test_who_asks_too_often_is_told_when_to_ask_again_and_others_go_on(index: Locator) -> None:
    body = json.dumps({"model": "m", "tokens": []})
    connection = connected(index)
    limited = []
    for _ in range(1000):
        connection.request("POST", "/v1/lookup", body, asked("beta-token"))
        with connection.getresponse() as answer:
            text = answer.read().decode()
            if answer.status == 429:
                limited.append((answer.headers["Retry-After"], text))
                break
            assert answer.status == 200
    assert limited[0][0] == "1"
    assert limited[0][1].startswith("more than 100 requests a second; ask again in 0.0")
    assert index.ask(body=json.loads(body), token="alpha-token")[0] == 200
    connection.close()


def test_a_long_list_in_a_field_that_nobody_knows_is_no_mistake_of_the_server(index: Locator) -> None:
    for path, status in (("/query", 200), ("/v1/lookup", 422)):
        body = f'{{"model":"m","{"token_ids" if path == "/query" else "tokens"}":[1],"other":{LONG}}}'
        assert index.ask(path, body.encode(), token="store-token")[0] == status


def test_another_method_is_refused_with_those_that_there_are(index: Locator) -> None:
    connection = connected(index)
    connection.request("GET", "/v1/lookup", headers=asked("store-token"))
    with connection.getresponse() as answer:
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")
        assert answer.read() == b"GET is not for this path; use POST\n"
    connection.close()


@pytest.mark.parametrize("length", ["100000000", "chunked"])
def test_a_body_that_is_too_long_is_refused_and_the_connection_goes_on(index: Locator, length: str) -> None:
    host, _, port = index.http.partition(":")
    head = "POST /v1/lookup HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer store-token\r\n"
    chunked = length == "chunked"
    head += "Transfer-Encoding: chunked\r\n\r\n" if chunked else f"Content-Length: {length}\r\n\r\n"
    piece = b" " * (1 << 20)
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(head.encode())
        if not chunked:  # refused before any of it is there
            assert b"100000000 bytes; the limit is 16777216 bytes" in answered(sock)
        sent = 0
        while sent < 100_000_000:
            some = piece[: 100_000_000 - sent]
            sock.sendall(b"%x\r\n%b\r\n" % (len(some), some) if chunked else some)
            sent += len(some)
        sock.sendall(b"0\r\n\r\n" if chunked else b"")
        if chunked:
            assert b"more than 16777216 bytes; the limit is 16777216 bytes" in answered(sock)
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answered(sock).endswith(b"ok\n")


def test_who_waits_to_be_told_to_send_a_body_is_refused_without_it(index: Locator) -> None:
    host, _, port = index.http.partition(":")
    head = "POST /v1/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(f"{head}\r\n".encode())
        assert answered(sock).startswith(b"HTTP/1.1 401 ")
        assert sock.recv(1) == b""
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(f"{head}Authorization: Bearer store-token\r\n\r\n".encode())
        assert sock.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"[1, 2, 3]")
        assert answered(sock).startswith(b"HTTP/1.1 422 ")


def answered(sock: socket.socket) -> bytes:
    """One answer, which ends with a line."""
    data = b""
    while not (b"\r\n\r\n" in data and data.endswith(b"\n") and not data.endswith(b"\r\n")):
        piece = sock.recv(1 << 16)
        assert piece, data
        data += piece
    return data


def test_bodies_that_do_not_come_are_given_up_and_hold_up_nobody(index: Locator) -> None:
    host, _, port = index.http.partition(":")
    head = b"POST /v1/lookup HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer alpha-token\r\n"
    head += b"Content-Length: 9\r\n\r\n{"
    wait_for(lambda: index.ask(body={"model": "m", "tokens": []}, token="store-token")[0] == 200)
    began_s = time.monotonic()
    sockets = [socket.create_connection((host, int(port)), timeout=20) for _ in range(SLOW_CONNECTIONS)]
    for sock in sockets:
        sock.sendall(head)
    question = {"model": "m", "tokens": [1] * 1000}
    assert index.ask(body=question, token="store-token")[0] == 200
    texts = []
    for sock in sockets:
        texts.append(answered(sock))
        assert sock.recv(1) == b""
        sock.close()
    assert all(b" 408 " in text for text in texts)
    assert b"1 bytes of the body came in 5 s, and not all; send all within that time" in texts[0]
    assert time.monotonic() - began_s >= BODY_S - 0.1
