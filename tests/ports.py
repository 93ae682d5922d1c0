"""Ports at which processes meet."""

import random
import socket


def free_port() -> int:
    """A free port below those that the system assigns to connections, so that it stays free."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
