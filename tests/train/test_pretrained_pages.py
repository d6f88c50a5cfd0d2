"""SmolLM2-135M-Instruct leaves a tracker's run and a page, and two of its runs are compared."""

import json

from fastrm.train.run_pages import compare_runs
from tests.helpers.runs import run, text_rows, write_rows
from tests.helpers.smollm2 import needs_smollm2


@needs_smollm2
def test_a_run_of_real_weights_is_tracked_shown_and_compared(smollm2_folder, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(8))
    for name, rate in (("low", 1e-6), ("high", 1e-5)):
        tree = {
            "run": {"dir": str(tmp_path / name), "max_steps": 1, "report_to": ["tensorboard"]},
            "data": {"train": [{"path": str(rows)}], "eval": [{"path": str(rows)}], "num_workers": 0},
            "model": {"path": str(smollm2_folder)},
            "optim": {"lr": rate, "batch_pairs": 4, "schedule": "constant"},
            "precision": {"dtype": "fp32"},
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(tree))
        summary = run(tmp_path / f"{name}.yaml")
        assert f"{summary['eval_accuracy']:.4f}" in (tmp_path / name / "report.html").read_text()
        assert list((tmp_path / name / "tensorboard").glob("events.out.tfevents.*"))
    compare_runs([tmp_path / "low", tmp_path / "high"], tmp_path / "compare.html")
    assert "optim.lr  1e-06  1e-05" in capsys.readouterr().out
