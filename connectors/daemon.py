"""The node's daemon as a connector sees it: there, or away. An engine goes on without its cache.

So a connector starts whether or not the daemon runs; a call that the daemon leaves unanswered is the last one
that anybody waits for; and until it answers again every call fails at once, with what is known of why. All of
that costs a request nothing: one thread notices in the background that the daemon has hung up, and looks
after it until it is back, so that the first request after a restart finds it.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kvstore.client import StoreClient
from kvstore.errors import (
    DeadlineExceeded,
    KVStoreError,
    ProtocolError,
    TransferTooSlow,
    Unauthorized,
    Unavailable,
)

logger = logging.getLogger(__name__)

# Between two looks at whether the connection stands, which ask the daemon nothing.
_PEEK_S: Final = 1.0
# Between two looks at a daemon that is away.
_LOOK_FIRST_S: Final = 0.05
_LOOK_MAX_S: Final = 1.0
# Between two lines of the log about what fails for another reason.
_COMPLAINT_S: Final = 10.0
# What says that the daemon is away, and not that the request was wrong.
_AWAY: Final = (DeadlineExceeded, ProtocolError, Unauthorized, Unavailable)


class Daemon:
    """A client of the daemon at `address`, for as long as the connector lives.

    A call waits at most `timeout_s` for its answer, beside what it asks the daemon to wait.

    Raises:
        InvalidRequest: the address is none.
    """

    def __init__(self, address: str, *, timeout_s: float, token: str | None = None) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._token = token
        self._client: StoreClient | None = None
        self._mover: StoreClient | None = None  # over TCP, made at first use
        self._mover_lock = threading.Lock()
        self._away: str | None = None  # why, once it is known to be
        self._complained = -_COMPLAINT_S
        self._lock = threading.Lock()
        self._stirred = threading.Event()  # something is to be looked at now
        self._closed = threading.Event()
        try:
            self._client = self._connect()
        except _AWAY as error:
            self._lost(error)
        threading.Thread(target=self._watch, name="kvstore-watch", daemon=True).start()

    @property
    def away(self) -> str | None:
        """Why the daemon cannot be asked now; None while it can."""
        client = self._client
        if self._away is None and client is not None and (why := client.lost) is not None:
            self._lost(Unavailable(why))
        return self._away

    @contextmanager
    def asking(self) -> Iterator[StoreClient]:
        """The client, for one task's calls. What they raise is passed on, and remembered if it is absence.

        Raises:
            Unavailable: the daemon is away, as far as is known; it was not asked.
        """
        client = self._standing()
        try:
            yield client
        except TransferTooSlow:
            raise
        except _AWAY as error:
            self._lost(error)
            raise

    @contextmanager
    def moving(self) -> Iterator[StoreClient]:
        """The client for calls that carry blocks' bytes; else as `asking`. Leases stay with their client.

        Over TCP it has a connection of its own, so that no question waits behind bytes. If that one breaks or
        is too slow while the daemon is there for questions, the call has failed and the daemon is not away.
        """
        with self.asking() as client:
            if client.shares_memory:
                yield client
                return
        try:
            yield self._moving()
        except TransferTooSlow:
            raise
        except Unavailable as error:
            if client.lost is not None:
                self._lost(error)
            raise
        except _AWAY as error:
            self._lost(error)
            raise

    def complain(self, error: KVStoreError) -> None:
        """Log, but seldom, what has failed though the daemon is there."""
        now = time.monotonic()
        if self._away is None and now - self._complained >= _COMPLAINT_S:
            self._complained = now
            logger.warning("%s; what fails in the next %.0f s is not logged", error, _COMPLAINT_S)

    def close(self) -> None:
        """End all leases and the connection. Calls under way fail."""
        self._closed.set()
        self._stirred.set()
        with self._lock:
            clients = self._client, self._mover
            self._client = self._mover = None
            self._away = "the connector is closed"
        for client in clients:
            if client is not None:
                client.close()

    # Helpers.

    def _connect(self) -> StoreClient:
        return StoreClient.connect(self.address, timeout_s=self._timeout_s, token=self._token)

    def _standing(self) -> StoreClient:
        client = self._client
        if self._away is not None or client is None:
            raise Unavailable(self._away or "the connector is closed")
        return client

    def _moving(self) -> StoreClient:
        """The second connection."""
        if self._mover is not None:
            return self._mover
        with self._mover_lock:
            self._standing()  # or everyone who waited here would find out for himself
            mover = self._mover or self._connect()
            with self._lock:
                if not self._closed.is_set():
                    self._mover = mover
                    return mover
        mover.close()
        raise Unavailable("the connector is closed")

    def _lost(self, error: KVStoreError) -> None:
        with self._lock:
            if self._away is not None:
                return
            self._away = str(error)
        logger.warning("%s; going on without the store until it is back", error)
        self._stirred.set()

    def _watch(self) -> None:
        """The thread that looks whether the daemon is there, and after an absent one until it answers."""
        pause_s = _PEEK_S
        while not self._closed.is_set():
            if self._stirred.wait(pause_s):
                self._stirred.clear()
                pause_s = _LOOK_FIRST_S
                continue
            try:
                is_back = self._look() if self.away is not None else self._peek_at_mover()
            except KVStoreError:
                is_back = True  # of the second connection, while questions are answered
            except Exception:  # whatever it was, somebody must go on looking
                logger.exception("looking after the daemon failed by a mistake")
                is_back = False
            pause_s = _PEEK_S if is_back else min(2 * pause_s, _LOOK_MAX_S)

    def _peek_at_mover(self) -> bool:
        """Let the second connection find out that it is lost, and connect anew."""
        mover = self._mover
        if mover is not None and mover.lost is not None:
            mover.statistics()
        return True

    def _look(self) -> bool:
        """Ask an absent daemon; whether it has answered."""
        client = self._client
        try:
            client = client or self._connect()
            client.statistics()
            self._peek_at_mover()  # nor is it back before that one is
        except (KVStoreError, OSError) as error:
            with self._lock:
                if not self._closed.is_set():
                    self._away = str(error)
        else:
            with self._lock:
                if not self._closed.is_set():
                    self._client, self._away = client, None
                    logger.info("the daemon at %s is back", self.address)
        if client is not None and client is not self._client:
            client.close()
        return self._away is None
