"""AdamW for weights in bfloat16 and moments in 8 bits.

torchao's AdamW8bit does the same, but compiles one program for every shape of parameter, on a CPU too:
on the 17 shapes of the quick start's model its first step took 80 s on one core. Here each parameter is
a flat run of elements, cut into chunks: one program fits all shapes, and temporaries are bounded. A CPU
runs it eagerly and needs no compiler; CUDA runs one Triton kernel (fastrm_kernels.compact_adamw).

Two things are kept from torchao: the 8-bit code, and its block of 256 elements with one scale.

Stochastic rounding: a bfloat16 weight of 0.02 has neighbours 1.2e-4 away, and an update of 3e-6 would
be rounded away at every step. Rounding up with a probability equal to the distance from the lower
neighbour keeps the expected weight exact. It costs noise of about sqrt(update * spacing) per step, here
2e-5, which float32 weights do not have.
"""

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from functools import cache

import torch

from fastrm.errors import ConfigError
from fastrm_kernels.compact_adamw import BLOCK, MomentCode, compact_adamw

# Parameters with fewer elements keep float32 moments, as in the paper's and torchao's implementations.
MIN_QUANTIZED = 4096
# Elements of a chunk, a multiple of BLOCK. On CUDA it bounds the memory of the noise (2 bytes an
# element); on a CPU all temporaries of a chunk stay in the cache.
CHUNK = {"cuda": 2**26, "cpu": 2**16}


def is_quantizable(parameter: torch.Tensor) -> bool:
    """Return whether a parameter's moments can be held in 8 bits: it is large enough, in whole blocks."""
    return parameter.numel() >= MIN_QUANTIZED and parameter.numel() % BLOCK == 0


class CompactAdamW(torch.optim.Optimizer):
    """The optimizer AdamW for contiguous float32 or bfloat16 parameters with float32 gradients.

    A group's `gradient_scale` multiplies its gradients as they are read: what normalises and clips them.
    Arithmetic is in float32. bfloat16 parameters are rounded stochastically, by random numbers that are
    a pure function of (seed, group["step"], parameter name) on one kind of device: there is no state
    of a generator to save. The update is the one of torch.optim.AdamW (Loshchilov and Hutter 2019).

    State of a parameter: `step`, a float32 scalar on the CPU, and either `exp_avg` and `exp_avg_sq` in
    float32, or for each of them `_codes`, uint8 of the parameter's shape, and `_scale`, float32 of one
    number a block.

    Args:
        groups: {"params": [(name, parameter), ...], "weight_decay": float} each.
        states: fp32, or 8bit for the parameters where `is_quantizable`.
        seed: of the rounding.

    Raises:
        ConfigError: if states are 8bit and torchao is missing, or on CUDA without a C compiler.
    """

    def __init__(self, groups: list[dict], *, lr: float, betas: list[float], eps: float, states: str, seed: int):
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "step": 0, "gradient_scale": 1.0})
        self.states, self.seed = states, seed
        if states == "8bit":
            require_torchao()
        if any(parameter.is_cuda for group in self.param_groups for parameter in group["params"]):
            require_c_compiler()

    def is_quantized(self, parameter: torch.Tensor) -> bool:
        """Return whether this parameter's moments are held in 8 bits."""
        return self.states == "8bit" and is_quantizable(parameter)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient. group["step"] is the step of the run."""
        for group in self.param_groups:
            coefficients: dict[float, torch.Tensor] = {}  # by the number of updates, which most parameters share
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self.new_state(parameter))
                state["step"] += 1
                count = float(state["step"])
                if count not in coefficients:
                    coefficients[count] = _coefficients(group, count, parameter.device)
                impl = "triton" if parameter.is_cuda else "eager"
                for chunk in self._chunks(parameter, state, f"{self.seed}/{group['step']}/{name}"):
                    compact_adamw(*chunk, coefficients[count], impl=impl)

    def _moment_names(self, parameter: torch.Tensor) -> list[str]:
        parts = ("_codes", "_scale") if self.is_quantized(parameter) else ("",)
        return [f"{moment}{part}" for moment in ("exp_avg", "exp_avg_sq") for part in parts]

    def new_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state of a parameter before its first update."""
        state = {"step": torch.zeros((), dtype=torch.float32)}
        for name in self._moment_names(parameter):
            if name.endswith("_codes"):
                # Code 0 is not the number 0, but at scale 0 every code is.
                state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
            elif name.endswith("_scale"):
                state[name] = torch.zeros(parameter.numel() // BLOCK, device=parameter.device)
            else:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return state

    def _chunks(self, parameter: torch.Tensor, state: dict[str, torch.Tensor], key: str) -> Iterator[tuple]:
        """Yield the update's arguments without the coefficients, chunk by chunk. `key` fixes the noise."""
        quantized, device = self.is_quantized(parameter), parameter.device
        width = BLOCK if quantized else 1
        num_rows = parameter.numel() // width
        weight = parameter.detach().view(num_rows, width)
        moments = [state[name].view(num_rows, -1) for name in self._moment_names(parameter)]
        # A gradient has its parameter's layout, unless another one was assigned: then this copies.
        gradient = parameter.grad.reshape(num_rows, -1)
        codes = [(code,) for code in _code_maps(device)] if quantized else [(), ()]
        generator = _generator(key, device) if parameter.dtype is torch.bfloat16 else None
        size, half = CHUNK[device.type] // width, len(moments) // 2
        for start in range(0, num_rows, size):
            rows = slice(start, start + size)
            first, second = [m[rows] for m in moments[:half]], [m[rows] for m in moments[half:]]
            noise = None
            if generator is not None:
                noise = torch.empty(weight[rows].shape, dtype=torch.int16, device=device)
                noise.random_(-(2**15), 2**15, generator=generator)
            yield weight[rows], gradient[rows], (*first, *codes[0]), (*second, *codes[1]), noise


def _coefficients(group: dict, count: float, device: torch.device) -> torch.Tensor:
    """Return (7,) float32, as `fastrm_kernels.compact_adamw` takes them, after `count` updates with this one."""
    beta1, beta2 = group["betas"]
    values = [
        1.0 - group["lr"] * group["weight_decay"],
        1.0 - beta1,
        1.0 - beta2,
        group["lr"] / (1.0 - beta1**count),
        (1.0 - beta2**count) ** -0.5,
        group["eps"],
        group["gradient_scale"],
    ]
    found = torch.tensor(values, dtype=torch.float32)
    # From pageable memory the copy would wait for all work of the device.
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


def _generator(key: str, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


@cache
def _code_maps(device: torch.device) -> tuple[MomentCode, MomentCode]:
    """Return the signed code, for first moments, and the unsigned one, for second moments."""
    from torchao.optim.quant_utils import create_dynamic_map

    maps = (torch.tensor(create_dynamic_map(signed=signed)) for signed in (True, False))
    signed, unsigned = map(MomentCode.from_values, maps)
    return signed.to(device), unsigned.to(device)


def require_torchao() -> None:
    """Raise ConfigError if torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            'optim.states: 8bit needs torchao, which is not installed; pip install "fastrm[torchao]", or set '
            "optim.states: fp32"
        )


def require_c_compiler() -> None:
    """Raise ConfigError if Triton, which compiles CUDA's program, will find no C compiler."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise ConfigError(
            "optim.states: 8bit and precision.weights: bf16 run a Triton kernel on CUDA, and Triton needs a C compiler "
            "for that: found neither $CC nor gcc nor clang; install gcc, or set optim.states: fp32 and "
            "precision.weights: fp32"
        )
