"""FP8 for the large linear layers of the language model: the choice of layers, and a switch.

A linear layer of N x K is three matrix products over the T tokens of a pack: the output x W^T, the
gradient of the input g W and the gradient of the weight g^T x, 6 T N K FLOPs in all. FP8 does a
product in half the time of bf16, and pays for it by casting: x, W and g are read, scaled and written
again, in each direction that they are summed over. What is saved grows with N K and the casts with
N + K, so the layer must be wide both ways. With the data sheet of an H100 (989 TFLOP/s in bf16, twice
that in FP8, 3.35 TB/s), and x and g each cast twice at 3 bytes an element (one reading of bf16, one
writing of FP8), the two sides are equal at

    3 N K / 989e12 = 6 (N + K) / 3.35e12,    that is  N K / (N + K) = 590.

The k and v projections of the 7B (512 x 3584) are at 448, those of the 3B (256 x 2048) at 228: they
lose by themselves, and gain as rows of a fused q/k/v (2016 and 1138). The MLP is at 3014 and 1727.
This is arithmetic, not a measurement. It holds if each cast is a single kernel, as torch.compile makes
them, and if T is large: casting W, 10 bytes an element from float32, is 3 % of what is saved at 32,768
tokens a pack and 12 % at 8,192.

The numerics are those of torchao's recipes, float8 e4m3 with a scale from the tensor at hand:

    tensorwise      one scale a tensor; gradients g in e5m2.
    rowwise         one scale a row of x and of W^T (a token, an output), rounded to powers of two; g in
                    e4m3. In the gradient of the weight, one a column: over all tokens.
    rowwise_gw_hp   rowwise, with one scale for W in the gradient of the input, and the gradient of the
                    weight in bf16.

A scale over all tokens of a pack lets one response change the rounding of another's. In the row-wise
recipes rewards are free of it, bitwise; under tensorwise they are not, so that a reward also depends
on what else is in its pack.
"""

import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastrm.errors import ConfigError
from fastrm.model.experts import has_experts
from fastrm.model.lora import is_adapter_weight

# Configuration value -> torchao's name.
RECIPES = {"tensorwise": "tensorwise", "rowwise": "rowwise", "rowwise_gw_hp": "rowwise_with_gw_hp"}
# Both sizes of a weight, and the tokens, over which its gradient is summed, are multiples of this.
MULTIPLE = 16
# The least N K / (N + K) at which FP8 pays, see above.
LEAST_WIDTH = 590
OLDEST_CAPABILITY = (8, 9)

VISION = "vision tower: few of the FLOPs, and the MLP of Qwen2.5-VL's is 3,420 wide, no multiple of 16"
HEAD = "reward head: computes in float32"
LM_HEAD = "LM head: its products stay in bf16, and their cross entropy in float32"
LAST_LAYER = "last decoder layer: all but k and v runs on the anchors alone"
NARROW = "narrow k and v: the casts cost more than FP8 saves; model.fuse_projections puts them beside q"
UNEVEN = f"a size that is no multiple of {MULTIPLE}"


@dataclass(frozen=True)
class Fp8Choice:
    """The choice for one linear layer of a network: `reason` says why it stays as it is; None means FP8.

    Attributes:
        rows, columns: N and K of its weight (N, K).
        counts: part of the language model, and run on all tokens.
    """

    name: str
    rows: int
    columns: int
    counts: bool
    reason: str | None


@dataclass(frozen=True)
class Fp8Report:
    """The choices that `convert_to_fp8` has made for every linear layer of a network."""

    recipe: str
    emulated: bool
    choices: tuple[Fp8Choice, ...]

    @property
    def converted(self) -> list[str]:
        """The names of the layers in FP8."""
        return [choice.name for choice in self.choices if choice.reason is None]

    @property
    def flops_share(self) -> float:
        """The share in FP8 of the FLOPs of the language model's linear layers, forward and backward.

        A layer that runs on the anchors alone counts nothing, and so does attention.
        """
        total = sum(choice.rows * choice.columns for choice in self.choices if choice.counts)
        converted = sum(choice.rows * choice.columns for choice in self.choices if choice.reason is None)
        products = 2 / 3 if self.recipe == "rowwise_gw_hp" else 1  # share of a layer's three products
        return products * converted / total

    def lines(self, compiled: bool) -> list[str]:
        """Return the lines that a run prints at its start: the layers in FP8, then each reason against it.

        Args:
            compiled: decoder layers go through torch.compile.
        """
        how = ", emulated (no FP8 hardware: its rounding without its speed)" if self.emulated else ""
        lines = [
            f"FP8: {self.recipe}{how}, {len(self.converted):,} of {len(self.choices):,} linear layers, "
            f"{self.flops_share:.1%} of the FLOPs of the language model's"
        ]
        reasons = Counter(choice.reason for choice in self.choices if choice.reason is not None)
        lines += [f"FP8: not in {count:,}: {reason}" for reason, count in reasons.items()]
        if not (compiled or self.emulated):
            lines.append("warning: FP8 casts in many small kernels without compile: layers; bf16 may be faster")
        return lines


def convert_to_fp8(network: nn.Module, recipe: str, *, emulate: bool | None = None) -> Fp8Report:
    """Convert the large linear layers of the language model to FP8, in place.

    Parameters stay the same objects, with the same names and dtype; so an optimizer, a state dict and an
    export see no difference. A frozen layer is converted too: its output and the gradient of its input
    gain. From then on the network refuses packs whose number of tokens is no multiple of 16.

    Args:
        network: a RewardNetwork on its device, with its projections fused if they are to be.
        recipe: a key of RECIPES.
        emulate: compute the same rounding in float32, on any device. None: where the device is no GPU.

    Raises:
        ConfigError: if torchao is not installed, the device has no FP8, or no layer can be converted.
    """
    if any(map(has_experts, network.modules())):
        raise ConfigError(
            f"precision.fp8: {recipe}: the experts of {network.model.config.model_type} are no linear layers, and "
            "cannot be converted; set it to off"
        )
    emulate = network.device.type != "cuda" if emulate is None else emulate
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f'precision.fp8: {recipe} needs torchao, not installed here; pip install "fastrm[torchao]"')
    if not emulate and network.device.type != "meta":
        _check_device(network.device)
    report = Fp8Report(recipe, emulate, tuple(_choose(network)))
    if not report.converted:
        reasons = "; ".join(dict.fromkeys(choice.reason for choice in report.choices))
        raise ConfigError(f"precision.fp8: {recipe}: no linear layer can be converted ({reasons}); set it to off")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    from fastrm.model.fp8_linear import to_fp8

    config = replace(Float8LinearConfig.from_recipe_name(RECIPES[recipe]), emulate=emulate)
    # This call converts nothing; it works around versions of inductor that store FP8 wrongly.
    convert_to_float8_training(nn.Module(), config=config)
    for name in report.converted:
        parent, _, attribute = name.rpartition(".")
        linear = network.get_submodule(name)
        setattr(network.get_submodule(parent), attribute, to_fp8(linear, config))
    network.register_forward_pre_hook(_check_tokens)
    return report


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(f"precision.fp8: needs a CUDA device, this is {device.type}; emulate it, or set it to off")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        raise ConfigError(
            f"precision.fp8: {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, FP8 needs 8.9 (Ada, Hopper) or newer; set precision.fp8: off"
        )


def _choose(network: nn.Module) -> Iterator[Fp8Choice]:
    language = getattr(network.model, "language_model", network.model)
    # If the head reads means, or all tokens are learnt, the last layer runs like the others.
    reads_anchors = network.pooling == "anchor" and network.paradigm == "reward"
    last = {id(module) for module in language.layers[-1].modules()} if reads_anchors else set()
    layers = {id(module) for layer in language.layers for module in layer.modules()}
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear) or is_adapter_weight(name):
            continue
        is_kv = name.removesuffix(".base_layer").endswith((".k_proj", ".v_proj"))
        counts = id(module) in layers and (id(module) not in last or is_kv)
        if id(module) not in layers:
            reason = {"score": HEAD, "lm_head": LM_HEAD}.get(name.partition(".")[0], VISION)
        elif id(module) in last:
            reason = LAST_LAYER
        else:
            reason = _obstacle(module.out_features, module.in_features, is_kv)
        yield Fp8Choice(name, module.out_features, module.in_features, counts, reason)


def _obstacle(rows: int, columns: int, is_kv: bool) -> str | None:
    """Return why a weight (rows, columns) of a layer that runs on all tokens stays in bf16, or None."""
    if rows % MULTIPLE or columns % MULTIPLE:
        return UNEVEN
    # The rule is for k and v alone: no other layer of a model of 1.5 billion parameters or more is that narrow, and
    # smaller ones are trained for their numerics, not for their speed.
    if is_kv and rows * columns < LEAST_WIDTH * (rows + columns):
        return NARROW
    return None


def _check_tokens(network: nn.Module, arguments: tuple) -> None:
    num_rows = arguments[0].input_ids.shape[0]  # with padding
    if num_rows % MULTIPLE:
        raise ValueError(
            f"a pack of {num_rows:,} tokens: FP8 needs a multiple of {MULTIPLE}; build it with multiple={MULTIPLE}"
        )


def token_multiple(recipe: str) -> int:
    """Return the number that every pack's number of tokens must be a multiple of, by `precision.fp8`."""
    return 1 if recipe == "off" else MULTIPLE


@contextmanager
def fp8_disabled(network: nn.Module):
    """Compute all layers as before `convert_to_fp8`, with their present weights, until the block ends.

    Compiled layers are compiled once more for it.
    """
    from fastrm.model.fp8_linear import Fp8Linear

    linears = [module for module in network.modules() if isinstance(module, Fp8Linear) and module.enabled]
    for linear in linears:
        linear.enabled = False
    try:
        yield
    finally:
        for linear in linears:
            linear.enabled = True
