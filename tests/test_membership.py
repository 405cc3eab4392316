"""Who is a member: by a list, by DNS, by Redis, and what failing sources take from it, which is nothing."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, suppress

import pytest

from kvstore.errors import ConfigError
from kvstore.index import membership
from kvstore.index.member import Member, checked_address
from kvstore.index.membership import Listed, Membership, Resolved, source_of
from kvstore.index.registry import TTL_S, Registered, Registration
from tests.redis_servers import Server

A, B = Member("10.0.0.1:7404"), Member("10.0.0.2:7404")


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Server:
    shared.client.flushall()
    return shared


class Said:
    """A source that says what it is told to."""

    def __init__(self, *members: Member) -> None:
        self.label = "said"
        self.period_s = 0.01
        self.rubbish = 0
        self.says: Collection[Member] | Exception = members
        self.asked = 0

    async def members(self) -> Collection[Member]:
        self.asked += 1
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    async def close(self) -> None:
        """Nothing."""


class Watch:
    """A membership of some sources, and what it has told."""

    def __init__(self, *sources: membership.Source) -> None:
        self.heard: set[Member] = set()
        self.told: list[tuple[set[Member], set[Member]]] = []
        self.membership = Membership(sources, self._changed, self.heard.__contains__)

    def _changed(self, joined: Collection[Member], left: Collection[Member]) -> None:
        self.told.append((set(joined), set(left)))

    @property
    def members(self) -> set[Member]:
        """Those there are."""
        return set(self.membership.members)

    async def until(self, condition: Callable[[], object]) -> None:
        """Until the condition holds; fails when it does not within the time."""
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            await asyncio.sleep(0.005)

    async def asked(self, source: Said, times: int = 3) -> None:
        """Until the source has been asked so often again."""
        before = source.asked
        await self.until(lambda: source.asked >= before + times)


def run(scenario: Callable[[Watch], Awaitable[None]], *sources: membership.Source) -> None:
    """A scenario with a membership that has begun."""

    async def whole() -> None:
        watch = Watch(*sources)
        watch.membership.start()
        try:
            await scenario(watch)
        finally:
            await watch.membership.close()

    asyncio.run(whole())


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience runs out soon."""
    monkeypatch.setattr(membership, "GRACE_S", 0.05)
    monkeypatch.setattr(membership, "KEPT_S", 0.3)


def test_listed_daemons_are_members_from_the_start_on() -> None:
    async def scenario(watch: Watch) -> None:
        await watch.until(lambda: watch.members == {A, Member("[::1]:7404", "node-b")})
        assert watch.membership.statistics().members == 2

    run(scenario, source_of("10.0.0.1:7404"), source_of("node-b=[0:0::1]:7404"))


@pytest.mark.parametrize(
    "place",
    [
        "",
        "7404",
        "10.0.0.1",
        "10.0.0.1:0",
        "10.0.0.1:65536",
        "10.0.0.1:x",
        "node-b:7404",
        "node=node-b:7404",
        "dns://node-b",
        "http://node-b:80",
        "redis+cluster://a:1,b:2",
    ],
)
def test_a_place_that_is_none_is_refused_with_what_to_give(place: str) -> None:
    with pytest.raises(ConfigError, match="give"):
        source_of(place)


def test_a_password_is_not_told() -> None:
    with pytest.raises(ConfigError) as error:
        source_of("redis+cluster://user:hidden@a:1")
    assert "hidden" not in str(error.value)
    assert source_of("redis://user:hidden@a:1/3").label == "redis://a:1/3"


def test_who_leaves_stays_for_the_grace_and_as_long_as_it_is_heard(hasty: None) -> None:
    source = Said(A, B)

    async def scenario(watch: Watch) -> None:
        await watch.until(lambda: watch.members == {A, B})
        watch.heard.add(A)
        source.says = ()
        await watch.until(lambda: watch.members == {A})
        await watch.asked(source, 20)
        assert watch.members == {A}
        watch.heard.clear()
        await watch.until(lambda: not watch.members)
        assert watch.told == [({A, B}, set()), (set(), {B}), (set(), {A})]

    run(scenario, source)


def test_who_is_back_within_the_grace_never_left() -> None:
    source = Said(A)

    async def scenario(watch: Watch) -> None:
        await watch.until(lambda: watch.members)
        for says in ((), (A,)):
            source.says = says
            await watch.asked(source)
        assert watch.told == [({A}, set())]

    run(scenario, source)


def test_sources_are_put_together_and_a_name_from_either_is_known() -> None:
    async def scenario(watch: Watch) -> None:
        await watch.until(lambda: watch.members == {Member(A.address, "node-a"), B})

    run(scenario, Said(A, B), Said(Member(A.address, "node-a")), Said(A))


def test_another_daemon_at_an_address_takes_the_place_of_the_one_before() -> None:
    before, after = Member(A.address, "node-a"), Member(A.address, "node-b")
    source = Said(before)

    async def scenario(watch: Watch) -> None:
        await watch.until(lambda: watch.members == {before})
        source.says = (after,)
        await watch.until(lambda: watch.members == {after})
        assert watch.told[-1] == ({after}, {before})

    run(scenario, source)


def test_a_source_that_fails_keeps_what_it_said_for_a_while_and_says_so_once(
    hasty: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = Said(A)

    async def scenario(watch: Watch) -> None:
        await watch.until(lambda: watch.members)
        source.says = OSError("no resolver answers")
        await watch.asked(source)
        (state,) = watch.membership.statistics().sources
        assert (state.members, state.failing) == (1, "no resolver answers")
        assert watch.members == {A}
        await watch.until(lambda: not watch.members)
        source.says = (A,)
        await watch.until(lambda: watch.members)
        (state,) = watch.membership.statistics().sources
        assert (state.failing, state.failures > 2) == ("", True)

    run(scenario, source)
    assert [record.message for record in caplog.records if "said" in record.message] == [
        "members from said fails: no resolver answers",
        "members from said is back",
    ]


def test_of_a_claim_of_too_many_the_first_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MEMBERS_MAX", 5)
    source = Said(*[Member(f"10.0.1.{number}:7404") for number in range(9)])

    async def scenario(watch: Watch) -> None:
        await watch.asked(source, 5)
        assert len(watch.members) == 5

    run(scenario, source)


def test_the_addresses_of_a_host_are_members() -> None:
    async def scenario(watch: Watch) -> None:
        await watch.until(lambda: watch.members)
        assert watch.members <= {Member("127.0.0.1:7404"), Member("[::1]:7404")}

    run(scenario, source_of("dns://localhost:7404"))


def test_a_host_without_an_address_fails() -> None:
    async def scenario(watch: Watch) -> None:
        await watch.until(lambda: watch.membership.statistics().sources[0].failing)
        assert watch.members == set()

    run(scenario, source_of("dns://nobody.invalid:7404"))


@pytest.mark.parametrize("host", ["x" * 64, "a..b", "\udcff"])
def test_a_host_whose_name_is_none_fails(host: str) -> None:
    async def scenario() -> None:
        with pytest.raises(OSError):
            await Resolved(host, 7404).members()

    asyncio.run(scenario())


def test_an_empty_answer_of_dns_is_a_failure_and_a_changed_one_is_followed(hasty: None) -> None:
    answer = ["10.0.0.1", "10.0.0.2"]

    async def resolve(host: str, port: int) -> Collection[str]:
        assert (host, port) == ("kvstore-nodes", 7404)
        return list(answer)

    source = Resolved("kvstore-nodes", 7404, resolve)
    source.period_s = 0.01

    async def scenario(watch: Watch) -> None:
        await watch.until(lambda: watch.members == {A, B})
        answer.clear()
        await watch.until(lambda: watch.membership.statistics().sources[0].failing)
        assert watch.members == {A, B}
        answer.append("10.0.0.2")
        await watch.until(lambda: watch.members == {B})

    run(scenario, source)


def test_a_resolver_that_hangs_is_asked_once_and_answers_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_DEADLINE_S", 0.05)
    asked = []

    async def scenario() -> None:
        released = asyncio.Event()

        async def resolve(host: str, port: int) -> Collection[str]:
            asked.append(host)
            await released.wait()
            return ["10.0.0.1"]

        source = Resolved("slow", 7404, resolve)
        source.period_s = 0.01
        watch = Watch(source)
        watch.membership.start()
        await watch.until(lambda: watch.membership.statistics().sources[0].failures > 3)
        assert asked == ["slow"]
        released.set()
        await watch.until(lambda: watch.members == {A})
        released.clear()
        await watch.until(lambda: len(asked) == 2)
        await watch.membership.close()

    asyncio.run(scenario())


def registered(server: Server, feed: str = A.address, node: str = "node-a", epoch: int = 1) -> Registration:
    """A daemon's registration."""
    return Registration(server.url, node=node, feed=feed, epoch=epoch, engines=["10.0.0.1:8000"])


@asynccontextmanager
async def registry(server: Server) -> AsyncIterator[Registered]:
    """What an index reads."""
    source = Registered(server.url, "kvstore")
    try:
        yield source
    finally:
        await source.close()


async def listed(source: Registered, *members: Member) -> None:
    """Until the registry has exactly these."""
    deadline = time.monotonic() + 20
    while True:
        with suppress(OSError):
            if set(await source.members()) == set(members):
                return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_daemon_registers_and_is_found_and_takes_its_key_away(server: Server) -> None:
    async def scenario() -> None:
        daemons = [registered(server), registered(server, "[::1]:7404", "node-b")]
        async with registry(server) as source:
            for daemon in daemons:
                daemon.start()
            await listed(source, Member(A.address, "node-a"), Member("[::1]:7404", "node-b"))
            value = b'{"feed":"10.0.0.1:7404","epoch":1,"engines":["10.0.0.1:8000"]}'
            assert server.client.get("kvstore:node:node-a") == value
            assert 0 < server.client.ttl("kvstore:node:node-a") <= TTL_S
            await daemons[0].stop()
            await listed(source, Member("[::1]:7404", "node-b"))
            await daemons[1].stop()
            await listed(source)

    asyncio.run(scenario())


def test_the_key_of_a_later_life_is_left_alone(server: Server) -> None:
    async def scenario() -> None:
        first, second = registered(server), registered(server, B.address, epoch=2)
        async with registry(server) as source:
            first.start()
            await listed(source, Member(A.address, "node-a"))
            second.start()
            await listed(source, Member(B.address, "node-a"))
            await first.stop()
            await listed(source, Member(B.address, "node-a"))
            await second.stop()

    asyncio.run(scenario())


def test_a_daemon_that_is_gone_without_a_word_is_on_no_list_when_its_key_has_expired(server: Server) -> None:
    async def scenario() -> None:
        async with registry(server) as source:
            daemon = registered(server)
            daemon.start()
            await listed(source, Member(A.address, "node-a"))
            daemon._task.cancel()
            server.client.pexpire("kvstore:node:node-a", 1)
            await listed(source)
            await daemon.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"garbage",
        b"[]",
        b"{}",
        b'{"feed": 1, "epoch": 1}',
        b'{"feed": "node-a:7404", "epoch": 1}',
        b'{"feed": "10.0.0.1:99999", "epoch": 1}',
        b'{"feed": "10.0.0.1:7404", "epoch": "x"}',
        b"[" * 100_000,
        b'{"feed": "\xff:7404", "epoch": 1}',
        b'{"feed": "10.0.0.1:7404", "epoch": 1, "engines": ["' + b"x" * 100_000 + b'"]}',
    ],
)
def test_rubbish_in_redis_is_counted_and_the_others_found(server: Server, value: bytes) -> None:
    async def scenario() -> None:
        async with registry(server) as source:
            daemon = registered(server, B.address, "node-b")
            daemon.start()
            server.client.set("kvstore:node:node-a", value)
            server.client.zadd("kvstore:nodes", {"node-a": 1, b"\xff\xfe": 2, "nobody": 3})
            server.client.set(b"kvstore:node:\xff\xfe", b'{"feed": "10.0.0.3:7404", "epoch": 1}')
            await listed(source, Member(B.address, "node-b"))
            assert source.rubbish >= 2
            await daemon.stop()

    asyncio.run(scenario())


def test_keys_of_another_type_are_a_failure(server: Server) -> None:
    server.client.set("kvstore:nodes", "not a list")

    async def scenario() -> None:
        async with registry(server) as source:
            with pytest.raises(OSError, match="wrong kind"):
                await source.members()
            daemon = registered(server)
            daemon.start()
            await daemon.stop()

    asyncio.run(scenario())


def test_redis_away_costs_a_daemon_a_line_and_an_index_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvstore.index.registry.BEAT_S", 0.05)
    caplog.set_level(logging.INFO)

    async def scenario(server: Server) -> None:
        source = source_of(server.url)
        source.period_s = 0.05
        watch = Watch(source)
        watch.membership.start()
        daemon = registered(server)
        daemon.start()
        known = {Member(A.address, "node-a")}
        await watch.until(lambda: watch.members == known)
        server.kill()
        await watch.until(lambda: watch.membership.statistics().sources[0].failures > 3)
        await watch.until(lambda: "registering" in caplog.text)
        assert watch.members == known
        server.start()
        await watch.until(lambda: not watch.membership.statistics().sources[0].failing)
        await watch.until(lambda: server.client.get("kvstore:node:node-a"))
        await watch.until(lambda: caplog.text.count(" is back") == 2)
        assert watch.members == known
        with server.stopped():  # it takes connections and answers nothing
            began_s = time.monotonic()
            await daemon.stop()
            assert time.monotonic() - began_s < 5.0
        await watch.membership.close()

    with Server() as server:
        asyncio.run(scenario(server))
    assert caplog.text.count(" fails: ") in (2, 3)


def test_a_registration_needs_an_address_that_others_can_reach() -> None:
    with pytest.raises(ConfigError, match="no IP address"):
        Registration("redis://127.0.0.1:1", node="n", feed="node-a:7404", epoch=1)
    with pytest.raises(ConfigError, match="give redis://"):
        Registration("http://127.0.0.1:1", node="n", feed="10.0.0.1:7404", epoch=1)
    assert checked_address("[0::1]:7404") == "[::1]:7404"


def test_a_registration_that_never_began_can_be_stopped(server: Server) -> None:
    asyncio.run(registered(server).stop())


def test_a_listed_member_is_said_as_often_as_asked() -> None:
    assert asyncio.run(Listed(A).members()) == [A]
