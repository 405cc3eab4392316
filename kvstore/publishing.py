"""What a daemon publishes with: the outbox, who fills it, the sockets that empty it. It only joins them."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import zmq

from kvstore.block import Medium
from kvstore.index.announcer import Announcer
from kvstore.index.feed import SPACES_MAX, Measures, SpaceMeasure
from kvstore.index.feed_holds import FeedHolds
from kvstore.index.feed_server import FeedServer
from kvstore.index.outbox import Outbox
from kvstore.index.registry import Registration
from kvstore.index.wire import load_key
from kvstore.knobs import EventsConfig, parse_endpoint
from kvstore.node import measuring
from kvstore.node.store import Store
from kvstore.publisher import Publisher
from kvstore.statistics import EventsState

# Namespaces looked at in each tier for those with most blocks: 1 ms.
_LOOKED: Final = 1024


class Publishing:
    """Follows a store from the start; `open` lets others follow it."""

    def __init__(
        self, config: EventsConfig, store: Store, prefix: str, token: Callable[[], str | None]
    ) -> None:
        """`prefix` is what names in a registry begin with, `token` what clients off the node must know.

        Raises:
            ConfigError: the key cannot be read.
        """
        self._config = config
        self._store = store
        self._prefix = prefix
        self._token = token
        self._copying: asyncio.Future[measuring.Measured] | None = None
        self._secret = load_key(config.key_file) if config.key_file else None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._outbox = Outbox()
        self.publisher = Publisher(store.directory.tiers, self._outbox, tokens=config.tokens)
        self._feed: FeedServer | None = None
        self._holds = FeedHolds(store.holds, self._refusal)
        self._announcer: Announcer | None = None
        self._registration: Registration | None = None

    def open(self, node: str, epoch: int) -> list[str]:
        """Listen. The answer names the addresses.

        Raises:
            ConfigError: one is taken, or cannot be listened on.
        """
        config = self._config
        self._copying = asyncio.get_running_loop().run_in_executor(None, measuring.copying)
        self._feed = FeedServer(
            self._context,
            parse_endpoint(config.feed, "events.feed"),
            self._outbox,
            self.publisher,
            node=node,
            epoch=epoch,
            engines=config.engine_addresses,
            topology=config.topology,
            secret=self._secret,
            measure=self._measure,
            holds=self._holds,
        )
        if config.registry:
            self._registration = Registration(
                config.registry,
                prefix=self._prefix,
                node=node,
                feed=config.advertise or self._feed.endpoint,
                epoch=epoch,
                engines=config.engine_addresses,
            )
            self._registration.start()
        if not config.engines:
            return [f"feed={self._feed.endpoint}"]
        self._announcer = Announcer(
            self._context,
            config.engines,
            self.publisher.tokens_of,
            publish=parse_endpoint(config.publish, "events.publish"),
            replay=parse_endpoint(config.replay, "events.replay"),
            each=config.ports == "each",
            arrays=config.format == "arrays",
            first_seq=epoch,
            clear=config.clear,
        )
        self._outbox.follow(self._announcer.announce)
        publish, replay = self._announcer.endpoints
        return [f"feed={self._feed.endpoint}", f"publish={publish}", f"replay={replay}"]

    def _refusal(self) -> str:
        """Why nobody who follows the feed may hold blocks; empty if they may.

        Who has the key may, and where there is no token to know, everybody who can connect.
        """
        if self._secret is not None or self._token() is None:
            return ""
        return "this daemon has a token, and its feed no key: give its [events] and the index one key_file"

    def _measure(self) -> Measures:
        speeds = measuring.loading(self._store.movements.lowers)
        if self._copying is not None and self._copying.done() and not self._copying.exception():
            speeds[Medium.DRAM] = self._copying.result()
        spaces = measuring.fullest(self._store.directory.tiers, _LOOKED, SPACES_MAX)
        return Measures(
            {medium: (one.latency_s, one.bytes_per_s) for medium, one in speeds.items()},
            [
                SpaceMeasure(replace(space, salt="").canonical, blocks, nbytes)
                for space, blocks, nbytes in spaces
            ],
        )

    @property
    def feed(self) -> str:
        """HOST:PORT of the feed, once it is open."""
        return "" if self._feed is None else self._feed.endpoint

    async def close(self) -> None:
        """Tell nobody anything more."""
        if self._registration is not None:
            await self._registration.stop()
        self._outbox.close()
        if self._feed is not None:
            self._feed.close()
        if self._announcer is not None:
            self._announcer.close()
        self._context.destroy(linger=0)

    def check(self) -> list[str]:
        """What was told otherwise than it is."""
        self._outbox.flush()
        return self.publisher.check()

    def statistics(self) -> EventsState:
        """As of now."""
        outbox, feed, announcer = self._outbox, self._feed, self._announcer
        return EventsState(
            seq=outbox.seq,
            frames=len(outbox.frames),
            frame_bytes=outbox.frames_bytes,
            stored_blocks=outbox.stored_blocks,
            removed_blocks=outbox.removed_blocks,
            subscribers=0 if feed is None else feed.subscribers,
            dropped=0 if feed is None else feed.dropped,
            refused=(0 if feed is None else feed.refused) + (0 if announcer is None else announcer.refused),
            topics=0 if announcer is None else announcer.topics,
            refused_holds=self._holds.refused,
        )
