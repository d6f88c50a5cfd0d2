"""`kernels: auto|triton|eager`: what runs, what is printed, and that it computes the same."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastrm.config import load_config
from fastrm.errors import ConfigError
from fastrm.model.architectures import find_architecture
from fastrm.model.kernel_choice import head_dims_of, pick_backend, pick_head_kernels
from fastrm_kernels import dispatch
from tests.helpers.project import PROJECT
from tests.helpers.runs import colour_rows, fastrm, tiny_config
from tests.helpers.support import make_model, needs_interpreter

CPU = torch.device("cpu")


def losses(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_on_triton_kernels_learns_the_same_and_says_so(tmp_path):
    results = {}
    for kernels in ("eager", "triton"):
        folder = tmp_path / kernels
        folder.mkdir()
        path = tiny_config(folder, colour_rows(folder, 12), run={"max_steps": 3}, optim={"tokens_per_pack": 2048})
        done = fastrm("train", path, f"kernels={kernels}")
        assert done.returncode == 0, done.stderr
        results[kernels] = losses(folder)
        said = " ".join((done.stdout + done.stderr).split())
        attention = "triton (set by kernels in the configuration)" if kernels == "triton" else "sdpa (kernels: eager"
        assert f"attention: {attention}" in said
        fused = "; head and loss fused in packs of up to 128 responses" if kernels == "triton" else ")"
        assert f"head and loss: {kernels} (set by kernels in the configuration{fused}" in said
    assert len(results["triton"]) == 3
    assert results["triton"] == pytest.approx(results["eager"], abs=1e-5)
    # The kernels did run: three losses may agree to the bit, ten thousand weights do not.
    eager, triton = (load_file(tmp_path / name / "run" / "model" / "model.safetensors") for name in ("eager", "triton"))
    assert any(not torch.equal(eager[name], triton[name]) for name in eager)


@needs_interpreter
def test_without_a_measurement_auto_is_eager_and_says_why():
    assert ("tree_attention", "cpu", torch.float32) not in dispatch.MEASURED
    backend, why = pick_backend("auto", "auto", CPU, torch.float32, [64])
    assert backend == "sdpa" and "was not measured for float32 on cpu" in why
    implementation, why = pick_head_kernels("auto", CPU)
    assert implementation == "eager" and "was not measured for float32 on cpu" in why


@needs_interpreter
def test_auto_takes_the_measured_winner(monkeypatch):
    monkeypatch.setitem(dispatch.MEASURED, ("tree_attention", "cpu", torch.float32), "triton")
    monkeypatch.setitem(dispatch.MEASURED, ("preference_head", "cpu", torch.float32), "triton")
    assert pick_backend("auto", "auto", CPU, torch.float32, [64]).name == "triton"
    assert pick_head_kernels("auto", CPU).name == "triton"
    assert pick_backend("auto", "eager", CPU, torch.float32, [64]).name == "sdpa"
    assert pick_head_kernels("eager", CPU).name == "eager"


@needs_interpreter
def test_an_attention_backend_set_by_name_wins_over_kernels():
    assert pick_backend("sdpa", "triton", CPU, torch.float32, [64]).name == "sdpa"
    assert pick_backend("triton", "eager", CPU, torch.float32, [64]).name == "triton"


@needs_interpreter
def test_the_quick_start_can_take_triton():
    config = load_config(PROJECT / "configs/quickstart.yaml", ["kernels=triton"])
    dims = head_dims_of(find_architecture(config.model)[0])
    assert pick_backend("auto", "triton", CPU, torch.float32, dims).name == "triton"


def test_triton_where_it_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = r"triton cannot run .* on cpu: got a tensor on cpu, wanted cuda .*; use auto"
    with pytest.raises(ConfigError, match="kernels: " + message):
        pick_backend("auto", "triton", CPU, torch.float32, [64])
    with pytest.raises(ConfigError, match=r"model\.attention: " + message):
        pick_backend("triton", "auto", CPU, torch.float32, [64])
    with pytest.raises(ConfigError, match="kernels: " + message):
        pick_head_kernels("triton", CPU)


@needs_interpreter
@pytest.mark.parametrize(
    ("family", "dims"), [("qwen2_5_vl", {8, 16}), ("qwen2_vl", {8, 16}), ("qwen2", {8}), ("qwen3", {16})]
)
def test_a_head_dimension_that_triton_has_not_is_refused_at_the_start(family, dims):
    model = make_model(family)
    assert head_dims_of(model.model.config) == dims
    if 8 in dims:
        with pytest.raises(ConfigError, match="got head dimension 8, wanted one of 16, 32, 64, 80, 96, 128; use auto"):
            model.set_kernels(torch.float32, kernels="triton")
    else:
        model.set_kernels(torch.float32, kernels="triton")


@needs_interpreter
def test_auto_passes_over_a_winner_that_cannot_run_the_model(monkeypatch):
    monkeypatch.setitem(dispatch.MEASURED, ("tree_attention", "cpu", torch.float32), "triton")
    backend, why = pick_backend("auto", "auto", CPU, torch.float32, [64, 24])
    assert backend == "sdpa" and "got head dimension 24" in why


def test_a_value_that_does_not_exist_is_refused(tmp_path):
    path = tiny_config(tmp_path, "digits:train")
    with pytest.raises(ConfigError, match="kernels"):
        load_config(path, ["kernels=cuda"])


@needs_interpreter
def test_an_interpreter_that_cannot_work_with_this_numpy_is_named(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.6.0")
    for version, refused in (("2.4.0", True), ("2.3.5", False)):
        monkeypatch.setattr("numpy.__version__", version)
        obstacle = dispatch.obstacle_to_triton(torch.empty(0))
        assert (obstacle or "").startswith("the interpreter of Triton 3.6.0 needs numpy < 2.4; pip install") is refused
