"""What the `fastrm` command sets in its environment before torch is imported."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.waiting import PATIENCE

PROGRAM = """
import json, os, sys
from fastrm import cli

def run(**options):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    print(json.dumps([{name: os.environ.get(name) for name in names}, "torch" in sys.modules]))

cli.app = run
cli.main()
"""


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}),
    ],
    ids=["nothing is set", "the name of torch 2.9 and newer is set", "the older name is set"],
)
def test_cuda_memory_is_in_segments_that_grow_unless_somebody_says_otherwise(given, wanted):
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")}
    environment = {**inherited, **given}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    found, torch_was_imported = json.loads(done.stdout)
    assert {name: value for name, value in found.items() if value} == wanted
    assert not torch_was_imported
