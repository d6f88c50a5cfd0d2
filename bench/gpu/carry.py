"""The packages for a GPU machine without a network: wheels that it lacks, fastrm's own, a warm Triton cache.

    python bench/gpu/carry.py --prepare .gpu-day                     what `make gpu-day` does
    python bench/gpu/carry.py --unpack .gpu-day --site S --out O     the first stage of gpu_day.py, over there

Wheels are unpacked as they are, without pip: one that is damaged costs itself alone, and unpack.json says so.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import ROOT
from bench.harness.results import write_json

# The machine's Python and Triton, and the platforms whose wheels its glibc runs. It has torch and transformers.
PYTHON, TRITON = "3.12", "3.6.0"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64",
             "manylinux1_x86_64")  # fmt: skip
# pip chooses versions that go together for the first; the others' dependencies are torch and what comes with it.
RESOLVED, ALONE = ("pydantic>=2.11",), ("torchao>=0.18", "liger-kernel>=0.8.5")
LIMIT_BYTES = 64 << 20  # the most bytes of the folder and the project's tracked files together
CACHE = "triton-cache.tar.gz"
# The files of a compiled kernel that Triton reads when it finds it again; all stages are ten times as large.
CACHED = {".cubin", ".json"}
NOT_UNPACKED = ("test", "tests")  # liger-kernel brings a top-level `test`, which would hide the standard library's


# Here


def prepare(folder: Path, python: Path) -> int:
    """Fill the folder and print the command to run; return the exit status.

    Args:
        python: interpreter whose Triton compiles the kernels ahead of time, if it is the machine's version.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    download(folder)
    build_wheel(folder)
    print(warm_cache(folder, python))
    carried, tracked = folder_bytes(folder), tracked_bytes()
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size / 1e6:8.2f} MB  {file.name}")
    print(f"{carried / 1e6:8.2f} MB  carried, and {tracked / 1e6:.2f} MB of tracked files")
    if carried + tracked > LIMIT_BYTES:
        print(f"more than {LIMIT_BYTES >> 20} MiB together: too much to carry", file=sys.stderr)
        return 1
    name = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    print(
        f"\nTake the project and its folder {name} to a machine with a GPU. There, in the project's folder, with 590 "
        f"seconds for the command:\n\n    python3 bench/gpu_day.py --wheels {name} --out ${{OUT:-gpu-day}} --seconds "
        "540\n\nThen, here: python bench/gpu/adopt.py FOLDER/gpu_day.json"
    )
    return 0


def download(folder: Path) -> None:
    """Download the wheels with pip."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", str(folder),
           "--python-version", PYTHON, "--implementation", "cp"]  # fmt: skip
    pip += [option for platform in PLATFORMS for option in ("--platform", platform)]
    subprocess.run([*pip, *RESOLVED], check=True)
    subprocess.run([*pip, "--no-deps", *ALONE], check=True)


def build_wheel(folder: Path) -> None:
    """Build fastrm's own wheel, for its metadata, from a copy; its code is run from the project's folder."""
    with tempfile.TemporaryDirectory() as place:
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, place)
        for name in ("fastrm", "kernels"):
            shutil.copytree(ROOT / name, Path(place) / name, ignore=shutil.ignore_patterns("__pycache__"))
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), place]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def warm_cache(folder: Path, python: Path) -> str:
    """Compile the kernels for sm_90 into the folder; return the outcome in words."""
    ask = [str(python), "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    if found != TRITON:
        return (
            f"no warm Triton cache: {python} has Triton {found or 'none'}, the machine {TRITON}, and another version's "
            "kernels are not found again; GPU_PYTHON=PATH names an interpreter that has it"
        )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT / "kernels")}
        environment.pop("TRITON_INTERPRET", None)
        command = [str(python), str(ROOT / "kernels" / "tools" / "aot.py")]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=3600)
        if done.returncode:
            return f"no warm Triton cache: compiling ahead of time ended with exit status {done.returncode}"
        kernels = pack_cache(Path(cache), folder / CACHE)
    return f"a warm Triton cache of {kernels} kernels"


def pack_cache(cache: Path, file: Path) -> int:
    """Pack what Triton has to find again; return the number of kernels. Paths in it become relative."""
    kernels = 0
    with tarfile.open(file, "w:gz") as archive:
        for path in sorted(cache.rglob("*")):
            if path.suffix not in CACHED:
                continue
            content = path.read_bytes()
            if path.name.startswith("__grp__"):
                children = json.loads(content)["child_paths"]
                kept = [name for name in children if Path(name).suffix in CACHED]
                content = json.dumps({"child_paths": {name: name for name in kept}}).encode()
                kernels += 1
            entry = tarfile.TarInfo(str(path.relative_to(cache)))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return kernels


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def tracked_bytes() -> int:
    """Return the bytes of the project's files under version control; without it, of all files."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        return folder_bytes(ROOT)
    files = [ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    return sum(file.stat().st_size for file in files if file.is_file())


# There


def unpack(folder: Path, site: Path, out: Path) -> int:
    """Unpack wheels to `site` and the Triton cache to TRITON_CACHE_DIR; return the exit status."""
    found = {}
    for wheel in sorted(folder.glob("*.whl")):
        found[wheel.name] = _tried(lambda wheel=wheel: unpack_wheel(wheel, site))
    if (folder / CACHE).exists():
        place = Path(os.environ["TRITON_CACHE_DIR"])
        found[CACHE] = _tried(lambda: unpack_cache(folder / CACHE, place))
    for name, result in found.items():
        print(f"{name}: {result}")
    if not found:
        print(f"{folder} holds no wheels; make gpu-day fills it")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "unpack.json", found)
    return 0 if found and all(result == "ok" for result in found.values()) else 1


def unpack_wheel(wheel: Path, site: Path) -> None:
    """Put the wheel's packages and metadata into `site`.

    Raises:
        ValueError: for a wheel of another Python.
    """
    tag, mine = wheel.stem.split("-")[-3:-1], f"cp{sys.version_info.major}{sys.version_info.minor}"
    if tag[0].startswith("cp") and tag[1] != "abi3" and mine not in tag[0].split("."):
        raise ValueError(f"made for {tag[0]}, this is {mine}")
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if entry.filename.split("/")[0] not in NOT_UNPACKED:
                archive.extract(entry, site)  # never outside of it


def unpack_cache(file: Path, place: Path) -> None:
    """Put the kernels where Triton looks for them, with the paths that they have there."""
    place.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file) as archive:
        archive.extractall(place, filter="data")
    for group in place.rglob("__grp__*.json"):
        children = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in children}}))


def _tried(action) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--prepare", type=Path, metavar="FOLDER", help="fill this folder")
    action.add_argument("--unpack", type=Path, metavar="FOLDER", help="unpack this folder")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="whose Triton compiles the kernels")
    parser.add_argument("--site", type=Path, help="folder for packages")
    parser.add_argument("--out", type=Path, help="folder of unpack.json")
    arguments = parser.parse_args()
    if arguments.prepare:
        return prepare(arguments.prepare.resolve(), arguments.python)
    return unpack(arguments.unpack, arguments.site, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
