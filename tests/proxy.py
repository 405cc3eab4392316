"""A connection that tests can listen to, hold up and slow down."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self


class Proxy:
    """Passes connections on to an address, and keeps what went by in either direction.

    What goes up waits for `up_open`, and what goes down for `down_open`; both are set at first. No direction
    of a connection is faster than `bytes_per_s`.
    """

    def __init__(self, target: tuple[str, int], bytes_per_s: float = float("inf")) -> None:
        self._target = target
        self._bytes_per_s = bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        # Or it would take in a large payload by itself.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self._clients: list[socket.socket] = []
        self.up = bytearray()
        self.down = bytearray()
        self.up_open, self.down_open = threading.Event(), threading.Event()
        self.up_open.set()
        self.down_open.set()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def connections(self) -> int:
        """How many it has had."""
        return len(self._clients)

    def hang_up(self, number: int) -> None:
        """End one of them, counted from 0."""
        self._clients[number].shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                client, _ = self._listener.accept()
                self._clients.append(client)
                thread = threading.Thread(target=self._serve, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.socket() as daemon:
            daemon.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            daemon.connect(self._target)
            back = threading.Thread(target=self._pass_on, args=(daemon, client, self.down, self.down_open))
            back.start()
            self._pass_on(client, daemon, self.up, self.up_open)
            back.join()

    def _pass_on(
        self, source: socket.socket, sink: socket.socket, seen: bytearray, is_open: threading.Event
    ) -> None:
        try:
            while data := source.recv(1 << 16):
                is_open.wait(20)
                seen += data
                sink.sendall(data)
                self._closed.wait(len(data) / self._bytes_per_s)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # either side may end without a word
            for side in (source, sink):
                with contextlib.suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self.up_open.set()
        self.down_open.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        self._listener.close()
