"""The modules that one training batch goes through, which docs/architecture.md lists: a new one is seen there."""

import re
import sys
from contextlib import closing

from fastrm.config import load_config
from fastrm.train import loop
from tests.helpers.project import PROJECT
from tests.helpers.runs import colour_rows, tiny_config

MOST_MODULES = 28  # of fastrm: what a reader of the training path has to open


def test_a_batch_goes_through_the_modules_that_are_listed(tmp_path, monkeypatch):
    data = colour_rows(tmp_path, 24)
    run = {"max_steps": 3, "log_every": 10, "save_every": 100, "eval_every": 100}
    config = load_config(tiny_config(tmp_path, data, data, run=run, data={"num_workers": 0}), [])
    entered, steps_of = set(), loop._steps

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_name != "<module>":
            entered.add(frame.f_code.co_filename)

    def traced(*arguments):
        """The second step and its update: what is made once, at the first, is not counted."""
        with closing(steps_of(*arguments)) as steps:
            for number, step in enumerate(steps):
                sys.setprofile(note if number == 1 else None)
                yield step
        sys.setprofile(None)

    monkeypatch.setattr(loop, "_steps", traced)
    loop.train(config, "no")
    folders = (PROJECT, PROJECT / "kernels")
    files = [(file, folder) for folder in folders for file in folder.glob("fastrm*/**/*.py")]
    found = {str(file.relative_to(folder)) for file, folder in files if str(file) in entered}
    page = (PROJECT / "docs" / "architecture.md").read_text()
    section = page.split("## The modules of one batch")[1].split("\n## ")[0]
    listed = set(re.findall(r"`((?:fastrm|fastrm_kernels)/[a-z_0-9/]+\.py)`", section))
    assert found == listed
    assert len([name for name in found if name.startswith("fastrm/")]) <= MOST_MODULES
