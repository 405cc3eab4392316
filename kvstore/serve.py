"""The composition root: the only place that names concrete tiers and joins them into a daemon."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from kvstore import logs
from kvstore.child import Child
from kvstore.config import Config, parse_endpoint
from kvstore.errors import ConfigError, KVStoreError
from kvstore.http_server import HttpServer, Readiness
from kvstore.index.settings import beside, registry_prefix
from kvstore.index.wire import load_key
from kvstore.listening import endpoint, listen_http, tls
from kvstore.live import Live, limits, quotas, tier_settings
from kvstore.memory import HUGE_PAGE_BYTES
from kvstore.metrics import exposition
from kvstore.node.arena import Arena, Listener
from kvstore.node.blocks import Block
from kvstore.node.directory import TierDirectory
from kvstore.node.handover import Heir, estate, send
from kvstore.node.http import node_app
from kvstore.node.lower import Lower
from kvstore.node.policy import POLICIES
from kvstore.node.server import Server, clear_stale_socket
from kvstore.node.store import Store
from kvstore.node.takeover import Inheritance, take_over
from kvstore.publishing import Publishing
from tiers.base import Slot, StorageTier
from tiers.dram import DramTier
from tiers.nvme import NvmeTier
from tiers.table import Table
from tiers.volume import Volume

logger = logging.getLogger(__name__)

_THREADS_END_WITHIN_S = 1.0
# Of the arena, or all of it where it is smaller, that must be populated for engines to be sent here.
_USEFUL_BYTES = 1 << 30


class Daemon:
    """One node: its tiers, its store and its sockets. `run` returns when it is told to stop."""

    def __init__(
        self, config: Config, read: Callable[[], Config], inherited: Inheritance | None = None
    ) -> None:
        assert config.dram is not None
        self._config = config
        slots: list[Slot] = []
        if inherited is None:
            self._dram = DramTier(config.dram.capacity_bytes)
        else:
            self._dram = DramTier(inherited.estate.capacity_bytes, inherited=inherited.arena_fd)
            slots = self._dram.claim(inherited.spans(), inherited.estate.ready_bytes)
        directory = TierDirectory(self._dram.name, self._dram.medium, POLICIES[config.dram.policy]())
        debug = os.environ.get("KVSTORE_DEBUG") == "1"
        listeners: list[Listener] = []
        arena = Arena(self._dram, directory, listeners, debug=debug)
        self._socket = Path(config.socket)
        epoch = _next_epoch(self._socket.with_suffix(".epoch"))
        missing_s = 0.0 if config.redis is None else config.redis.missing_s
        # Above all leases that go on, even where the clock was set back.
        first_lease = max([epoch, *[number + 1 for number in (inherited.lease_ids if inherited else [])]])
        self._store = Store(arena, _lowers(config, listeners), first_lease=first_lease, missing_s=missing_s)
        self._publishing: Publishing | None = None
        if config.events is not None:
            self._publishing = Publishing(
                config.events, self._store, registry_prefix(config), lambda: self._server.token
            )
            listeners.append(self._publishing.publisher)
        self._store.salts.set_quotas(quotas(config))
        self._stop = asyncio.Event()
        self._server = Server(
            self._store,
            [self._dram],
            node=config.node,
            epoch=epoch,
            stop=self._stop.set,
            token=config.token,
            limits=limits(config),
        )
        if self._publishing is not None:
            self._server.events = self._publishing
        self._live = Live(config, self._server, read)
        self._reloads: set[asyncio.Task[object]] = set()
        self._index: Child | None = None
        self._listening = False
        self._failed: BaseException | None = None
        self._unwritten: list[Block] = []
        if inherited is not None:
            self._unwritten = inherited.enter(self._store, self._server.quarantine, slots)
            self._store.movements.set_limit(arena, config.dram.capacity_bytes)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, or until another daemon has taken over, when the process ends here.

        Raises:
            ConfigError: an address is taken, or cannot be listened on.
            TierError: the system ran out of memory for the arena.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_soon)
        app = node_app(
            self.readiness,
            exposition(self._server.statistics),
            self._reload,
            lambda: self._server.token,
            self._store,
        )
        http = HttpServer(app)
        http_socket = listen_http(self._config.http)
        serving = loop.create_task(http.serve(sockets=[http_socket]))
        populating = threading.Thread(target=self._populate, args=(loop,), name="populate", daemon=True)
        populating.start()
        try:
            addresses = [f"http={endpoint(http_socket)}"]
            if self._publishing is not None:
                addresses += self._publishing.open(self._config.node, self._server.epoch)
            if self._config.data:
                host, port = parse_endpoint(self._config.data, "data")
                try:
                    port = await self._server.listen_tcp(host, port, tls(self._config))
                except (OSError, UnicodeError) as exc:
                    raise ConfigError(f"data address {self._config.data}: {exc}") from exc
                addresses.append(f"data={host}:{port}")
            await self._store.movements.start()
            await self._store.movements.demoter.offer(self._unwritten)
            self._unwritten.clear()
            self._server.start()
            await self._server.listen_unix(self._socket, mode=int(self._config.socket_mode, 8))
            self._listening = True
            # What is there by now stays, and blocks come and go by reference counts: a full collection, which
            # takes 60 ms with 100,000 blocks, would find nothing and stall the event loop.
            gc.freeze()
            print("kvstore ready:", f"socket={self._socket}", *addresses, flush=True)
            logger.info("node %s, epoch %d", self._config.node, self._server.epoch)
            if self._config.index.embedded and self._publishing is not None:
                self._index = Child("index", beside(self._config, self._publishing.feed))
                self._index.start()
            await self._stop.wait()
        finally:
            self._listening = False
            await self._end()
            if self._index is not None:
                await self._index.stop()
            if self._publishing is not None:
                await self._publishing.close()
            self._dram.close()
            http.should_exit = True
            await serving
            populating.join()
        if self._failed is not None:
            raise self._failed

    def readiness(self) -> Readiness:
        """Ready is who listens and has memory to give; a tier that fails is only left alone."""
        movements = self._store.movements
        if self._stop.is_set():
            return Readiness(["stopping" if self._server.heir is None else "handing over"])
        missing = []
        if not self._listening:
            missing = [
                "not listening",
                *[f"tier {low.name} is being recovered" for low in movements.lowers if low.starting],
            ]
        if self._store.drain.under_way:
            missing.append(f"draining, {self._store.drain.owed_blocks} blocks are owed below")
        dram = self._dram.statistics()
        if dram.ready_bytes < min(_USEFUL_BYTES, dram.capacity_bytes):
            missing.append(f"the arena is being populated: {dram.ready_bytes} of {dram.capacity_bytes} bytes")
        return Readiness(missing, movements.away())

    async def _end(self) -> None:
        """End all connections and all I/O. If there is an heir, hand the arena over and end the process."""
        heir, movements = self._server.heir, self._store.movements
        if heir is None:
            await self._server.hang_up()
            self._server.close()
            await movements.stop()
            return
        logger.info("another daemon takes over")
        ended = await self._server.hang_up()
        unwritten = movements.leave()
        if await movements.stop() and ended:
            # What could not be written meanwhile is among what is left now.
            self._hand_over(heir, unwritten | movements.leave())
        else:
            # A call that hangs may still reach its memory: over a network even when this process is gone.
            logger.warning("a tier hangs: nothing is handed over")
        heir.sock.close()
        self._server.close()

    def _hand_over(self, heir: Heir, unwritten: set[Block]) -> None:
        """Returns only when the heir is gone."""
        wards = self._server.quarantine.wards()
        pidfds = [pidfd for _, _, pidfd in wards if pidfd is not None]
        state = estate(self._store.arena, wards, unwritten)
        try:
            send(heir, self._dram.open(writable=True), state, pidfds)
        except OSError as exc:
            logger.warning("whoever wanted to take over is gone: %s", exc)
            return
        logger.info("handed over %d blocks, and the slots of %d processes", len(state.order), len(wards))
        logging.shutdown()
        os._exit(0)  # to take everything apart would only keep the heir waiting

    async def _reload(self) -> dict[str, list[str]]:
        return asdict(await self._live.reload())

    def _reload_soon(self) -> None:
        async def reload() -> None:
            with contextlib.suppress(ConfigError):  # the log says it
                await self._live.reload()

        task = asyncio.get_running_loop().create_task(reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    def _populate(self, loop: asyncio.AbstractEventLoop) -> None:
        def report(ready_bytes: int) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the daemon has stopped
                loop.call_soon_threadsafe(self._store.grow, ready_bytes)

        try:
            self._dram.populate(report)
        except KVStoreError as exc:
            self._failed = exc
            loop.call_soon_threadsafe(self._stop.set)


def stored_tier(path: Path) -> NvmeTier:
    """The tier in a directory that no daemon uses, as large as it was.

    Raises:
        ConfigError: there is none, or one whose files do not belong together.
    """
    head = Volume.head_of(path / "blocks") if path.is_dir() else None
    if head is None:
        raise ConfigError(f"{path} holds no tier; give the directory of one")
    table = Table.head_of(path / "table")
    if table is None or table.identity != head.identity or table.version != head.version:
        raise ConfigError(
            f"{path}: its table is damaged, or that of another tier; a daemon would begin anew there"
        )
    return NvmeTier(path, head.capacity_bytes)


def _inherited(config: Config) -> Inheritance | None:
    """The arena of the daemon that listens now, unless it is smaller than ours is to be."""
    assert config.dram is not None
    _lowers(config, [])
    tls(config)  # whatever is wrong with any of these, the other daemon goes on
    if config.events is not None and config.events.key_file:
        load_key(config.events.key_file)
    inherited = take_over(Path(config.socket))
    if inherited is None:
        return None
    has, wanted = inherited.estate.capacity_bytes, config.dram.capacity_bytes
    if wanted - has >= HUGE_PAGE_BYTES:
        logger.warning(
            "the arena handed over has %d bytes, and ours is to have %d: starting afresh", has, wanted
        )
        inherited.close()
        return None
    if has > wanted:
        logger.warning("the arena handed over has %d bytes; %d are used, the rest is kept", has, wanted)
    return inherited


def _lowers(config: Config, listeners: Sequence[Listener]) -> list[Lower]:
    """The tiers below the arena, fastest first."""
    lowers = []
    for tier, settings in zip(_storage_tiers(config), tier_settings(config), strict=True):
        directory = TierDirectory(tier.name, tier.medium, POLICIES[settings.policy]())
        lower = Lower(tier, directory, settings.rules, listeners)
        lower.turn(on=settings.enabled)
        lowers.append(lower)
    return lowers


def _storage_tiers(config: Config) -> list[StorageTier]:
    """One for each directory, and one for Redis."""
    tiers: list[StorageTier] = []
    if (nvme := config.nvme) is not None:
        for number, (path, capacity_bytes) in enumerate(nvme.places):
            name = f"nvme{number}" if len(nvme.places) > 1 else "nvme"
            tiers.append(NvmeTier(path, capacity_bytes, name=name, threads=nvme.threads))
    if (redis := config.redis) is not None:
        from tiers.redis import RedisPlace, RedisServers, RedisTier  # 0.1 s, for those who use it

        place = RedisPlace(**{knob.name: getattr(redis, knob.name) for knob in fields(RedisPlace)})
        tiers.append(
            RedisTier(
                RedisServers(place),
                prefix=redis.prefix,
                ttl_s=redis.ttl_s,
                known_blocks=redis.known_blocks,
                threads=redis.threads,
                timeout_s=redis.timeout_s,
            )
        )
    return tiers


def _next_epoch(path: Path) -> int:
    """A number above that of every earlier start, kept in a file so that no clock set back repeats one."""
    last = 0
    with contextlib.suppress(OSError, ValueError):
        last = int(path.read_text())
    epoch = max(time.time_ns(), last + 1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".epoch.new")
        new.write_text(f"{epoch}\n")
        new.rename(path)
    except OSError as exc:
        raise ConfigError(
            f"socket directory {path.parent}: {exc.strerror or exc}; give another --socket"
        ) from exc
    return epoch


def serve(config: Config, reload: Callable[[], Config]) -> None:
    """Run a daemon until it is told to stop. `reload` gives the configuration as it is by then.

    Raises:
        ConfigError: it has no arena, or what `Daemon.run` raises.
    """
    import uvloop

    if config.dram is None:
        raise ConfigError("no tier is configured; give --dram 4GiB, or [dram] capacity in the file")
    logs.configure(config.log_level, config.log_format, config.node)
    gc.set_threshold(20_000, 5, 1_000_000)  # see where it is frozen

    async def main() -> None:
        inherited = _inherited(config) if config.take_over else None
        await clear_stale_socket(Path(config.socket))  # before anything that another daemon would notice
        daemon = Daemon(config, reload, inherited)
        del inherited  # 20 MB with 100,000 blocks
        await daemon.run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    _leave_hanging_threads()


def _leave_hanging_threads() -> None:
    """End the process where a thread is in a call that does not return: the interpreter would wait for it."""
    others = [t for t in threading.enumerate() if t is not threading.current_thread() and not t.daemon]
    for thread in others:
        thread.join(_THREADS_END_WITHIN_S)
    if any(thread.is_alive() for thread in others):
        logger.warning("a tier hangs: leaving without waiting for it")
        logging.shutdown()
        os._exit(0)
