"""A drop-in for the reward head of somebody else's model, computed by `reward_head`.

`fuse_reward_head(model)` puts a `FusedRewardHead` where the stock head was. It holds the same parameter
objects under the same state-dict keys, so optimizers, checkpoints and the model's own trainer do not
notice; only the arithmetic between hidden states and rewards changes.

Rewards leave in float32 (float64 for float64 inputs), whatever the precision of the model: a stock head
in bf16 rounds its reward to 8 bits, steps of 1/32 around a reward of 4, right before a loss that reads
small differences. The Triton kernels pass their float32 accumulator on; the eager path rounds where
torch's linear does, so that its bf16 rewards are the stock ones in a wider dtype. Under autocast the
products take operands in autocast's dtype, as those of the stock nn.Linear do; the output is float32 too.

A model's forward gives its head all positions. The Triton kernels save act(z) and its gains in float32 for the
backward pass of an MLP head, 8 F bytes a row where the stock one in half precision saves 4 F: for 16,384 rows
and F = 3,584 470 MB against 235 MB. A head of one layer saves nothing of that size.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastrm_kernels.dispatch import constant
from fastrm_kernels.preference_head.api import reward_head

HEAD_NAMES = ("score", "v_head", "value_head", "reward_head", "rm_head")
IMPLEMENTATIONS = ("auto", "triton", "eager")
MAX_LAYERS = 5
_ACTIVATIONS = {nn.Identity: "none", nn.Tanh: "tanh", nn.ReLU: "relu", nn.SiLU: "silu"}
_SUPPORTED = f"""Supported heads, under one of the attributes {", ".join(HEAD_NAMES)}:
  - nn.Linear(D, 1), with or without bias: transformers' *ForSequenceClassification with num_labels=1, value heads
  - nn.Sequential of nn.Linear, activation, ..., nn.Linear(F, 1): at most {MAX_LAYERS} nn.Linear, with one and the same
    activation between them: {", ".join(f"nn.{kind.__name__}" for kind in _ACTIVATIONS)}
  - a module that computes summary(dropout(hidden)) with an nn.Linear(D, 1) as `summary`: TRL's ValueHead
Under another attribute: model.name = FusedRewardHead(model.name)."""
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def fuse_reward_head(model: nn.Module, impl: str = "auto") -> nn.Module:
    """Swap the reward head of `model`, in place, for a FusedRewardHead; calling it again only sets `impl`.

    Args:
        model: holds one head, of a kind that FusedRewardHead reads, as attribute score, v_head,
            value_head, reward_head or rm_head. Fuse before DDP, FSDP, PEFT or torch.compile wrap it.
        impl: auto, triton or eager, as in `reward_head`; whether triton can run shows at the first call.

    Returns:
        the same model.

    Raises:
        ValueError: for an unknown impl, no head or several, or a head that cannot be replaced without
            losing something; the message names what was found and lists the supported kinds.
    """
    _check_impl(impl)
    name = _find_head(model)
    stock = model.get_submodule(name)
    if isinstance(stock, FusedRewardHead):
        stock.impl = impl
        return model
    try:
        fused = FusedRewardHead(stock, impl)
    except ValueError as error:
        raise ValueError(f"{type(model).__name__}.{name}: {error}") from error
    setattr(model, name, fused)
    return model


class FusedRewardHead(nn.Module):
    """A stock reward head with its parameters and key names, computed by `reward_head`.

    Parameters and submodules are taken over as they are: `weight` and `bias` of a Linear, `0`, `2`, ... of a
    Sequential (also by index), `summary` of a ValueHead. The inner nn.Linear are read, not called: hooks
    registered on them later do not run, and replacing one (LoRA, quantisation) raises at the next call.

    Args:
        stock: nn.Linear(D, 1); nn.Sequential of nn.Linear with one activation between; or a TRL ValueHead.
        impl: auto, triton or eager, as in `reward_head`.

    Raises:
        ValueError: for an unknown impl, another kind of head, hooks, wrapped or quantised layers.
    """

    def __init__(self, stock: nn.Module, impl: str = "auto"):
        super().__init__()
        _check_impl(impl)
        self.impl = impl
        self._head = _read_head(stock)
        for name, parameter in stock._parameters.items():
            self.register_parameter(name, parameter)
        for name, child in stock._modules.items():
            self.add_module(name, child)
        self.in_features = stock.get_submodule(self._head.linears[0]).in_features
        self.out_features = 1
        self.training = stock.training

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the rewards of all positions, as the stock head gives them but in float32.

        Args:
            hidden: (..., D), usually in the parameters' dtype; else, where nn.Linear raises, the products
                take their operands in hidden's.

        Returns:
            (..., 1) in float32, or float64 for float64 inputs.

        Raises:
            RuntimeError: if an inner nn.Linear was replaced after fusing.
            ValueError: from `reward_head`, if an explicit impl cannot run these inputs.
        """
        layers = list(self._layers())
        if self._head.dropout is not None:
            # ValueHead casts after its dropout: bf16 hidden states under a float32 head are usual.
            hidden = self.get_submodule(self._head.dropout)(hidden).to(layers[0][0].dtype)
        # Not (-1, in_features), which would accept rows of another width.
        rows = _as_autocast(hidden.reshape(-1, hidden.shape[-1]))
        rewards = reward_head(rows, None, layers, activation=self._head.activation, impl=self.impl)
        return rewards.reshape(*hidden.shape[:-1], 1)

    def __getitem__(self, index: int) -> nn.Module:
        """Return `model.score[0]`, for code that reads the layers of a Sequential."""
        return list(self._modules.values())[index]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, activation={self._head.activation}, impl={self.impl}"

    def _layers(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        for name in self._head.linears:
            linear = self.get_submodule(name)
            if linear is not self and type(linear) is not nn.Linear:
                raise RuntimeError(
                    f"FusedRewardHead: layer {name!r} was replaced by {_describe(linear)} after fusing, which would be "
                    "ignored; put the stock head back before wrapping or quantising it"
                )
            yield linear.weight, linear.bias


@dataclass(frozen=True)
class _StockHead:
    """A stock head as it was read: its layers, activation and dropout.

    Attributes:
        linears: names of its nn.Linear in order; "" is the head itself.
        activation: between them, a key of ACTIVATIONS.
        dropout: name of the module applied to the hidden states first, or None.
    """

    linears: tuple[str, ...]
    activation: str = "none"
    dropout: str | None = None


def _read_head(stock: nn.Module) -> _StockHead:
    # Exact types: subclasses are how quantisation, LoRA and parametrisations change what a layer computes.
    if type(stock) is nn.Linear:
        head = _StockHead(("",))
    elif type(stock) is nn.Sequential:
        head = _read_sequential(stock)
    elif "summary" in stock._modules:
        head = _read_value_head(stock)
    else:
        raise _refusal(f"found {_describe(stock)}, wanted a supported head{_hint(stock)}")
    for path, module in stock.named_modules():
        _check_untouched(path, module)
    for name in head.linears:
        _check_linear(name, stock.get_submodule(name))
    last = stock.get_submodule(head.linears[-1])
    if last.out_features != 1:
        raise _refusal(f"found {_describe(last)}{_at(head.linears[-1])} with {last.out_features} outputs, wanted 1")
    if "summary" in head.linears:
        _check_value_head_forward(stock)
    return head


def _read_sequential(stock: nn.Sequential) -> _StockHead:
    """Read Linear, activation, Linear, ...; refuse anything else (dropout, normalisation, wrappers)."""
    if stock._parameters or stock._buffers:
        raise _refusal(
            f"found nn.Sequential holding {', '.join(stock._parameters | stock._buffers)}, wanted layers alone"
        )
    names, modules = list(stock._modules), list(stock._modules.values())
    for position, (name, module) in enumerate(zip(names, modules, strict=True)):
        if position % 2 == 0 and type(module) is not nn.Linear:
            raise _refusal(f"found {_describe(module)}{_at(name)}, wanted nn.Linear there{_hint(module)}")
        if position % 2 == 1 and type(module) not in _ACTIVATIONS:
            raise _refusal(f"found {_describe(module)}{_at(name)}, wanted a supported activation there")
    kinds = list(dict.fromkeys(type(module) for module in modules[1::2]))
    if len(kinds) > 1:
        found = " and ".join(f"nn.{kind.__name__}" for kind in kinds)
        raise _refusal(f"found nn.Sequential with different activations, {found}, wanted the same throughout")
    if len(modules) % 2 == 0:
        last = f"ending in {_describe(modules[-1])}{_at(names[-1])}" if modules else "without layers"
        raise _refusal(f"found nn.Sequential {last}, wanted nn.Linear(F, 1) as the last")
    if len(modules) > 2 * MAX_LAYERS - 1:
        raise _refusal(f"found nn.Sequential of {len(modules[::2])} nn.Linear, wanted at most {MAX_LAYERS}")
    return _StockHead(tuple(names[::2]), _ACTIVATIONS[kinds[0]] if kinds else "none")


def _read_value_head(stock: nn.Module) -> _StockHead:
    """Read TRL's summary(dropout(hidden)); `flatten` exists in its class and is not used by it."""
    allowed = {"summary": (nn.Linear,), "dropout": (nn.Dropout, nn.Identity), "flatten": (nn.Flatten,)}
    strange = [
        f"{name} ({_describe(module)}){_hint(module)}"
        for name, module in stock._modules.items()
        if type(module) not in allowed.get(name, ())
    ]
    strange += [name for name, tensor in (stock._parameters | stock._buffers).items() if tensor is not None]
    if strange:
        raise _refusal(f"found {_describe(stock)} with {', '.join(strange)}, wanted `dropout` and `summary` alone")
    return _StockHead(("summary",), dropout="dropout" if "dropout" in stock._modules else None)


def _check_value_head_forward(stock: nn.Module) -> None:
    """Check what a ValueHead computes by running its code on a copy with other layers.

    The class is known by its attributes alone. A tanh in place of the dropout shows whether it is applied, once, and
    before `summary`.
    """
    width, double = stock.summary.in_features, {"dtype": torch.float64, "device": "cpu"}
    summary = nn.utils.skip_init(nn.Linear, width, 1, **double)
    hidden = torch.sin(torch.arange(6 * width, **double)).reshape(2, 3, width)
    probe = copy.copy(stock)
    probe._modules = {**stock._modules, "summary": summary}
    with torch.no_grad():
        summary.weight.copy_(torch.cos(torch.arange(width, **double)))
        summary.bias.fill_(0.5)
        wanted = summary(hidden)
        if "dropout" in stock._modules:
            probe._modules["dropout"], wanted = nn.Tanh(), summary(torch.tanh(hidden))
        for mode in (True, False):
            probe.training = mode
            try:
                got = probe(hidden)
            except Exception as error:
                raise _refusal(f"found {_describe(stock)}, whose forward fails: {error}") from error
            if not (isinstance(got, torch.Tensor) and got.shape == wanted.shape and torch.allclose(got, wanted)):
                raise _refusal(f"found {_describe(stock)}, whose forward is not summary(dropout(hidden))")


def _check_linear(name: str, linear: nn.Linear) -> None:
    """Refuse a layer that has more than plain floating-point weight and bias: fusing would lose the rest."""
    where = f"{_describe(linear)}{_at(name)}"
    if linear._parameters.keys() != {"weight", "bias"} or linear._buffers or linear._modules:
        found = ", ".join([*linear._parameters, *linear._buffers, *linear._modules])
        raise _refusal(f"found {where} holding {found}, wanted weight and bias alone")
    for key, tensor in linear._parameters.items():
        # DTensor and quantised tensors are subclasses; their arithmetic is not the plain one.
        if tensor is not None and (type(tensor) is not nn.Parameter or not tensor.is_floating_point()):
            raise _refusal(
                f"found {where} whose {key} is {type(tensor).__name__} of {tensor.dtype}, wanted a plain "
                "floating-point nn.Parameter: fuse before sharding or quantising the model"
            )


def _check_untouched(path: str, module: nn.Module) -> None:
    """Refuse hooks and the like on a stock module: the fused head does not call it, so they would be lost."""
    where = f"{_describe(module)}{_at(path)}"
    if "forward" in vars(module):
        raise ValueError(
            f"{where} has a forward set on the instance, as accelerate's device hooks do it, which fusing would "
            "drop; remove it, fuse, and put it on the fused head"
        )
    hooks = [kind.strip("_") for kind in _HOOKS if getattr(module, kind)]
    if hooks:
        raise ValueError(
            f"{where} has {', '.join(hooks)}, which fusing would drop; remove them, fuse, and register them on the "
            "fused head"
        )


def _find_head(model: nn.Module) -> str:
    names = [name for name in HEAD_NAMES if model._modules.get(name) is not None]
    if len(names) == 1:
        return names[0]
    if names:
        found = ", ".join(f"{name} ({_describe(model._modules[name])})" for name in names)
        raise ValueError(
            f"{type(model).__name__} has several heads, {found}; choose: model.{names[0]} = "
            f"FusedRewardHead(model.{names[0]})"
        )
    children = ", ".join(f"{name} ({_describe(child)})" for name, child in model.named_children()) or "no submodules"
    owners = [path.rpartition(".")[0] for path, _ in model.named_modules() if path.rpartition(".")[2] in HEAD_NAMES]
    deeper = f"; model.{owners[0]} has one: call fuse_reward_head on that, before wrapping it" if owners else ""
    raise _refusal(f"{type(model).__name__} has no reward head, found {children}{deeper}")


def _check_impl(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, wanted one of {', '.join(IMPLEMENTATIONS)}")


def _refusal(message: str) -> ValueError:
    return ValueError(f"{message}. {_SUPPORTED}")


def _describe(module: nn.Module) -> str:
    kind = type(module)
    name = f"nn.{kind.__name__}" if getattr(nn, kind.__name__, None) is kind else f"{kind.__module__}.{kind.__name__}"
    return f"{name}({module.in_features}, {module.out_features})" if kind is nn.Linear else name


def _at(path: str) -> str:
    return f" at {path!r}" if path else ""


def _hint(module: nn.Module) -> str:
    wrapped = isinstance(module, nn.Linear) or {"base_layer", "original_module"} & module._modules.keys()
    return " (adapters, quantisation and parametrisations change a layer: fuse before adding them)" if wrapped else ""


def _as_autocast(rows: torch.Tensor) -> torch.Tensor:
    """Round rows as autocast does, to everything but float64; `reward_head` follows the dtype of its rows."""
    device = rows.device.type
    active = _autocast_exists(device) and torch.is_autocast_enabled(device)
    return rows.to(torch.get_autocast_dtype(device)) if active and rows.dtype != torch.float64 else rows


@constant
def _autocast_exists(device_type: str) -> bool:
    """Return whether autocast knows this kind of device.

    torch.compile of torch 2.11 cannot trace torch's own answer.
    """
    return torch.amp.is_autocast_available(device_type)
