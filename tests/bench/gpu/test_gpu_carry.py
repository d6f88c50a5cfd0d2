"""What a GPU machine is brought along: packed here, unpacked there, whole or said to be damaged."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.gpu import carry as gpu_carry
from tests.helpers.project import PROJECT
from tests.helpers.waiting import PATIENCE

MINE = f"cp{sys.version_info.major}{sys.version_info.minor}"
# Compiles one kernel for sm_90, or finds it in TRITON_CACHE_DIR.
COMPILE = """
import aot
from production import production_launches
binary = next(b for labels, b in aot.distinct(production_launches(), 90) if b.kernel == "linear_head_sum_kernel")
aot.run_compiler(binary, 90)
"""


def make_wheel(folder, name, *files):
    with zipfile.ZipFile(folder / name, "w") as wheel:
        for file in files:
            wheel.writestr(file, f"# {file}")


def test_wheels_are_unpacked_and_a_damaged_one_costs_itself_alone(tmp_path):
    carried, site = tmp_path / "carried", tmp_path / "site"
    carried.mkdir()
    make_wheel(carried, "good-1.0-py3-none-any.whl", "good/__init__.py", "good-1.0.dist-info/METADATA", "test/x.py")
    make_wheel(carried, f"mine-1.0-{MINE}-{MINE}-linux_x86_64.whl", "mine.so")
    make_wheel(carried, "stable-1.0-cp310-abi3-linux_x86_64.whl", "stable.so")
    make_wheel(carried, "other-1.0-cp39-cp39-linux_x86_64.whl", "other.so")
    make_wheel(carried, "sly-1.0-py3-none-any.whl", "../outside.py")
    (carried / "torn-1.0-py3-none-any.whl").write_bytes((carried / "good-1.0-py3-none-any.whl").read_bytes()[:-40])
    assert gpu_carry.unpack(carried, site, tmp_path / "out") == 1
    found = json.loads((tmp_path / "out" / "unpack.json").read_text())
    wrong = {name.split("-")[0]: result for name, result in found.items() if result != "ok"}
    assert wrong.keys() == {"other", "torn"} and "BadZipFile" in wrong["torn"]
    assert wrong["other"] == f"ValueError: made for cp39, this is {MINE}"
    assert sorted(str(file.relative_to(site)) for file in site.rglob("*") if file.is_file()) == [
        "good-1.0.dist-info/METADATA", "good/__init__.py", "mine.so", "outside.py", "stable.so",
    ]  # fmt: skip
    assert not (tmp_path / "outside.py").exists()


def test_an_empty_folder_is_said(tmp_path, capsys):
    assert gpu_carry.unpack(tmp_path, tmp_path / "site", tmp_path / "out") == 1
    assert "make gpu-day fills it" in capsys.readouterr().out


def test_a_carried_triton_cache_is_found_again_at_another_place(tmp_path):
    """With the binaries and descriptions alone: what Triton keeps of its intermediate stages stays behind."""

    def compile_into(folder):
        path = os.pathsep.join(str(PROJECT / "kernels" / name) for name in ("", "tools"))
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": path}
        environment.pop("TRITON_INTERPRET", None)
        subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True, timeout=PATIENCE)
        return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())

    made = compile_into(tmp_path / "here")
    assert any(name.endswith(".ttgir") for name in made)
    assert gpu_carry.pack_cache(tmp_path / "here", tmp_path / gpu_carry.CACHE) == 1
    (tmp_path / "here").rename(tmp_path / "gone")
    gpu_carry.unpack_cache(tmp_path / gpu_carry.CACHE, tmp_path / "there")
    kept = [name for name in made if Path(name).suffix in gpu_carry.CACHED]
    assert compile_into(tmp_path / "there") == kept, "compiled anew"


def test_no_cache_is_made_by_another_version_of_triton(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_carry, "TRITON", "0.1.0")
    said = gpu_carry.warm_cache(tmp_path, Path(sys.executable))
    assert said.startswith("no warm Triton cache: ") and "GPU_PYTHON" in said and not list(tmp_path.iterdir())


def test_too_much_to_carry_is_refused(tmp_path, monkeypatch, capsys):
    def download(folder):
        (folder / "a-1-py3-none-any.whl").write_bytes(bytes(3000))

    monkeypatch.setattr(gpu_carry, "download", download)
    monkeypatch.setattr(gpu_carry, "build_wheel", lambda folder: None)
    monkeypatch.setattr(gpu_carry, "warm_cache", lambda folder, python: "no cache")
    monkeypatch.setattr(gpu_carry, "tracked_bytes", lambda: gpu_carry.LIMIT_BYTES - 3000)
    assert gpu_carry.prepare(tmp_path / "carried", Path(sys.executable)) == 0
    assert "python3 bench/gpu_day.py --wheels " in capsys.readouterr().out
    monkeypatch.setattr(gpu_carry, "tracked_bytes", lambda: gpu_carry.LIMIT_BYTES - 2999)
    assert gpu_carry.prepare(tmp_path / "carried", Path(sys.executable)) == 1
    assert "too much to carry" in capsys.readouterr().err


@pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="no version control here")
def test_tracked_files_are_counted():
    assert (PROJECT / "README.md").stat().st_size < gpu_carry.tracked_bytes() < gpu_carry.LIMIT_BYTES
