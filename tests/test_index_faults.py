"""Real daemons, engines' publishers and indexes, killed and cut off while blocks come and go.

Whatever happens, within 5 s of its end the index says what is there again, and meanwhile how old what it
says is.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import zmq

from kvstore.block import Namespace
from kvstore.client import StoreClient
from kvstore.index.wire import new_key
from tests.locator import Locator
from tests.node import SLACK_S, Node, free_ports, wait_for

RIGHT_WITHIN_S: Final = 5.0 + SLACK_S
NS: Final = Namespace("m", block_tokens=16)
PROMPTS: Final = 12
BLOCKS: Final = 8
ENGINE: Final = "10.0.0.9:8000"


def keys(prompt: int) -> list[bytes]:
    """A chain of its own for each prompt."""
    return [f"{prompt}/{place}".encode() for place in range(BLOCKS)]


def churn(store: StoreClient, random: random.Random, steps: int) -> None:
    """Store prompts and remove some of their blocks."""
    for _ in range(steps):
        chain = keys(random.randrange(PROMPTS))
        if random.random() < 0.4:
            store.remove(NS, random.sample(chain, 2))
        else:
            with store.reserve(NS, chain, 4096, parent=b"") as write:
                write.commit()


def told(ask: Any, engine: str) -> list[int]:
    """Leading blocks of each prompt in DRAM, as the index says; `ask` takes a question to placements."""
    answers = []
    for prompt in range(PROMPTS):
        names = [key.hex() for key in keys(prompt)]
        placements = ask(model="m", keys=names, namespace={"block_tokens": 16})
        answers.append(placements.get(engine, {"dram": 0})["dram"] // 16)
    return answers


def truth(store: StoreClient) -> list[int]:
    """The same, as the daemon knows it."""
    return [store.hit_length(NS, keys(prompt)).dram for prompt in range(PROMPTS)]


def events(folder: Path, **more: str) -> list[str]:
    """A daemon's flags, with a feed whose address a restart keeps."""
    path = folder / "node.toml"
    lines = {"feed": f"127.0.0.1:{free_ports(1)[0]}", **more}
    text = "\n".join(f'{name} = "{value}"' for name, value in lines.items())
    path.write_text(f'node = "gpu-17"\n[events]\n{text}\n')
    return ["--config", str(path)]


def test_daemon_and_index_are_killed_at_random(tmp_path: Path) -> None:
    chance = random.Random(11)
    with Node("64MiB", *events(tmp_path)) as node:
        feed = node.endpoint("feed")
        with Locator("--node", feed, "--snapshot", str(tmp_path / "index.state")) as index:
            for _ in range(8):
                with node.client() as store:
                    churn(store, chance, 20)
                victim = chance.choice(["daemon", "index", "both"])
                if victim != "index":
                    node.kill()
                if victim != "daemon":
                    index.kill()
                    index.start()
                if victim != "index":
                    node.start()
                with node.client() as store:
                    churn(store, chance, 10)
                    has = truth(store)
                    wait_for(lambda: told(index.placements, "gpu-17") == has, RIGHT_WITHIN_S)  # noqa: B023


class Hostile:
    """An engine's publisher that says whatever it is told to, as fast as it is listened to."""

    def __init__(self, kind: str) -> None:
        self.port = free_ports(1)[0]
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._publish, args=(kind,))
        self.sent = 0
        self._thread.start()

    def _publish(self, kind: str) -> None:
        topic = b"kv@10.0.0.9:8000@m" if kind == "another's topic" else b""
        payloads, pause_s = said(kind)
        with zmq.Context() as context, context.socket(zmq.PUB) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            # Waits for who listens, and so loses nothing and takes no more of the machine than that one.
            socket.setsockopt(zmq.XPUB_NODROP, 1)
            socket.setsockopt(zmq.SNDTIMEO, 100)
            socket.setsockopt(zmq.SNDHWM, 4)
            socket.bind(f"tcp://127.0.0.1:{self.port}")
            while not self._ends.is_set():
                payload = payloads[self.sent % len(payloads)]
                with contextlib.suppress(zmq.Again):
                    socket.send_multipart([topic, self.sent.to_bytes(8, "big"), payload])
                    self.sent += 1
                self._ends.wait(pause_s)

    def stop(self) -> None:
        """Say nothing any more."""
        self._ends.set()
        self._thread.join()


def said(kind: str) -> tuple[list[bytes], float]:
    """What a hostile publisher repeats, and how long it waits in between."""
    chance = random.Random(3)
    match kind:
        case "flood":
            return [stored([chance.getrandbits(64) for _ in range(64)]) for _ in range(1000)], 0.0
        case "one by one":
            return [stored([chance.getrandbits(64)]) for _ in range(4000)], 0.0
        case "huge":  # 4.0 MB; a frame may have 4 MiB
            return [stored([chance.getrandbits(64) for _ in range(160_000)])], 0.5
        case "too long":
            return [bytes(5 << 20)], 0.5
        case "trillion":
            return [b"\x93\xcb" + bytes(8) + b"\xdd\xff\xff\xff\xff\x81\xa4type"], 0.001
        case "another's topic":
            return [stored([1, 2, 3])], 0.001
        case _:
            return [chance.randbytes(200) for _ in range(100)], 0.001


def stored(hashes: list[int]) -> bytes:
    """The payload of a batch of vLLM's."""
    event = {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": None,
        "token_ids": [0] * 16 * len(hashes),
        "block_size": 16,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    return msgspec.msgpack.encode([time.time(), [event], 0])


HOSTILE: Final = ("flood", "one by one", "huge", "too long", "garbage", "trillion", "another's topic")
BLOCKS_MAX: Final = 200_000


def hostile_engines(hostile: dict[str, Hostile]) -> str:
    """The settings of an index that follows them."""
    return "".join(
        f"""
        [[index.engines]]
        name = "{kind}"
        events = "tcp://127.0.0.1:{publisher.port}"
        model = "m"
        block_tokens = 16
        hash = "sha256"
        """
        for kind, publisher in hostile.items()
    )


class Prober(threading.Thread):
    """A router that asks without end, and how long its answers took."""

    def __init__(self, index: Locator) -> None:
        super().__init__()
        self.took_s: list[float] = []
        self._index = index
        self._ends = threading.Event()

    def run(self) -> None:
        question: dict[str, Any] = {"model": "m", "keys": ["00"], "namespace": {"block_tokens": 16}}
        while not self._ends.wait(0.005):
            began_s = time.monotonic()
            self._index.placements(**question)
            self.took_s.append(time.monotonic() - began_s)

    def stop(self) -> list[float]:
        """Ask no more. What answers took, fastest first."""
        self._ends.set()
        self.join()
        return sorted(self.took_s)


def test_hostile_publishers_harm_nobody_else(tmp_path: Path) -> None:
    hostile = {kind: Hostile(kind) for kind in HOSTILE}
    try:
        with Node("64MiB", *events(tmp_path)) as node, node.client() as store:
            config = tmp_path / "index.toml"
            head = f'[index]\nnodes = ["{node.endpoint("feed")}"]\nblocks_max = {BLOCKS_MAX}\n'
            config.write_text(head + hostile_engines(hostile))
            with Locator("--config", str(config)) as index:
                wait_for(lambda: "gpu-17" in index.placements(model="m", tokens=[1]))
                wait_for(lambda: index.metric(BLOCKS_OF_FLOOD) >= BLOCKS_MAX // 4, 60)
                sent = {kind: publisher.sent for kind, publisher in hostile.items()}
                prober = Prober(index)
                prober.start()
                chance = random.Random(5)
                until_s = time.monotonic() + 6
                try:
                    while time.monotonic() < until_s:
                        churn(store, chance, 5)
                        has = truth(store)
                        wait_for(lambda: told(index.placements, "gpu-17") == has, RIGHT_WITHIN_S)  # noqa: B023
                        assert index.metric('kvstore_index_publishers{kind="node",state="silent"}') == 0
                finally:
                    took_s = prober.stop()
                assert took_s[len(took_s) * 99 // 100] < 0.5, (len(took_s), took_s[-20:])
                assert all(publisher.sent > sent[kind] for kind, publisher in hostile.items())
                assert index.metric("kvstore_index_holdings") <= 1 + len(HOSTILE)
                # The limit holds, for each of them.
                assert index.metric("kvstore_index_keys") <= 3 * BLOCKS_MAX + 1000
    finally:
        for publisher in hostile.values():
            publisher.stop()


BLOCKS_OF_FLOOD: Final = 'kvstore_index_blocks{kind="engine",publisher="flood"}'


ROOT_AND_IP: Final = (
    os.geteuid() == 0 and subprocess.run(["which", "ip"], capture_output=True).returncode == 0
)


def ip(*words: str) -> None:
    """Run iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Apart:
    """A network namespace with two links to it: one for the feed, which can be cut, and one to ask over."""

    def __init__(self) -> None:
        self.name = f"kvstore-{os.getpid()}"
        octet = os.getpid() % 200 + 20
        self.feed_here, self.ask_there = f"10.213.{octet}.1", f"10.214.{octet}.2"
        ip("netns", "add", self.name)
        for number, net in enumerate((f"10.213.{octet}", f"10.214.{octet}")):
            here, there = f"kvs{number}h{octet}", f"kvs{number}t{octet}"
            ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", self.name)
            ip("addr", "add", f"{net}.1/24", "dev", here)
            ip("link", "set", here, "up")
            ip("-n", self.name, "addr", "add", f"{net}.2/24", "dev", there)
            ip("-n", self.name, "link", "set", there, "up")
        ip("-n", self.name, "link", "set", "lo", "up")
        self._feed_link = f"kvs0t{octet}"

    def cut(self) -> None:
        """No packet passes to or from the feed."""
        ip("-n", self.name, "link", "set", self._feed_link, "down")

    def restore(self) -> None:
        """They pass again."""
        ip("-n", self.name, "link", "set", self._feed_link, "up")

    def close(self) -> None:
        """It and its links are gone."""
        ip("netns", "del", self.name)


@contextlib.contextmanager
def index_apart(apart: Apart, folder: Path, feed: str, key: Path) -> Iterator[Locator]:
    """An index in the namespace; the answer asks it from here."""
    token = folder / "token"
    token.write_text("secret")
    config = folder / "index.toml"
    settings = [f'token_file = "{token}"', "[index]", f'nodes = ["{feed}"]', f'key_file = "{key}"']
    config.write_text("\n".join([*settings, f'http = "{apart.ask_there}:0"']))
    command = [
        "ip",
        "netns",
        "exec",
        apart.name,
        sys.executable,
        "-m",
        "kvstore",
        "index",
        "--config",
        str(config),
    ]
    with (folder / "index.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "ready" in line, (folder / "index.log").read_text()
        asking = object.__new__(Locator)
        asking.http = line.split("http=")[1].split()[0]
        yield asking
    finally:
        process.terminate()
        process.wait(20)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.skipif(not ROOT_AND_IP, reason="network namespaces need root and iproute2")
def test_a_link_that_is_cut_and_restored(tmp_path: Path) -> None:
    apart = Apart()
    try:
        key = tmp_path / "key"
        key.write_text(new_key())
        flags = events(tmp_path, feed=f"{apart.feed_here}:{free_ports(1)[0]}", key_file=str(key))
        with (
            Node("64MiB", *flags) as node,
            node.client() as store,
            index_apart(apart, tmp_path, node.endpoint("feed"), key) as index,
        ):

            def ask(**question: Any) -> Any:
                status, text = index.ask(body=question, token="secret")
                assert status == 200, text
                return {one["engine"]: one for one in json.loads(text)["placements"]}

            chance = random.Random(7)
            churn(store, chance, 30)
            wait_for(lambda: told(ask, "gpu-17") == truth(store), RIGHT_WITHIN_S)
            assert any(truth(store))
            apart.cut()
            churn(store, chance, 30)
            # It is not believed any more, and its age is said.
            wait_for(lambda: not any(told(ask, "gpu-17")))
            age_ms = ask(model="m", tokens=[1])["gpu-17"]["age_ms"]
            wait_for(lambda: ask(model="m", tokens=[1])["gpu-17"]["age_ms"] > age_ms + 500)
            apart.restore()
            wait_for(lambda: told(ask, "gpu-17") == truth(store), RIGHT_WITHIN_S)
    finally:
        apart.close()
