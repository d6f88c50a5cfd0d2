"""How long the tests wait for what must come: a limit that only work which hangs can reach."""

import time
from collections.abc import Callable

# Beside 26 processes on two cores a run of 20 s took more than 120, a grid of runs more than 500. Work that is stuck on
# purpose sleeps for an hour (stuck_work.py), so that a command which waits for it is still seen.
PATIENCE = 1500  # seconds


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
