"""What tests ask of a server from inside its process; each function here changes the process that calls it.

What is asked for is written as a line to the process's log.
"""

import asyncio
import json
import os
import signal
import sys

from fastrm.serve.scheduler import Scheduler

WATCHED = ("open", "socket.connect", "socket.getaddrinfo")


def counting_tasks() -> None:
    """SIGUSR2: write the number of tasks of the event loop."""
    signal.signal(signal.SIGUSR2, lambda *_: os.write(1, b"tasks %d\n" % len(asyncio.all_tasks())))


def telling_what_is_opened() -> None:
    """Write every file that is opened and every address that is asked; modules of Python are none of them."""

    def tell(event: str, arguments: tuple) -> None:
        if event in WATCHED and not str(arguments[0]).endswith((".py", ".pyc")):
            os.write(1, b"opened " + json.dumps([event, repr(arguments[:2])]).encode() + b"\n")

    sys.addaudithook(tell)


def telling_what_is_accepted() -> None:
    """Write the prompts of every request that the scheduler has accepted."""
    admit, submit = Scheduler._admit, Scheduler.submit

    async def tell(scheduler: Scheduler, groups, *arguments):
        def accept(num_groups: int) -> None:
            admit(scheduler, num_groups)
            os.write(1, b"".join(b"accepted %s\n" % group["prompt"].encode() for group in groups))

        scheduler._admit = accept  # `submit` calls it before it waits for anything
        return await submit(scheduler, groups, *arguments)

    Scheduler.submit = tell
