"""Ports at which processes meet."""

import os
import random
import socket

_given: set[int] = set()


def free_port() -> int:
    """A free port that no other call gets: of this process, or of another one that runs tests.

    It lies below those that the system assigns to connections, so that it stays free.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        port = random.SystemRandom().randrange(20_000 + worker, 32_000, workers)
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port
