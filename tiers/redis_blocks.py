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
from tiers.resp import Piece, ServerError, Wire, command

logger = logging.getLogger(__name__)

# Under a node's own load a transfer is not to count as late that is slower than its time says but goes on.
SLOWEST_BYTES_PER_S: Final = 8e6
# Parts of a block whose header has not come to stand by then are nobody's.
UNFINISHED_S: Final = 60
# Asked for before it is received; more only fills the server's buffers (benchmarks redis).
_AHEAD_BYTES: Final = 2 << 20
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
# KEYS: the header, the parts. ARGV: the header's nonce, or all of it: it goes only if it has that.
_DELETE: Final = """
local header = redis.call('GET', KEYS[1])
if header and string.find(header, ARGV[1], 1, true) then redis.call('DEL', KEYS[1]) end
for i = 2, #KEYS do redis.call('DEL', KEYS[i]) end
"""


# A name to ask for, and where its value goes; a header has no such place.
_Step = tuple[Transfer, str, memoryview | None]


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
        deadline = self._deadline(transfers)
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
        deadline = self._deadline(transfers)
        for pool, group in self._by_server([t for t in transfers if not t.dropped]):
            with socket_of(pool) as sock:
                moved = self._send(Wire(sock, deadline), group)
            for transfer in moved:
                self._write_by_library(transfer)

    def _send(self, wire: Wire, transfers: Sequence[Transfer]) -> list[Transfer]:
        """Write those that are not there; the answer are those that a cluster is just moving."""
        wire.send([piece for transfer in transfers for piece in command("GET", self._name(transfer))])
        headers = {transfer: _header_of(transfer) for transfer in transfers[:1]}  # meanwhile
        moved: list[Transfer] = []
        absent: list[Transfer] = []
        for transfer in transfers:
            try:
                standing = wire.reply()
            except ServerError as error:
                if _is_moving(error):
                    moved.append(transfer)
                else:
                    transfer.refused = True
                continue
            if standing is None:
                absent.append(transfer)
            else:
                self._second(transfer, _header_of(transfer), standing)
        for transfer in absent:
            # Summed up just before they are sent, the bytes come from memory once.
            header = headers[transfer] = headers.get(transfer) or _header_of(transfer)
            pieces: list[Piece] = []
            for name, part in self._pieces(transfer, header):
                pieces += command("SET", name, part, "PX", UNFINISHED_S * 1000)
            wire.send([*pieces, *command("EVAL", _COMMIT, header.parts + 1, *self._commit_of(header))])
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
        if error is None:
            self._committed(transfer, header, outcome)
            return True
        transfer.refused = not _is_moving(error)
        return transfer.refused

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
        transfer.missing = not _names(self._client.get(self._name(transfer)), transfer)
        for name, piece in self._pieces(transfer, transfer.record):
            value = None if transfer.missing else self._client.get(name)
            if value is None or len(value) != len(piece):
                transfer.missing = value is None
                transfer.damaged = value is not None
                return
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
        values = self._servers.values([self._names.header(*name) for name in names])
        return [
            None if value is None else self._decoded(value, namespace_id, key)
            for (namespace_id, key), value in zip(names, values, strict=True)
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
                pipeline.execute_command("EVAL", _DELETE, len(keys), *keys, header.nonce)
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

    def _steps(self, transfer: Transfer) -> Iterator[_Step]:
        """The header too, not only to see that it stands: or an LRU would find it the coldest of all."""
        yield transfer, self._name(transfer), None
        for name, piece in self._pieces(transfer, transfer.record):
            yield transfer, name, piece

    def _deadline(self, transfers: Sequence[Transfer]) -> float:
        nbytes = sum([transfer.length for transfer in transfers])
        return time.monotonic() + self._timeout_s + nbytes / SLOWEST_BYTES_PER_S

    def _by_server(self, transfers: Sequence[Transfer]) -> Iterator[tuple[Any, list[Transfer]]]:
        """The transfers of each server, with its connections."""
        self.check_open()
        groups: dict[int, tuple[Any, list[Transfer]]] = {}
        for transfer in transfers:
            pool = self._servers.pool(self._name(transfer))
            groups.setdefault(id(pool), (pool, []))[1].append(transfer)
        return iter(groups.values())


def _receive(wire: Wire, steps: Sequence[_Step], sums: dict[Transfer, Any]) -> list[Transfer]:
    """Receive what the steps name, and sum parts up; the answer are blocks that a cluster is just moving."""
    moved: dict[Transfer, None] = {}
    asked = ahead_bytes = 0

    def ask() -> None:
        nonlocal asked, ahead_bytes
        pieces: list[Piece] = []
        while asked < len(steps):
            _, name, piece = steps[asked]
            if ahead_bytes and ahead_bytes + len(piece or b"") > _AHEAD_BYTES:
                break
            pieces += command("GET", name)
            ahead_bytes += len(piece or b"")
            asked += 1
        wire.send(pieces)

    ask()
    for transfer, _, piece in steps:
        length = None
        try:
            if piece is None:
                length = 0 if _names(wire.reply(), transfer) else None
            else:
                length = wire.value_into(piece)
        except ServerError as error:
            if _is_moving(error):
                moved[transfer] = None
        ahead_bytes -= len(piece or b"")
        ask()  # before summing up, so that the server goes on meanwhile
        if length is None:
            transfer.missing = True
        elif length != len(piece or b""):
            transfer.damaged = True
        elif piece is not None:
            sums[transfer].update(piece)
    return list(moved)


def _names(header: Any, transfer: Transfer) -> bool:
    """Whether that is the header whose parts are to be read."""
    return isinstance(header, bytes) and transfer.record.nonce in header


def _is_moving(error: ServerError) -> bool:
    """Whether another server of the cluster has the block, or will have; else it is the block's own fault.

    Raises:
        ServerError: it is the server's.
    """
    if str(error).startswith(("MOVED ", "ASK ", "TRYAGAIN ")):
        return True
    if str(error).startswith("WRONGTYPE "):  # somebody else's use of our names
        return False
    raise error


def _header_of(transfer: Transfer) -> Header:
    assert transfer.memory is not None
    if transfer.checksum is None:
        transfer.checksum = xxhash.xxh3_64_intdigest(transfer.memory[: transfer.length])
    return new_header(transfer.namespace, transfer.key, transfer.length, transfer.checksum)
