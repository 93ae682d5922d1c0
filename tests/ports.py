"""Ports for processes that meet."""

import random
import socket


def free_port() -> int:
    """One that nothing uses, below those that the system hands out for connections, so that it stays free."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
