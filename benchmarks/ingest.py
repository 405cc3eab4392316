"""What it costs the index to learn what publishers say, how soon it knows it, and how it forgets."""

import os
from typing import Final

from benchmarks import index_events, index_life, index_memory, index_processes
from benchmarks.harness import Report, Settings, Target, judge
from benchmarks.peers import dynamo
from benchmarks.processes import pin

BENCH: Final = "ingest"
TARGETS: Final = (
    Target((index_events.LONG,), None, 1e6),
    Target((f"{index_processes.LONG}, CPU",), index_processes.INDEXER, 1.0),
    Target((index_memory.CASE,), None, 120.0),
    Target((f"{index_life.KNOWN}, p99",), None, 10.0),
    Target((index_life.STALL,), None, 20.0),
)


def run(settings: Settings) -> Report:
    """In this process, in others beside Dynamo's, and from a node to a lookup."""
    absent = dynamo.missing()
    pin(os.getpid(), {settings.cores.client})
    try:
        rows = index_events.rows(BENCH, settings, with_tree=absent is None)
        rows += index_processes.rows(BENCH, settings, with_dynamo=absent is None)
        rows += index_memory.rows(BENCH, settings, with_tree=absent is None)
        rows += index_life.dead_rows(BENCH, settings)
    finally:
        pin(os.getpid(), settings.cores.all)
    rows += index_life.known_rows(BENCH, settings)
    versions = {} if absent else {"dynamo": dynamo.installed_version()}
    missing = {"dynamo": absent} if absent else {}
    return Report(BENCH, rows, judge(rows, TARGETS), _caption(settings), versions, missing)


def _caption(settings: Settings) -> str:
    client, server, publishers = settings.cores.client, settings.cores.server, index_processes.ENGINES
    return (
        f"From bytes into an index in one process on core {client}; `re-hashed` makes keys of tokens, `feed` "
        "is a daemon's; the tree takes JSON without tokens. `CPU`, `over loopback` and `after a burst`: an "
        f"indexer on core {server} and {publishers} publishers on the other, until it says over HTTP that "
        "it knows the last prompts. `on 64 engines`: in a process that only holds the blocks; one round. A "
        "commit is of 64 blocks; daemon, index and client share all cores, and the client asks over HTTP "
        "again and again. Of stalls the longest of each round."
    )
