"""Two ranks are one process: gradients, skipped steps, runs and checkpoints under every ZeRO stage."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import rank_jobs
import torch
from safetensors.torch import load_file

from fastrm.train import checkpoint as checkpoints
from fastrm.train.checkpoint import load_checkpoint, save_checkpoint, verify
from fastrm.train.engine import LocalEngine
from fastrm.train.ranks import ALONE
from rank_jobs import DIVISIONS, Bench, make_config, make_packs, take_step
from support import make_model

pytest.importorskip("deepspeed")
SECONDS = 120  # after which ranks hang


class RankServer:
    """Starts jobs of rank_jobs.py on two ranks."""

    def __init__(self):
        script = Path(__file__).with_name("rank_server.py")
        folders = [str(script.parent), str(script.parent.parent), str(script.parent.parent / "kernels")]
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                 "PYTHONPATH": os.pathsep.join(folders)},
        )  # fmt: skip

    def start(self, folder: Path, job: str, *arguments, num_ranks: int = 2) -> list[int]:
        self._log = folder / "log"
        self._send(job=job, arguments=arguments, num_ranks=num_ranks, log=str(self._log))
        return json.loads(self._process.stdout.readline())

    def wait(self) -> list[int]:
        return json.loads(self._process.stdout.readline())

    def run(self, folder: Path, job: str, *arguments, num_ranks: int = 2) -> None:
        self.start(folder, job, *arguments, num_ranks=num_ranks)
        codes = self.wait()
        assert codes == [0] * num_ranks, (codes, self.logs())

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self._log.parent.glob("log.*")))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _send(self, **request) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self._process.stdin.write(json.dumps({**request, "port": port, "seconds": SECONDS}, default=str) + "\n")
        self._process.stdin.flush()


@pytest.fixture(scope="module")
def server():
    found = RankServer()
    yield found
    found.close()


@pytest.fixture(params=[1, 2, 3], ids=lambda stage: f"zero{stage}")
def stage(request):
    return request.param


def part(found: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}


def assert_close(found: dict, wanted: dict, relative: float) -> None:
    """Every tensor, against its largest element, or 1e-4 of the largest of all: what should be 0 is rounding."""
    assert found.keys() == wanted.keys()
    floor = 1e-4 * max(float(tensor.abs().max()) for tensor in wanted.values())
    errors = {n: float((found[n] - t).abs().max()) / max(floor, float(t.abs().max())) for n, t in wanted.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= relative, (worst, errors[worst])


def assert_equal(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different, different


@pytest.fixture(scope="module")
def alone():
    """One process's first step on all packs, by the frozen parts."""

    def step(frozen=(), dtype="fp32"):
        bench = Bench(ALONE, 1, list(frozen), dtype)
        bench.keep("", take_step(bench.engine, bench.packs))
        return bench.found

    return {frozen: step(frozen) for frozen in ((), ("vision", "projector"))}


@pytest.mark.parametrize("frozen", [(), ("vision", "projector")], ids=["trained", "frozen"])
def test_the_gradient_of_a_step_is_that_of_one_process(server, alone, stage, frozen, tmp_path):
    server.run(tmp_path, "gradients", stage, list(frozen), tmp_path / "out")
    found, wanted = load_file(tmp_path / "out"), alone[frozen]
    for division in DIVISIONS:
        loss, norm, finite = found[f"{division}/update"].tolist()
        assert (loss, norm) == pytest.approx(wanted["/update"][:2].tolist(), rel=1e-6) and finite
        assert norm > 0.2, "nothing was clipped"
        moments = part(found, f"{division}/state/exp_avg.")
        assert_close(moments, part(wanted, "/state/exp_avg."), 1e-5)
        assert all(tensor.isfinite().all() for tensor in part(found, division).values())


@pytest.fixture(scope="module")
def local_checkpoint(tmp_path_factory):
    """Two steps of one process, saved in several small files; and what its next step comes to."""
    folder, engine = tmp_path_factory.mktemp("local"), LocalEngine(make_model("qwen2_5_vl"), make_config(1))
    packs = make_packs(engine.network)
    for _ in range(2):
        take_step(engine, packs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "SHARD_BYTES", 50_000)
        path = save_checkpoint(folder, 2, engine, {})
    assert verify(path) is None and (path / "model.2.safetensors").exists()
    return path, take_step(engine, packs)


def checkpoint_of(path: Path) -> tuple[dict, dict]:
    """Weights and states in a checkpoint."""
    return tuple(
        {name: tensor for file in sorted(path.glob(f"{stem}*.safetensors")) for name, tensor in load_file(file).items()}
        for stem in ("model", "optimizer")
    )


def test_mishaps_leave_no_trace_and_checkpoints_go_both_ways(server, local_checkpoint, stage, tmp_path):
    path, local_next = local_checkpoint
    server.run(tmp_path, "mishaps", stage, path, tmp_path / "out")
    found = load_file(tmp_path / "out")
    for mishap in ("_infinite_loss", "_infinite_gradient", "_discarded", "_all_refused"):
        assert bool(found[f"{mishap}/update"][2]) == ("infinite" not in mishap), mishap
        assert not any(tensor.any() for tensor in part(found, f"{mishap}/state/").values()), mishap
        assert_equal(part(found, f"after {mishap}/"), part(found, "plain/"))
    # From many to one.
    assert verify(tmp_path / "step-00000002") is None
    engine = LocalEngine(make_model("qwen2_5_vl", seed=1), make_config(1))
    load_checkpoint(tmp_path / "step-00000002", engine)
    assert_equal(dict(engine.model_tensors()), checkpoint_of(tmp_path / "step-00000002")[0])
    one = take_step(engine, make_packs(engine.network))
    assert [one.loss, one.grad_norm] == pytest.approx(found["saved/update"][:2].tolist(), rel=1e-5)
    # From one to many.
    weights, states = checkpoint_of(path)
    assert_equal(part(found, "loaded/weight/"), weights)
    assert_equal(part(found, "loaded/state/"), states)
    assert [local_next.loss, local_next.grad_norm] == pytest.approx(found["after loading/update"][:2].tolist(), rel=1e-5)
