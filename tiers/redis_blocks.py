"""A Redis tier's conversation: blocks and headers, written, read and deleted by whichever thread calls.

Only blocks' bytes go straight between slots and redis-py's sockets (`tiers.resp`); all else redis-py says
itself, and what cannot go straight because a cluster just moves it, redis-py carries.
"""

import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import xxhash

from kvstore.errors import TierError
from tiers.base import Transfer
from tiers.header import Header, Names, NewerFormat, decode_header, encode_header, new_header
from tiers.redis_servers import CHANGING, RedisServers, socket_of
from tiers.resp import ServerError, Wire, command

logger = logging.getLogger(__name__)

# Parts of a block whose header has not come to stand by then are nobody's.
UNFINISHED_S: Final = 60
# Asked for ahead of the part that is being received; more only fills the server's buffers.
_AHEAD: Final = 2
# One line of the log at most in this time for blocks that are not as they should be.
_SILENCE_S: Final = 60.0
# Blocks deleted by one round of scripts.
_DELETED_AT_ONCE: Final = 256

# KEYS: the header, the parts. ARGV: the header's value, all parts' bytes, milliseconds to live or 0.
_COMMIT: Final = """
local size = 0
for i = 2, #KEYS do size = size + redis.call('STRLEN', KEYS[i]) end
local whole = size == tonumber(ARGV[2])
if not (whole and redis.call('SET', KEYS[1], ARGV[1], 'NX')) then
  for i = 2, #KEYS do redis.call('DEL', KEYS[i]) end
  return whole and 0 or -1
end
local life = tonumber(ARGV[3])
if life > 0 then redis.call('PEXPIRE', KEYS[1], life) end
for i = 2, #KEYS do
  if life > 0 then redis.call('PEXPIRE', KEYS[i], life + 1000) else redis.call('PERSIST', KEYS[i]) end
end
return 1
"""
# KEYS: the header, the parts. ARGV: the header's value, which must be what stands there for it to go.
_DELETE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
for i = 2, #KEYS do redis.call('DEL', KEYS[i]) end
"""


class RedisBlocks:
    """Blocks of the tier called `tier` on some servers. All methods block, and raise what FAILURES names.

    `newer_headers` counts headers of a later release, which are passed over.
    """

    def __init__(
        self, servers: RedisServers, names: Names, *, tier: str, ttl_ms: int, timeout_s: float
    ) -> None:
        self._servers = servers
        self._names = names
        self._tier = tier
        self._ttl_ms = ttl_ms
        self._timeout_s = timeout_s
        self._silent_until = 0.0
        self.newer_headers = 0
        self._name_to_mark: dict[str, bytes] = {}

    def check_open(self) -> None:
        """Raise TierError where the servers have not been opened."""
        _ = self._client

    # Whole blocks.

    def read(self, transfers: Sequence[Transfer]) -> None:
        """Fill each `memory`, or set `damaged` or `missing`."""
        deadline = time.monotonic() + self._timeout_s
        for pool, group in self._by_server(transfers):
            sums = {transfer: xxhash.xxh3_64() for transfer in group}
            with socket_of(pool) as sock:
                wire = Wire(sock, deadline)
                moved = _receive(wire, [step for t in group for step in self._steps(t)], sums)
            for transfer in moved:
                self._read_by_library(transfer, sums)
            for transfer, found in sums.items():
                if not transfer.missing and found.intdigest() != transfer.record.checksum:
                    transfer.damaged = True

    def write(self, transfers: Sequence[Transfer]) -> None:
        """Store what is not there already, and set each `record`, or `refused`."""
        deadline = time.monotonic() + self._timeout_s
        for pool, group in self._by_server([t for t in transfers if not t.dropped]):
            with socket_of(pool) as sock:
                moved = self._send(Wire(sock, deadline), group)
            for transfer in moved:
                self._write_by_library(transfer)

    def _send(self, wire: Wire, transfers: Sequence[Transfer]) -> list[Transfer]:
        """Write those that are not there; the answer are those that a cluster is just moving."""
        for transfer in transfers:
            wire.send(command("GET", self._name(transfer)))
        headers = {transfer: _header_of(transfer) for transfer in transfers}  # meanwhile
        moved: list[Transfer] = []
        absent: list[Transfer] = []
        for transfer, header in headers.items():
            try:
                standing = wire.reply()
            except ServerError as error:
                _unless_moved(error)
                moved.append(transfer)
                continue
            if standing is None:
                absent.append(transfer)
            else:
                self._second(transfer, header, standing)
        for transfer in absent:
            header = headers[transfer]
            for name, piece in self._pieces(transfer, header):
                wire.send(command("SET", name, piece, "PX", UNFINISHED_S * 1000))
            wire.send(command("EVAL", _COMMIT, header.parts + 1, *self._commit_of(header)))
        return moved + [t for t in absent if not self._answered(wire, t, headers[t])]

    def _answered(self, wire: Wire, transfer: Transfer, header: Header) -> bool:
        """Hear how one block's parts and header went; False if a cluster is just moving them."""
        error: ServerError | None = None
        for _ in range(header.parts):
            try:
                wire.reply()
            except ServerError as first:
                error = error or first
        try:
            outcome = wire.reply()
        except ServerError as last:
            error = error or last
        if error is not None:
            _unless_moved(error)
            return False
        self._committed(transfer, header, outcome)
        return True

    def _committed(self, transfer: Transfer, header: Header, outcome: Any) -> None:
        """Hear the script: 1, or 0 for another's header that stands, or -1 for parts that are gone."""
        if outcome == 1:
            transfer.record = header
            if transfer.dropped:
                self.delete([header], ())
        elif outcome == 0:
            self._second(transfer, header, self._client.get(self._name(transfer)))
        else:
            raise TierError(
                f"{self._tier} tier: {self._servers} has dropped parts of a block before it was whole; "
                "raise its maxmemory"
            )

    def _second(self, transfer: Transfer, header: Header, standing: Any) -> None:
        """Another's header stands: with the same bytes it will do, with others this block is not shared."""
        namespace = transfer.namespace
        other = self._decoded(standing, namespace.id, transfer.key) if isinstance(standing, bytes) else None
        if other is not None and other.same_block(header):
            transfer.record = other
            return
        transfer.refused = True
        if other is not None:
            self._warn(
                "%s %s is there with other bytes, written by somebody else; a key must name its content",
                namespace,
                transfer.key.hex(),
            )

    # Where a cluster's slot moves, by redis-py, which follows it.

    def _read_by_library(self, transfer: Transfer, sums: dict[Transfer, Any]) -> None:
        sums[transfer] = xxhash.xxh3_64()
        transfer.missing = False
        for name, piece in self._pieces(transfer, transfer.record):
            value = self._client.get(name)
            if value is None:
                transfer.missing = True
                return
            if len(value) == len(piece):
                piece[:] = value
            sums[transfer].update(value)

    def _write_by_library(self, transfer: Transfer) -> None:
        header = _header_of(transfer)
        try:
            for name, piece in self._pieces(transfer, header):
                self._client.set(name, piece, px=UNFINISHED_S * 1000)
            outcome = self._client.eval(_COMMIT, header.parts + 1, *self._commit_of(header))
        except CHANGING as error:
            # Several keys at once cannot be had from a slot that is half here, half there: later blocks can.
            logger.debug("%s tier: %s is not written: %s", self._tier, transfer.key.hex(), error)
            transfer.refused = True
        else:
            self._committed(transfer, header, outcome)

    # Headers, and little things.

    def headers(self, names: Sequence[tuple[bytes, bytes]]) -> list[Header | None]:
        """The headers that stand under these names, asked for in one batch."""
        pipeline = self._client.pipeline(transaction=False)
        for namespace_id, key in names:
            pipeline.get(self._names.header(namespace_id, key))
        return [
            None if value is None else self._decoded(value, namespace_id, key)
            for (namespace_id, key), value in zip(names, pipeline.execute(), strict=True)
        ]

    def delete(self, headers: Sequence[Header], names: Sequence[tuple[bytes, bytes]]) -> None:
        """Delete blocks as they were known, and whatever stands under `names`."""
        standing = [header for header in self.headers(names) if header is not None] if names else []
        doomed = [*headers, *standing]
        for start in range(0, len(doomed), _DELETED_AT_ONCE):
            pipeline = self._client.pipeline(transaction=False)
            for header in doomed[start : start + _DELETED_AT_ONCE]:
                keys = self._keys(header)
                # A cluster's pipeline has no `eval` of its own.
                pipeline.execute_command("EVAL", _DELETE, len(keys), *keys, encode_header(header))
            pipeline.execute()

    def mark(self) -> None:
        """Leave a mark on every server, or find that of others, by which to know it again.

        It has no time to live, and is looked at so often that it would be among the last to be evicted.
        """
        names = self._servers.covering(f"{self._names.prefix}:mark")
        for name in names:
            if self._client.get(name) is None:
                self._client.set(name, secrets.token_hex(8), nx=True)
        self._name_to_mark = {name: self._client.get(name) for name in names}

    def marked(self) -> bool:
        """Whether all marks are there; where one is not, somebody has flushed or emptied that server."""
        pipeline = self._client.pipeline(transaction=False)
        for name in self._name_to_mark:
            pipeline.get(name)
        return bool(pipeline.execute() == list(self._name_to_mark.values()))

    def probe(self) -> None:
        """Write and read a little on every server."""
        for name in self._servers.covering(f"{self._names.prefix}:probe:{secrets.token_hex(4)}"):
            self._client.set(name, b"probe", px=1000)
            if self._client.get(name) != b"probe":
                raise TierError(f"{self._tier} tier: {self._servers} does not give back what it was given")

    def _decoded(self, value: bytes, namespace_id: bytes, key: bytes) -> Header | None:
        """The header; one that is damaged would keep its name from being used, so it is deleted."""
        try:
            header = decode_header(value, namespace_id, key)
        except NewerFormat as newer:
            if not self.newer_headers:
                logger.warning("%s tier: headers of another release are passed over: %s", self._tier, newer)
            self.newer_headers += 1
            return None
        if header is None:
            name = self._names.header(namespace_id, key)
            self._warn("what stands under %s is no header; it is deleted", name)
            self._client.eval(_DELETE, 1, name, value)
        return header

    # Helpers.

    def _warn(self, text: str, *values: object) -> None:
        """One line of the log now and then; the counters have them all."""
        if time.monotonic() >= self._silent_until:
            self._silent_until = time.monotonic() + _SILENCE_S
            logger.warning(f"%s tier: {text}", self._tier, *values)

    @property
    def _client(self) -> Any:
        if self._servers.client is None:
            raise TierError(f"{self._tier} tier: {self._servers} is not open; recover it first")
        return self._servers.client

    def _name(self, transfer: Transfer) -> str:
        return self._names.header(transfer.namespace.id, transfer.key)

    def _keys(self, header: Header) -> list[str]:
        return [self._names.header(header.namespace.id, header.key), *self._names.parts(header)]

    def _commit_of(self, header: Header) -> list[Any]:
        return [*self._keys(header), encode_header(header), header.length, self._ttl_ms]

    def _pieces(self, transfer: Transfer, header: Header) -> Iterator[tuple[str, memoryview]]:
        """Each part's name and its place in memory."""
        if transfer.memory is None:
            raise ValueError("a transfer without memory cannot be read or written; give it whole pages")
        return zip(self._names.parts(header), header.pieces(transfer.memory), strict=True)

    def _steps(self, transfer: Transfer) -> Iterator[tuple[Transfer, str, memoryview]]:
        return ((transfer, name, piece) for name, piece in self._pieces(transfer, transfer.record))

    def _by_server(self, transfers: Sequence[Transfer]) -> Iterator[tuple[Any, list[Transfer]]]:
        """The transfers of each server, with its connections."""
        self.check_open()
        groups: dict[int, tuple[Any, list[Transfer]]] = {}
        for transfer in transfers:
            pool = self._servers.pool(self._name(transfer))
            groups.setdefault(id(pool), (pool, []))[1].append(transfer)
        return iter(groups.values())


def _receive(
    wire: Wire, steps: Sequence[tuple[Transfer, str, memoryview]], sums: dict[Transfer, Any]
) -> list[Transfer]:
    """Receive parts in their order, and sum them up; the answer are blocks that a cluster is just moving."""
    moved: dict[Transfer, None] = {}
    asked = 0
    for number, (transfer, _, piece) in enumerate(steps):
        while asked < min(len(steps), number + _AHEAD):
            wire.send(command("GET", steps[asked][1]))
            asked += 1
        try:
            length = wire.value_into(piece)
        except ServerError as error:
            _unless_moved(error)
            moved[transfer] = None
            continue
        if length is None:
            transfer.missing = True
        elif length != len(piece):
            transfer.damaged = True
        else:
            sums[transfer].update(piece)
    return list(moved)


def _unless_moved(error: ServerError) -> None:
    """Raise it, unless it says that another server of the cluster has the block, or will have."""
    if not str(error).startswith(("MOVED ", "ASK ", "TRYAGAIN ")):
        raise error


def _header_of(transfer: Transfer) -> Header:
    assert transfer.memory is not None
    if transfer.checksum is None:
        transfer.checksum = xxhash.xxh3_64_intdigest(transfer.memory[: transfer.length])
    return new_header(transfer.namespace, transfer.key, transfer.length, transfer.checksum)
