"""The node's daemon as a connector sees it: there, or away. An engine goes on without its cache.

So a connector starts whether or not the daemon runs; a call that the daemon leaves unanswered is the last one
that anybody waits for; and until it answers again every call fails at once, with what is known of why. All of
that costs a request nothing: one thread looks after an absent daemon, in the background.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kvstore.client import StoreClient
from kvstore.errors import DeadlineExceeded, KVStoreError, ProtocolError, Unauthorized, Unavailable

logger = logging.getLogger(__name__)

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
        self._away: str | None = None  # why, once it is known to be
        self._watched = False
        self._complained = -_COMPLAINT_S
        self._lock = threading.Lock()
        self._closed = threading.Event()
        try:
            self._client = self._connect()
        except _AWAY as error:
            self._lost(error)

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
        client = self._client
        if self._away is not None or client is None:
            raise Unavailable(self._away or "the connector is closed")
        try:
            yield client
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
        with self._lock:
            client, self._client = self._client, None
            self._away = "the connector is closed"
        if client is not None:
            client.close()

    # Helpers.

    def _connect(self) -> StoreClient:
        return StoreClient.connect(self.address, timeout_s=self._timeout_s, token=self._token)

    def _lost(self, error: KVStoreError) -> None:
        with self._lock:
            if self._watched or self._closed.is_set():
                return
            self._watched = True
            self._away = str(error)
        logger.warning("%s; going on without the store until it is back", error)
        threading.Thread(target=self._watch, name="kvstore-watch", daemon=True).start()

    def _watch(self) -> None:
        """Look after an absent daemon until it answers."""
        pause_s = _LOOK_FIRST_S
        while not self._closed.wait(pause_s):
            pause_s = min(2 * pause_s, _LOOK_MAX_S)
            try:
                client = self._client or self._connect()
                client.statistics()
            except (KVStoreError, OSError) as error:
                self._away = str(error)
                continue
            except Exception:  # whatever it was, somebody must go on looking
                logger.exception("looking after the daemon failed by a mistake")
                continue
            with self._lock:
                if self._closed.is_set():
                    client.close()
                    return
                self._client, self._away, self._watched = client, None, False
            logger.info("the daemon at %s is back", self.address)
            return
