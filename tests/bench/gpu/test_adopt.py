"""Figures of a GPU day are taken into the project by a command alone, and only where nothing was wrong."""

import copy
import json
import shutil
import subprocess
import sys

import pytest

from bench.gpu import adopt
from bench.gpu.results import attention_share, kernel_report, planned_memory, training_report
from bench.gpu.tables import day_lines
from bench.kernels import results as kernel_results
from bench.kernels.results import ATTENTION, HEAD
from bench.training import results as training_results
from bench.training.results import ALTERNATIVES, FASTRM, FP8, MAIN, PLAIN
from tests.helpers.project import PROJECT
from tests.helpers.waiting import PATIENCE

H200 = "NVIDIA H200"
VERSIONS = {"python": "3.12", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "transformers": "5.17.0"}
RUN = {"date": "2026-12-01 10:00 UTC", "versions": VERSIONS, "threads": 16, "left_out": []}


def timed(seconds):
    return {"median": seconds, "quartiles": [seconds, seconds], "rounds": 20, "cpu": seconds}


def step(seconds, failed=None, **more):
    if failed:
        return {"failed": failed}
    return {
        "failed": None, "seconds": timed(seconds), "peak_mib": 1000.0, "planned_mib": 950.0,
        "pairs_per_second": 8 / seconds, "useful_tokens_per_second": 1.0, "processed_tokens": 1,
        "processed_tokens_per_second": 1.0, "flops": 1.0, "matmul_share": 0.5, "checkpointing": "selective",
        "graphs": 2, "gradient_error": 0.01, **more,
    }  # fmt: skip


def training(kind, **variants):
    entry = {"kind": kind, "model": "7B", "name": "pairs, 1300/300", "shape": {"num_groups": 8}, "variants": variants}
    return {"device": H200, "runs": {"7B": {**RUN, "matmul_flops": 7e14}}, "entries": [entry]}


def kernels(op, dtype, **seconds):
    shape = {"dtype": dtype, "num_responses": 2, "prefix": 1300, "response": 300, "causal": True, "heads": 28,
             "num_trees": 1, "num_tokens": 1900, "work_ratio": 1.49, "width": 3584, "rows": 8}  # fmt: skip
    if op == ATTENTION:
        del shape["width"]
    variants = {
        name: {"failed": None, "seconds": {"forward": timed(s / 3), "forward+backward": timed(s)}, "peak_mib": 1.0,
               "build_ms": None, "error_over_limit": {}}
        for name, s in seconds.items()
    }  # fmt: skip
    flops = {"forward": 1e12, "forward+backward": 3e12}
    return {"op": op, "name": f"{op} {dtype}", "shape": shape, "floor_bytes": 1e8, "sets": 1, "flops": flops,
            "variants": variants}  # fmt: skip


def kernel_file(**operations):
    return {"device": H200, "operations": {
        op: {**RUN, "copy_bytes_per_second": 4e12, "entries": entries} for op, entries in operations.items()
    }}  # fmt: skip


def stage(name, results, status="done"):
    return {"name": name, "question": "?", "status": status, "seconds": 10.0, "limit": 60.0, "tail": "the end",
            "results": results}  # fmt: skip


@pytest.fixture
def record():
    """A day of 540 seconds on which the last stage ran out of time."""
    tests = {"passed": 71, "failed": 0, "skipped": 2, "errors": 0, "finished": True, "failures": []}
    facts = {"device": H200, "on_gpu": True, "date": RUN["date"], "versions": VERSIONS, "cores": 16,
             "matmul_flops": 7.9e14, "copy_bytes_per_second": 4e12}  # fmt: skip
    profile = {"phases": {"forward": 0.3}, "operations": [], "shares": {"attention": 0.06, "matrix products": 0.8}}
    heads = kernels(HEAD, "bf16", triton=1e-3, eager=4e-3), kernels(HEAD, "fp32", triton=2e-3, eager=1e-3)
    attention = kernels(ATTENTION, "bf16", triton=1e-3, varlen=1.5e-3)
    quick = kernel_file(preference_head=[*heads], tree_attention=[attention])
    full = kernel_file(tree_attention=[kernels(ATTENTION, "bf16", triton=2e-3, varlen=1e-3)])
    main = training(MAIN, **{PLAIN: step(3.0), FASTRM: step(1.2, profile=profile), FP8: step(0, "left out: time")})
    others = training(ALTERNATIVES, **{FASTRM: step(1.2), FP8: step(1.1), "fastrm FP8 tensorwise": step(1.0)})
    update = {"model": "7B", "elements": 7, "floor_seconds": 0.03, "programs": {
        "as fastrm has it": {"failed": None, "median": 0.3, "first": 9.0, "rounds": 5},
        "static width, no checks": {"failed": None, "median": 0.1, "first": 9.0, "rounds": 5},
    }}  # fmt: skip
    memory = {"usable_mib": 1e5, "sizes": [
        {"checkpointing": "selective", "groups": 9, "tokens": 17_100, "planned_mib": 9e4, "fits": True,
         "failed": None, "peak_mib": 9.1e4},
        {"checkpointing": "full", "groups": 30, "tokens": 57_000, "planned_mib": 9.9e4, "fits": False,
         "failed": "OutOfMemoryError: x"},
    ]}  # fmt: skip
    turns = {"model": "7B", "rows": 8192, "width": 3584, "vocabulary": 152_064, "floor_seconds": 0.03, "programs": {
        "chunks of PyTorch's operations": {"failed": None, "median": 0.06, "peak_mib": 2500.0},
        "Liger's kernel": {"failed": None, "median": 0.05, "peak_mib": 2400.0},
    }}  # fmt: skip
    return {
        "date": RUN["date"], "rehearsal": False, "seconds": 530.0, "limit": 540.0,
        "stages": [
            stage("facts", {"facts.json": facts}), stage("tests", {"tests.json": tests}),
            stage("kernels-quick", {"nvidia-h200-kernels-quick.json": quick}),
            stage("step-7B", {"nvidia-h200-training.json": main}, "killed: over its limit of 270 s"),
            stage("update", {"update.json": update}), stage("memory", {"memory.json": memory}),
            stage("turn-loss", {"turn_loss.json": turns}),
            stage("alternatives-7B", {"nvidia-h200-training.json": others}),
            stage("kernels-attention", {"nvidia-h200-kernels.json": full}, "left out: out of time, 3 s are left"),
        ],
    }  # fmt: skip


def unmeasured(dispatch):
    """The text of dispatch.py without an entry, whatever has been measured by now."""
    before, rest = dispatch.read_text().split(adopt.BEGIN)
    return before + f"{adopt.BEGIN}\n{adopt.END}" + rest.split(adopt.END, 1)[1]


@pytest.fixture
def project(tmp_path):
    """The files that figures go into, in a copy, without figures of a GPU: these tests hold when there are some."""
    root = tmp_path / "project"
    shutil.copytree(PROJECT / "kernels", root / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "bench" / "results").mkdir(parents=True)
    for name in ("README.md", "bench/README.md"):
        shutil.copy(PROJECT / name, root / name)
    for file in (PROJECT / "bench" / "results").glob("*.json"):
        if "nvidia" not in file.name:
            shutil.copy(file, root / "bench" / "results")
    (root / adopt.DISPATCH).write_text(unmeasured(root / adopt.DISPATCH))
    return root


def run(monkeypatch, project, *records):
    files = []
    for number, record in enumerate(records):
        files.append(project.parent / f"day-{number}.json")
        files[-1].write_text(json.dumps(record))
    monkeypatch.setattr(adopt, "ROOT", project.parent / "nowhere")  # nothing can be written into the project itself
    monkeypatch.setattr(sys, "argv", ["adopt.py", *map(str, files), "--root", str(project)])
    return adopt.main()


def contents(root):
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_figures_go_where_they_are_read(project, record, monkeypatch, capsys):
    assert run(monkeypatch, project, record) == 0
    said = capsys.readouterr().out
    assert said.startswith("NVIDIA H200; python 3.12, torch 2.11.0, triton 3.6.0") and "dispatch.py" in said
    readme = (project / "README.md").read_text()
    table = readme[readme.index(adopt.FIGURES.begin) : readme.index(adopt.FIGURES.end)]
    assert "| pairs of 1300/300 tokens: fastrm over a plain pairwise trainer | 2.50x |" in table
    assert "| groups of 4, 1300/300: fastrm over a plain pairwise trainer | - |" in table
    assert "NVIDIA H200: measured 2026-12-01 10:00 UTC, torch 2.11.0, triton 3.6.0" in table
    bench = (project / "bench" / "README.md").read_text()
    assert "| fastrm over plain, pairs 1300/300 | at least 2.2 | 2.50 (NVIDIA H200) | met |" in bench
    assert "### NVIDIA H200" in bench and "| fastrm FP8 tensorwise | 1.000 |" in bench
    again = contents(project)
    assert run(monkeypatch, project, record) == 0
    assert contents(project) == again and "nothing has changed" in capsys.readouterr().out


def test_auto_chooses_what_was_measured(project, record, monkeypatch):
    """The full run of attention counts, not the quick one; a head in float32 stays eager."""
    assert run(monkeypatch, project, record) == 0
    code = (
        "import torch; from fastrm_kernels import dispatch\n"
        "dispatch._device_name = lambda device: 'NVIDIA H200'\ndispatch.obstacle_to_triton = lambda tensor: None\n"
        "half, full = torch.empty(0, dtype=torch.bfloat16), torch.empty(0)\n"
        "print(*(dispatch.pick_auto(*case).name for case in (('preference_head', half), ('preference_head', full), "
        "('tree_attention', half))))\n"
        "print(dispatch.pick_auto('tree_attention', full).why)"
    )
    environment = {"PYTHONPATH": str(project / "kernels"), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    chosen, why = found.stdout.splitlines()
    assert chosen == "triton eager varlen", found.stderr
    assert why.startswith("tree_attention was not measured for float32 on NVIDIA H200")
    text = (project / adopt.DISPATCH).read_text()
    assert "# triton is 0.50x as fast as varlen over 1 shapes (0.50x to 0.50x); 2026-12-01, torch 2.11.0," in text
    assert "(a quick run); 2026-12-01" in text
    assert max(map(len, text.splitlines())) <= 120


def test_another_device_keeps_its_entries(record):
    text, report = unmeasured(PROJECT / adopt.DISPATCH), kernel_report(record)
    first = adopt.updated_dispatch(text, report)
    both = adopt.updated_dispatch(first, {**report, "device": "NVIDIA H100"})
    assert adopt.updated_dispatch(both, report).count("NVIDIA H100") == 3
    assert both.count('", "NVIDIA H') == 6
    with pytest.raises(adopt.Refused, match="wanted the line"):
        adopt.updated_dispatch("MEASURED = {}", report)


def test_several_calls_are_one_day(project, record, monkeypatch):
    second = copy.deepcopy(record)
    groups = training(MAIN, **{PLAIN: step(10.0), FASTRM: step(1.0)})
    groups["entries"][0]["name"] = "groups of 4, 1300/300"
    second["stages"] = [second["stages"][0], stage("groups-7B", {"nvidia-h200-training.json": groups})]
    assert run(monkeypatch, project, record, second) == 0
    table = (project / "README.md").read_text()
    assert "fastrm over a plain pairwise trainer | 2.50x |" in table
    assert "groups of 4, 1300/300: fastrm over a plain pairwise trainer | 10.00x |" in table


def _facts(record):
    return record["stages"][0]["results"]["facts.json"]


def _tests(record):
    return record["stages"][1]["results"]["tests.json"]


def _fastrm(record):
    return record["stages"][3]["results"]["nvidia-h200-training.json"]["entries"][0]["variants"]


def _turns(record):
    (found,) = (stage["results"] for stage in record["stages"] if stage["name"] == "turn-loss")
    return found["turn_loss.json"]["programs"]


REFUSALS = {
    "a rehearsal": (lambda r: r.update(rehearsal=True), "a rehearsal"),
    "a CPU": (lambda r: _facts(r).update(on_gpu=False), "no GPU"),
    "no facts": (lambda r: r["stages"].pop(0), "no GPU"),
    "a failed test": (
        lambda r: _tests(r).update(failed=1, failures=[{"test": "tests/test_x.py::test_y", "text": ""}]),
        "1 GPU tests failed, first tests/test_x.py::test_y",
    ),
    "unfinished tests": (lambda r: _tests(r).update(finished=False), "not finished"),
    "no tests": (lambda r: r["stages"].pop(1), "the GPU tests have no result"),
    "a red gate": (
        lambda r: _fastrm(r).update({FASTRM: {"failed": "red gate: loss 0.7"}}),
        "7B pairs, 1300/300, fastrm: red gate: loss 0.7",
    ),
    "a red gate of what critics write": (
        lambda r: _turns(r).update({"Liger's kernel": {"failed": "red gate: head: error 1"}}),
        "loss of turns 7B, Liger's kernel: red gate: head: error 1",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_measurement_is_refused_and_nothing_is_written(project, record, monkeypatch, capsys, name):
    change, message = REFUSALS[name]
    change(record)
    before = contents(project)
    assert run(monkeypatch, project, record) == 1
    assert message in capsys.readouterr().err and contents(project) == before


def test_two_devices_or_versions_are_no_one_day(project, record, monkeypatch, capsys):
    for changes, message in (({"device": "NVIDIA H100"}, "several devices"), ({"torch": "2.12"}, "versions of torch")):
        other = copy.deepcopy(record)
        _facts(other).update({k: v for k, v in changes.items() if k == "device"})
        _facts(other)["versions"] = {**VERSIONS, **{k: v for k, v in changes.items() if k != "device"}}
        assert run(monkeypatch, project, record, other) == 1
        assert message in capsys.readouterr().err


def test_a_lost_marker_is_found_before_anything_is_written(project, record, monkeypatch, capsys):
    (project / "README.md").write_text("no markers")
    before = contents(project)
    assert run(monkeypatch, project, record) == 1
    assert "the markers" in capsys.readouterr().err and contents(project) == before


def test_a_file_that_is_no_day_is_refused(project, monkeypatch, capsys):
    assert run(monkeypatch, project, {"stages": []}) == 1
    assert "nothing adopted" in capsys.readouterr().err


def test_a_day_is_drawn_with_what_follows_from_it(record):
    text = "\n".join(day_lines(record))
    for line in (
        "- Attention takes 6.0% of the profiled step (rule: 8%): leave its kernels as they are.",
        "- FP8 over bf16: rowwise 1.09x, tensorwise 1.20x: take tensorwise.",
        "- The update takes 25% of a step; 'static width, no checks' would save 16.7% of it (rule: 3%): change to "
        "'static width, no checks'.",
        "- The loss of what critics write: Liger's kernel is 1.20 times as fast as chunks of PyTorch's operations "
        "(rule: `auto` takes the faster one).",
        "| Liger's kernel                 | 0.0500 | 1.67x        | 2,400    |",
        "71 passed, 0 failed, 0 errors, 2 skipped.",
        "| 7B, pairs, 1300/300 | fastrm  ",
    ):
        assert line in text
    assert "**no**" in text and "1.053" in text and "![" not in text
    assert attention_share(record) == 0.06
    assert {row[2:] for row in planned_memory(training_report(record))} == {(950.0, 1000.0)}
    record["stages"] = record["stages"][:1]
    assert "What follows" in "\n".join(day_lines(record)), "that there were no tests"
    record["stages"] = []
    assert day_lines(record)[0] == "# GPU day"


def test_results_of_a_day_are_files_that_the_benchmarks_read(project, record, monkeypatch):
    assert run(monkeypatch, project, record) == 0
    results = project / "bench" / "results"
    (day,) = (json.loads(file.read_text()) for file in results.glob("*" + adopt.DAY_SUFFIX))
    assert day["device"] == H200 and day["stages"]["step-7B"].startswith("killed") and day["tests"]["passed"] == 71
    assert any(report["device"] == H200 for report in training_results.load_all(results))
    (found,) = (report for report in kernel_results.load_all(results) if report["device"] == H200)
    assert found["operations"].keys() == {ATTENTION}, "a quick run is no table"
