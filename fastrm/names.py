"""Names of devices and dtypes as people write them, in configurations, commands and Python; loads no torch."""

import re

DTYPES = {
    "fp32": ("fp32", "float32", "float", "f32"),
    "bf16": ("bf16", "bfloat16"),
    "fp16": ("fp16", "float16", "half", "f16"),
}
_NAMES = {name: short for short, names in DTYPES.items() for name in names}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def device_name(value: object) -> str:
    """Return auto, cpu, cuda or cuda:N for a text, a torch.device or the number of a GPU.

    Raises:
        ValueError: for anything else.
    """
    name = str(value).lower()
    name = f"cuda:{name}" if name.isdecimal() else name
    if not _DEVICE.fullmatch(name):
        raise ValueError(f"got {value!r}, wanted one of auto, cpu, cuda, cuda:0, cuda:1 ...")
    return name


def checked_dtype(value: object) -> str:
    """Return auto, or the name of a dtype as `dtype_name` does.

    Raises:
        ValueError: for anything else.
    """
    name = dtype_name(value)
    if name not in ("auto", *DTYPES):
        raise ValueError(f"got {value!r}, wanted one of auto, {', '.join(DTYPES)}")
    return name


def dtype_name(value: object) -> object:
    """Return fp32, bf16 or fp16 for any of their names, as `bfloat16` and `torch.bfloat16`; else the value itself."""
    return _NAMES.get(str(value).lower().removeprefix("torch."), value)
