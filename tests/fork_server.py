"""Runs training in forked processes, so that the imports are paid for once.

One line of JSON {"config", "resume"} in, one line with the child's pid out; after the child has
ended, one line with its wait status. This process never computes: a child that inherits idle
libraries is a fresh process in all that matters.
"""

import json
import os
import sys

import fastrm.train.loop
from fastrm.config import load_config
from fastrm.errors import FastrmError


def child(config: str, resume: str) -> int:
    log = os.open(f"{config}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        fastrm.train.loop.train(load_config(config), resume)
        return 0
    except FastrmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setsid()  # so that a kill reaches the data workers too
            os._exit(child(**json.loads(line)))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
