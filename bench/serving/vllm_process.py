"""vLLM as users start it: `vllm serve` in an environment of its own, on a CPU, in float32."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 600  # seconds until a server answers or has ended, on a machine that has much else to do
# The log's last letters in the message of a server that has ended.
_SHOWN = 3000


class VllmEnded(Exception):
    """The error of a server that has ended by itself or was not ready in time, with the end of its log."""


@contextmanager
def vllm_serving(environment: Path, folder: Path, log: Path, *options: str) -> Iterator[str]:
    """Serve a model folder on a free port of this machine until the block ends, by the URL that is yielded.

    Args:
        environment: in which vLLM is installed; `make test-vllm` makes one.
        log: the file for all that vLLM prints; vLLM's own files go into a folder beside it.

    Raises:
        VllmEnded: if no server comes up.
    """
    url, process = start(environment, folder, log, options)
    try:
        _wait_until_ready(process, url, log)
        yield url
    finally:
        stop(process)


def start(
    environment: Path, folder: Path, log: Path, options: Sequence[str], more: Mapping[str, str] | None = None
) -> tuple[str, subprocess.Popen]:
    """Start vLLM; return its URL and its process.

    Args:
        more: variables of the process's environment beside those that a CPU needs; no model hub is asked.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        environment / "bin" / "vllm", "serve", folder, "--runner", "pooling", "--dtype", "float32",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", *options,
    ]  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=kept | cpu_settings(log.parent) | dict(more or {})
        )
    return f"http://127.0.0.1:{port}", process


def cpu_settings(folder: Path) -> dict[str, str]:
    """Return variables with which vLLM runs on all cores of a CPU, keeps its files in a folder and asks no hub."""
    return {
        "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CACHE_ROOT": str(folder / "cache"),
    }  # fmt: skip


def _wait_until_ready(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        if process.poll() is not None:
            raise VllmEnded(f"vLLM has ended:\n{log.read_text()[-_SHOWN:]}")
        if time.monotonic() > deadline:
            raise VllmEnded(f"vLLM was not ready in {PATIENCE} s:\n{log.read_text()[-_SHOWN:]}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=PATIENCE).close()
            return
        except OSError:
            time.sleep(0.5)


def stop(process: subprocess.Popen) -> None:
    """End the server, which ends the processes that it has started."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    finally:
        process.kill()
