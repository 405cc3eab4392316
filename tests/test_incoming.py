"""What comes over a client's socket, piece by piece."""

import os
import socket
import threading
import time

from kvstore import protocol
from kvstore.incoming import Incoming
from kvstore.protocol import frame
from tests.node import open_files


def soon() -> float:
    """Long enough for what has been sent already."""
    return time.monotonic() + 0.05


def test_an_answer_that_comes_in_pieces_is_taken_up_by_whoever_reads_next() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        incoming = Incoming(ours, 5.0, threading.Lock())
        payload = bytes(range(256)) * 1000
        data = frame(7, protocol.Done(), len(payload)) + payload + frame(8, protocol.Done())
        for start in range(0, len(data), 40_001):
            assert incoming.next(soon) is None
            theirs.sendall(data[start : start + 40_001])
        arrival = incoming.next(soon)
        assert arrival is not None
        request_id, answer, received = arrival
        assert (request_id, answer) == (7, protocol.Done())
        assert received is not None
        assert bytes(received) == payload
        assert incoming.next(soon) == (8, protocol.Done(), None)
        incoming.close()


def test_a_descriptor_that_came_with_half_an_answer_is_closed_with_the_socket() -> None:
    before = open_files(os.getpid())
    ours, theirs = socket.socketpair()
    with theirs:
        incoming = Incoming(ours, 5.0, threading.Lock())
        incoming.fds_wanted = True
        with open(os.devnull) as file:
            socket.send_fds(theirs, [frame(1, protocol.Done())[:5]], [file.fileno()])
        assert incoming.next(soon) is None
        incoming.close()
    assert open_files(os.getpid()) == before
