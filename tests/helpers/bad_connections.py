"""Keeps bad connections to a port of this machine until its input ends; a process of its own, as strangers are.

`python -m tests.helpers.bad_connections PORT COUNT` prints a line when so many are open, and how often one was opened
at the end. In a thread of the good clients' process it would take their time, and the server would seem slow.
"""

import itertools
import json
import socket
import sys
import threading
import time
from contextlib import suppress

# Every connection sends a piece a second: tools for such attacks send one in 10 to 15 seconds.
SECONDS = 1.0
STEPS = 10  # parts of the connections that take turns within that time; with each of them one client leaves

START = b"POST /v1/rewards HTTP/1.1\r\nHost: localhost\r\n"
HEAD = START + b"Content-Length: %d\r\n\r\n"
WHOLE = json.dumps({"groups": [{"prompt": "the cat", "responses": ["yes", "no"]}]}).encode()
# What a bad client sends at once, and goes on with piece by piece.
KINDS = {
    "slow line": (b"POST /v1/rew", b"a"),
    "slow headers": (START + b"X-A: ", b"a"),
    "half body": (HEAD % 10_000 + WHOLE[:20], b" "),
    "slow chunks": (START + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "silent": (b"", b""),
}


class Crowd:
    """Bad connections of all kinds."""

    def __init__(self, port: int):
        self._place, self._kinds = ("127.0.0.1", port), itertools.cycle(KINDS.values())
        self.held: dict[socket.socket, bytes] = {}
        self.num_opened = self.num_left = 0

    def fill(self, count: int) -> None:
        """Open connections until there are so many."""
        while len(self.held) < count:
            first, more = next(self._kinds)
            sock = socket.create_connection(self._place)
            self.num_opened += 1
            sock.sendall(first)
            sock.setblocking(False)
            self.held[sock] = more

    def leave(self) -> None:
        """Ask, and be gone before the answer."""
        with suppress(OSError), socket.create_connection(self._place) as sock:
            sock.sendall(HEAD % len(WHOLE) + WHOLE)
            self.num_left += 1

    def go_on(self, part: int) -> None:
        """Send a piece by every tenth connection, and forget those that the server has closed."""
        for sock, more in list(self.held.items())[part::STEPS]:
            if not _is_open(sock, more):
                sock.close()
                del self.held[sock]


def _is_open(sock: socket.socket, more: bytes) -> bool:
    try:
        sock.send(more)
        return sock.recv(65536) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def main(port: int, count: int) -> None:
    ended, crowd = threading.Event(), Crowd(port)
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    crowd.fill(count)
    print("open", flush=True)
    for step in itertools.cycle(range(STEPS)):
        if ended.is_set():
            break
        started = time.monotonic()
        crowd.leave()
        crowd.go_on(step)
        crowd.fill(count)
        ended.wait(max(0.0, SECONDS / STEPS - (time.monotonic() - started)))
    print(json.dumps({"opened": crowd.num_opened, "left": crowd.num_left}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
