"""What is found in the folders as a wheel is built: the packages, and where the kernels come from.

fastrm depends on the distribution fastrm-kernels, which is built in kernels/ and can be installed alone. A build of
these files holds it: `pip install .` needs nothing that is not here, and no other project can take the name's place.
With FASTRM_KERNELS=apart the wheel holds fastrm only and requires fastrm-kernels of this version (`make wheels`).
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

KERNELS = "fastrm_kernels"


def find(folder: str, package: str) -> list[str]:
    return find_packages(folder, include=[package, f"{package}.*"])


packages = find(".", "fastrm")
requirements = [
    "torch>=2.11",
    # From 5.18 on its own times of Qwen2.5-VL's videos are fastrm's; from 5.23 on it renames the weights of
    # published InternVL checkpoints.
    "transformers>=5.17",
    "datasets>=4.4",  # for one question to the hub: which files the splits of a data set have
    "huggingface_hub",
    "jinja2>=3.1",
    "matplotlib",
    "numpy",
    "packaging",
    "pillow>=12.2",
    "psutil",
    "pyarrow",
    "pydantic>=2.11",
    "pyyaml",
    "rich",
    "safetensors>=0.8.0",
    "scikit-learn",  # for the 1,797 images of digits of the first example
    "scipy",  # for intervals of accuracies and of paired differences
    "typer",
]
if os.environ.get("FASTRM_KERNELS") == "apart":
    text = Path("kernels", KERNELS, "__init__.py").read_text(encoding="utf-8")
    requirements.append("fastrm-kernels==" + re.search('^__version__ = "(.+)"$', text, re.MULTILINE)[1])
else:
    packages += find("kernels", KERNELS)
    requirements.append("triton>=3.6; platform_system == 'Linux'")  # the kernels' own requirement, beside torch

setup(packages=packages, package_dir={KERNELS: f"kernels/{KERNELS}"}, install_requires=requirements)
