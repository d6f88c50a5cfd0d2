"""Two ranks are one process: gradients, skipped steps, runs and checkpoints under every ZeRO stage."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from fastrm.model.export import load_model
from fastrm.train import checkpoint as checkpoints
from fastrm.train.checkpoint import load_checkpoint, save_checkpoint, verify
from fastrm.train.engine import LocalEngine
from fastrm.train.export_checkpoint import export_checkpoint
from fastrm.train.metrics import read_rows
from fastrm.train.ranks import ALONE
from fastrm.ui import Display
from tests.helpers import rank_jobs
from tests.helpers.killed_runs import CLOCK
from tests.helpers.own_process import JobServer
from tests.helpers.rank_jobs import DIVISIONS, Bench, make_config, make_packs, take_step
from tests.helpers.runs import colour_rows, text_rows, tiny_config, write_rows
from tests.helpers.stock import save_stock_checkpoint
from tests.helpers.support import make_model, make_record, pack_of
from tests.helpers.waiting import PATIENCE

pytest.importorskip("deepspeed")


class RankServer(JobServer):
    """Starts jobs of rank_jobs.py on two ranks."""

    def __init__(self):
        super().__init__("tests.helpers.rank_server")

    def start(self, folder: Path, job: str, *arguments, num_ranks: int = 2) -> list[int]:
        self._log = folder / "log"
        request = {"job": job, "arguments": arguments, "num_ranks": num_ranks, "log": self._log, "seconds": PATIENCE}
        return self.send(request)

    def run(self, folder: Path, job: str, *arguments, num_ranks: int = 2) -> None:
        self.start(folder, job, *arguments, num_ranks=num_ranks)
        codes = self.wait()
        assert codes == [0] * num_ranks, (codes, self.logs())

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self._log.parent.glob("log.*")))


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


def check_gradients(server, folder: Path, stage: int, **settings) -> None:
    """A first step of two ranks, in every division of the packs, against one process's."""
    server.run(folder, "gradients", stage, folder / "out", settings)
    found, alone = load_file(folder / "out"), Bench(ALONE, stage, **settings)
    alone.keep("", take_step(alone.engine, alone.packs))
    # In bfloat16 a last bit of a float32 sum may turn a rounding, by 2^-8 of one element of one pack's gradient.
    relative = 1e-5 if settings.get("dtype") != "bf16" else 2.0**-11
    for division in DIVISIONS:
        loss, norm, finite = found[f"{division}/update"].tolist()
        assert (loss, norm) == pytest.approx(alone.found["/update"][:2].tolist(), rel=1e-6) and finite
        assert norm > alone.engine.config.optim.max_grad_norm, "nothing was clipped"
        moments = part(found, f"{division}/state/exp_avg.")
        assert_close(moments, part(alone.found, "/state/exp_avg."), relative)
        assert all(tensor.isfinite().all() for tensor in part(found, division).values())


@pytest.mark.parametrize("frozen", [[], ["vision", "projector"]], ids=["trained", "frozen"])
def test_the_gradient_of_a_step_is_that_of_one_process(server, stage, frozen, tmp_path):
    check_gradients(server, tmp_path, stage, frozen=frozen)


@pytest.mark.parametrize(
    "stage, settings",
    [
        (2, {"dtype": "bf16"}),
        (3, {"dtype": "bf16", "options": {"fuse_projections": []}, "divide_all": True}),
        (3, {"options": {"use_activation_checkpointing": ["full"]}}),
        (3, {"options": {"use_activation_checkpointing": ["selective"]}, "divide_all": True}),
        (2, {"family": "internvl"}),
        (3, {"family": "internvl", "pooling": "mean", "divide_all": True}),
        (3, {"family": "internvl", "options": {"use_activation_checkpointing": ["full"]}, "divide_all": True}),
        (2, {"paradigm": "critic"}),
        (3, {"paradigm": "critic", "divide_all": True}),
        (3, {"paradigm": "judge", "divide_all": True}),
    ],
    ids=[
        "zero2-bf16", "zero3-bf16-fused", "zero3-full", "zero3-selective", "zero2-internvl", "zero3-internvl-mean",
        "zero3-internvl-full", "zero2-critic", "zero3-critic", "zero3-judge",
    ],
)  # fmt: skip
def test_gradients_of_other_settings_are_those_of_one_process(server, stage, settings, tmp_path):
    check_gradients(server, tmp_path, stage, **settings)


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
    assert [local_next.loss, local_next.grad_norm] == pytest.approx(
        found["after loading/update"][:2].tolist(), rel=1e-5
    )


def test_under_zero3_no_rank_holds_the_whole_model_while_it_is_loaded(server, tmp_path):
    """Peak of resident memory, mapped files included: the half that a rank keeps and one weight.

    Read whole and divided then, it would be one and a half times the model.
    """
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 8}
    network = make_model("qwen2")
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **sizes, num_key_value_heads=2, vocab_size=1000)
    network.model = AutoModel.from_config(config, dtype=torch.float32).bfloat16()
    save_stock_checkpoint(tmp_path / "checkpoint", network, shard="50MB")
    save_stock_checkpoint(tmp_path / "tiny", make_model("qwen2"))
    path = tiny_config(tmp_path, "unused", engine={"zero_stage": 3})
    tree = yaml.safe_load(path.read_text())
    tree["model"] = {"path": str(tmp_path / "checkpoint"), "fuse_projections": True}
    path.write_text(yaml.safe_dump(tree))
    server.run(tmp_path, "load", path, tmp_path / "tiny", tmp_path)
    found = load_file(tmp_path / "found")
    wanted = {f"model.{name}": tensor.float() for name, tensor in network.model.state_dict().items()}
    assert_equal({name: tensor for name, tensor in found.items() if name.startswith("model.")}, wanted)
    whole = sum(tensor.nbytes for tensor in wanted.values())
    assert whole > 2.5e8 and max(found["peaks"]) < 0.7 * whole, (found["peaks"], whole)
    # What the first rank has exported, tensor by tensor, gives the same rewards on one process.
    again = load_model(tmp_path / "model")
    assert torch.equal(again(pack_of(again, [make_record(1)])), found["rewards"])


@pytest.fixture(scope="module")
def mixed_data(tmp_path_factory):
    """Groups with and without an image, of two and three responses; one image is damaged behind its header."""
    folder = tmp_path_factory.mktemp("data")
    path = colour_rows(folder, 24)
    Image.new("RGB", (400, 400)).save(folder / "whole.jpg", quality=95)
    (folder / "images" / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    cut = {"prompt": "What?", "chosen": "red", "rejected": "blue", "image": "images/cut.jpg"}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return write_rows(folder / "mixed.jsonl", [*rows, *text_rows(24), cut])


def run_config(folder: Path, data: Path, stage: int = 1, **run) -> Path:
    folder.mkdir(exist_ok=True)
    run = {"max_steps": 6, "save_every": 3, "keep_checkpoints": 9, "eval_every": 3, **run}
    # Small packs, so that each rank has several in a step and in an evaluation. AdamW's eps: gradients that
    # are nothing but rounding must not be scaled up to full steps.
    parts = {"head": 2e-3, "vision": 5e-4}
    optim, data_settings = {"eps": 1e-4, "tokens_per_pack": 256, "lr_parts": parts}, {"max_tokens_per_group": 256}
    return tiny_config(
        folder, data, data, run=run, engine={"zero_stage": stage}, optim=optim, data=data_settings
    )  # fmt: skip


@pytest.fixture(scope="module")
def one_process(mixed_data, tmp_path_factory):
    """The run folder of an unbroken run of one process."""
    folder = tmp_path_factory.mktemp("one")
    rank_jobs.train(str(run_config(folder, mixed_data)))
    return folder / "run"


def rows_of(run_dir: Path, after: int = 0) -> list[dict]:
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows if row["step"] > after]


def exported(run_dir: Path) -> dict:
    """The weights of an export, by their names in the network."""
    return load_model(run_dir / "model", writes=True).state_dict()


def assert_same_run(run_dir: Path, wanted_dir: Path, after: int = 0) -> None:
    """The same steps on the same data, to float32 rounding."""
    found, wanted = rows_of(run_dir, after), rows_of(wanted_dir, after)
    assert [row["step"] for row in found] == [row["step"] for row in wanted] and len(found) >= 4
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() & {"loss", "grad_norm", "eval/loss"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4), key
        for key in ("epoch", "lr", "sharing_factor", "eval/accuracy", "rewards/accuracies"):
            assert one.get(key) == other.get(key), key
    one, other = exported(run_dir), exported(wanted_dir)
    assert max(float((one[name] - other[name]).abs().max()) for name in other) <= 2e-6


def test_runs_and_resumed_runs_are_those_of_one_process(server, mixed_data, one_process, stage, tmp_path):
    run_dir = tmp_path / "two" / "run"
    config = run_config(tmp_path / "two", mixed_data, stage)
    server.run(tmp_path, "train", config)
    assert_same_run(run_dir, one_process)
    layers = " of the first 2 layers" if stage == 3 else ""
    assert f"exact: 4 rewards{layers} agree with transformers to" in server.logs()
    assert "Traceback" not in server.logs() and "Warning" not in server.logs()
    summary = json.loads((run_dir / "summary.json").read_text())
    wanted = json.loads((one_process / "summary.json").read_text())
    assert summary["num_processes"] == 2 and wanted["num_processes"] == 1
    for key in ("steps", "preferences", "tokens_processed", "tokens_unshared", "quarantined", "eval_by_source"):
        assert summary[key] == wanted[key], key
    # Named once, whichever rank met it, and whichever of training and evaluation.
    codes = [json.loads(line)["code"] for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert codes == ["IMAGE_DAMAGED"]
    assert_equal(exported(run_dir), checkpoint_of(run_dir / "checkpoints" / "step-00000006")[0])
    # One process makes the same model of the last checkpoint, to the byte.
    export_checkpoint(run_dir, 6, tmp_path / "six", "transformers", Display(silent=True))
    written = {path.name: path.read_bytes() for path in (run_dir / "model").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "six").iterdir()} == written
    # Resumed on as many ranks: to the bit.
    middle = "checkpoints/step-00000003"
    server.run(tmp_path, "train", config, str(run_dir / middle), f"run.dir={tmp_path / 'again'}")
    assert rows_of(tmp_path / "again", 3) == rows_of(run_dir, 3)
    assert_equal(exported(tmp_path / "again"), exported(run_dir))
    # On one rank instead of two, and on two instead of one.
    rank_jobs.train(str(config), str(run_dir / middle), f"run.dir={tmp_path / 'fewer'}")
    assert_same_run(tmp_path / "fewer", one_process, after=3)
    server.run(tmp_path, "train", config, str(one_process / middle), f"run.dir={tmp_path / 'more'}")
    assert_same_run(tmp_path / "more", one_process, after=3)


def test_ranks_evaluate_named_sets_and_stop_early_at_the_same_step(server, mixed_data, stage, tmp_path):
    stopping = {"metric": "eval/few/accuracy", "patience": 2, "min_delta": 9.0}  # which none rises by
    sources = {"all": [{"path": str(mixed_data)}], "few": [{"path": str(mixed_data), "cap": 7}]}
    run = {"eval_every": 1, "eval_at_start": True, "eval_groups": 9, "early_stopping": stopping, "export": "best"}
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        path = run_config(folder, mixed_data, stage, **run)
        tree = yaml.safe_load(path.read_text())
        tree["data"]["eval"] = sources
        path.write_text(yaml.safe_dump(tree))
    rank_jobs.train(str(one / "config.yaml"))
    server.run(tmp_path, "train", two / "config.yaml")
    found, wanted = (json.loads((folder / "run" / "summary.json").read_text()) for folder in (two, one))
    assert found["steps"] == wanted["steps"] == 2 and found["stopped_early"]
    rows = [row for row in rows_of(two / "run", -1) if "eval/accuracy" in row]
    others = [row for row in rows_of(one / "run", -1) if "eval/accuracy" in row]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row, other in zip(rows, others, strict=True):
        assert row["eval/sources"] == other["eval/sources"]
        figures = [name for name, value in other.items() if isinstance(value, float)]
        assert [row[name] for name in figures] == pytest.approx([other[name] for name in figures], rel=1e-4, abs=1e-6)
    assert_equal(exported(two / "run"), checkpoint_of(best_of(two / "run"))[0])
    assert found["exported_step"] == wanted["exported_step"] < 2, (rows, "the data no longer give an early best")


def best_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / json.loads((run_dir / "summary.json").read_text())["best_checkpoint"]


def test_a_run_with_adapters_is_that_of_one_process_and_goes_on_to_the_bit(server, mixed_data, stage, tmp_path):
    pytest.importorskip("peft")
    save_stock_checkpoint(tmp_path / "base", make_model("qwen2_5_vl"), torch.float32)

    def config_of(name: str, zero_stage: int) -> Path:
        path = run_config(tmp_path / name, mixed_data, zero_stage)
        tree = yaml.safe_load(path.read_text())
        tree["model"] = {"path": str(tmp_path / "base"), "lora": {"rank": 4, "vision": True}}
        path.write_text(yaml.safe_dump(tree))
        return path

    rank_jobs.train(str(config_of("one", 1)))
    config, found = config_of("two", stage), tmp_path / "two" / "run"
    server.run(tmp_path, "train", config)
    assert_same_run(found, tmp_path / "one" / "run")
    weights = checkpoint_of(found / "checkpoints" / "step-00000006")[0]
    assert weights and all(name.startswith("score.") or ".lora_" in name for name in weights)
    server.run(tmp_path, "train", config, str(found / "checkpoints/step-00000003"), f"run.dir={tmp_path / 'again'}")
    assert_equal(exported(tmp_path / "again"), exported(found))


def test_a_skipped_step_names_the_records_of_all_ranks(server, mixed_data, tmp_path):
    found = {}
    for num_ranks in (1, 2):
        folder = tmp_path / str(num_ranks)
        config = run_config(folder, mixed_data, 2, eval_every=0)
        server.run(tmp_path, "train_with_an_infinite_loss", config, num_ranks=num_ranks)
        (row,) = read_rows(folder / "run" / "incidents.jsonl")
        assert row["step"] == 2 and row["loss"] == "inf"
        found[num_ranks] = sorted(row["records"])
    assert found[1] == found[2] and len(found[1]) >= 4


def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_to_the_bit(server, mixed_data, tmp_path):
    whole = run_config(tmp_path / "whole", mixed_data, 2)
    parts = run_config(tmp_path / "parts", mixed_data, 2)
    server.run(tmp_path, "train", whole)
    server.start(tmp_path, "train_and_stop_in_an_evaluation", parts)
    assert server.wait() == [75, 75], server.logs()
    assert (tmp_path / "parts" / "run" / "checkpoints" / "step-00000003").is_dir()
    server.run(tmp_path, "train", parts, "auto")
    assert rows_of(tmp_path / "parts" / "run") == rows_of(tmp_path / "whole" / "run")
    assert_equal(exported(tmp_path / "parts" / "run"), exported(tmp_path / "whole" / "run"))


@pytest.mark.parametrize("paradigm, is_tied", [("critic", False), ("judge", True)], ids=["critic", "tied judge"])
def test_a_writer_from_files_is_that_of_one_process_under_zero3(server, paradigm, is_tied, tmp_path):
    """The LM head is read, divided and gathered as the backbone is; a judge has no other head."""
    network = make_model("llama")
    network.model.config.tie_word_embeddings = is_tied
    save_stock_checkpoint(tmp_path / "base", network, torch.float32)
    row = {"chosen": "yes", "rejected": "no", "rejected_reason": "-"}
    rows = [row | {"prompt": f"Is {n} even?", "chosen_reason": "so " * n} for n in range(2, 22, 2)]
    data = write_rows(tmp_path / "rows.jsonl", rows)

    def config_of(name: str, zero_stage: int) -> Path:
        (tmp_path / name).mkdir()
        path = tiny_config(tmp_path / name, data, data, run={"max_steps": 3}, engine={"zero_stage": zero_stage})
        tree = yaml.safe_load(path.read_text()) | {"paradigm": paradigm}
        tree["model"] = {"path": str(tmp_path / "base")}
        path.write_text(yaml.safe_dump(tree))
        return path

    rank_jobs.train(str(config_of("one", 1)))
    server.run(tmp_path, "train", config_of("two", 3))
    assert_same_run(tmp_path / "two" / "run", tmp_path / "one" / "run")
    assert ("lm_head.weight" in exported(tmp_path / "two" / "run")) != is_tied
