"""The plugin as it is installed; and folders and options with which vLLM would read a model wrongly and is refused."""

import json
import shutil
import subprocess

import pytest

from bench.serving.vllm_process import cpu_settings
from fastrm.config import HeadConfig
from fastrm.model.export import save_model
from fastrm.model.export_command import export_model
from fastrm.ui import Display
from tests.helpers.project import PROJECT
from tests.helpers.support import FAMILIES, make_model
from tests.helpers.vllm_server import ENVIRONMENT, MISSING, refusal
from tests.kernels.test_vllm_serving import wide

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
# Loads all classes as vLLM does, by the names that the entry point has registered.
_LOAD = """
import fastrm_vllm
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins
load_general_plugins()
for name in fastrm_vllm.ARCHITECTURES:
    print(name, ModelRegistry.models[name].load_model_cls().__name__)
print(fastrm_vllm.__file__)
"""


def test_installed_by_pip_it_registers_classes_that_load(tmp_path):
    shutil.copytree(PROJECT / "kernels" / "vllm_plugin", tmp_path / "source")
    python, site = ENVIRONMENT / "bin" / "python", tmp_path / "site"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site]
    subprocess.run([*install, tmp_path / "source"], check=True)
    # In front of the environment's own folder, where make test-vllm links the plugin.
    settings = cpu_settings(tmp_path) | {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "VLLM_PLUGINS": "fastrm"}
    found = subprocess.run([python, "-c", _LOAD], env=settings, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    *classes, place = found.stdout.splitlines()[-13:]
    assert place.startswith(str(site))
    assert all(line.split()[0] == line.split()[1] for line in classes) and len(classes) == 12


def folder_of(place, *, reader="vllm", head=None, pooling="anchor", section=None):
    """Write a Qwen2 reward model for a reader, with other values in the `fastrm` section of its config.json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "qwen2", wide("qwen2"))
        save_model(make_model("qwen2", head=head, pooling=pooling), place / "ours")
    with Display() as display:
        export_model(place / "ours", place / "model", reader, display)
    file = place / "model" / "config.json"
    config = json.loads(file.read_text())
    config["fastrm"] |= section or {}
    file.write_text(json.dumps(config))
    return place / "model"


def test_a_folder_for_transformers_is_refused(tmp_path):
    # Its class is the backbone's, and vLLM finds the head's weights left over.
    said = refusal(folder_of(tmp_path, reader="transformers"), tmp_path / "log.txt")
    assert "score" in said.rpartition("ValueError")[2]


def test_without_the_plugin_its_class_is_refused_by_name(tmp_path):
    said = refusal(folder_of(tmp_path), tmp_path / "log.txt", VLLM_PLUGINS="none")
    assert "FastrmQwen2ForSequenceClassification" in said and "not supported" in said


def test_a_head_on_the_mean_is_refused_by_a_class_for_the_last_token(tmp_path):
    said = refusal(folder_of(tmp_path, section={"pooling": "mean"}), tmp_path / "log.txt")
    assert "is for an architecture FastrmWhole" in said
    assert "write the folder anew with fastrm export" in said


@pytest.mark.parametrize(
    "pooling, options, why",
    [
        ("anchor", ("--pooler-config", '{"seq_pooling_type": "MEAN"}'), "start vLLM without --pooler-config"),
        ("mean", ("--enable-chunked-prefill",), "reads whole conversations; start vLLM without --enable-chunked"),
        ("mean", ("--enable-prefix-caching",), "reads whole conversations; start vLLM without --enable-chunked"),
    ],
    ids=["mean", "chunks", "prefixes"],
)
def test_options_with_which_the_head_would_read_something_else_are_refused(tmp_path, pooling, options, why):
    folder = folder_of(tmp_path, head=HeadConfig(), pooling=pooling)
    assert why in refusal(folder, tmp_path / "log.txt", *options)
