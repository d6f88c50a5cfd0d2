"""Runs jobs on several ranks in forked processes, so that the imports, DeepSpeed's too, are paid for once.

One line of JSON {"job", "arguments", "num_ranks", "log", "seconds"} in; one line with the pids
out, and one with the exit codes when all ranks have ended or the time is up. This process never
computes (see fork_server.py).
"""

import importlib
import json
import os
import signal
import sys
import time

from fastrm.errors import FastrmError
from fastrm.train.launch import kept_port
from tests.helpers import rank_jobs

os.environ["DS_ACCELERATOR"] = "cpu"
# What DeepSpeed and transformers would import in each of the children.
for name in (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "fastrm.train.deepspeed_engine",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
):
    importlib.import_module(name)


def child(rank: int, job: str, arguments: list, num_ranks: int, port: int, log: str) -> int:
    output = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if num_ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        getattr(rank_jobs, job)(*arguments)
        return 0
    except FastrmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 70


def fork(rank: int, port: int, request: dict) -> int:
    """The pid of the process that does a rank's part of the job."""
    pid = os.fork()
    if pid == 0:
        code = child(rank, port=port, **request)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return pid


def wait(pids: list[int], seconds: float) -> list[int]:
    """Exit codes; ranks that still run when the time is up are killed."""
    codes, deadline = {}, time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        seconds = request.pop("seconds")
        with kept_port() as port:
            pids = [fork(rank, port, request) for rank in range(request["num_ranks"])]
            print(json.dumps(pids), flush=True)
            print(json.dumps(wait(pids, seconds)), flush=True)


if __name__ == "__main__":
    main()
