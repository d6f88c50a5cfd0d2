from pathlib import Path

from setuptools import setup

setup(
    name="fastrm",
    version="0.1.0",
    description="Fast exact training, evaluation and scoring of scalar multimodal reward models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Named one by one: `kernels/` is only a place, its package is fastrm_kernels.
    packages=[
        "fastrm",
        "fastrm.data",
        "fastrm.data.sources",
        "fastrm.evaluate",
        "fastrm.model",
        "fastrm.train",
        "fastrm_kernels",
        "fastrm_kernels.preference_head",
        "fastrm_kernels.tree_attention",
    ],
    package_dir={"fastrm": "fastrm", "fastrm_kernels": "kernels/fastrm_kernels"},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "triton>=3.6; platform_system == 'Linux'",
        "huggingface_hub",
        "jinja2>=3.1",
        "matplotlib",
        "numpy",
        "pillow>=12.2",
        "psutil",
        "pyarrow",
        "pydantic>=2.11",
        "pyyaml",
        "rich",
        "safetensors>=0.8.0",
        "scikit-learn",
        "typer",
    ],
    extras_require={
        "report": ["tensorboard", "wandb"],
        "test": [
            "build",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist",
            "ruff==0.17.6",
            "tensorboard",
            "trl>=1.0",
        ],
    },
    entry_points={"console_scripts": ["fastrm=fastrm.cli:main"]},
)
