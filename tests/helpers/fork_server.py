"""Runs the command line in forked processes, so that the imports are paid for once.

One line of JSON {"arguments", "log", "patch", "environment"} in, one line with the child's pid out; after the
child has ended, one line with its wait status. This process never computes: a child that inherits idle
libraries is a fresh process in all that matters.
"""

import importlib
import json
import os
import sys

import matplotlib.figure  # noqa: F401
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401

import fastrm.evaluate.files
import fastrm.forecast.dry_run
import fastrm.serve.command
import fastrm.train.loop  # noqa: F401
from fastrm import cli
from fastrm.stop import end_with_parent


def child(arguments: list[str], log: str, patch: str | None, environment: dict[str, str]) -> int:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if patch is not None:
        module, _, function = patch.rpartition(".")
        getattr(importlib.import_module(f"tests.helpers.{module}"), function)()
    sys.argv = ["fastrm", *arguments]
    try:
        cli.main()
    except SystemExit as leave:
        return leave.code


def main() -> None:
    server = os.getpid()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setsid()  # so that a kill reaches the whole group
            end_with_parent(server)  # a test that was killed leaves nobody behind
            sys.exit(child(**json.loads(line)))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
