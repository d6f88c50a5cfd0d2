"""A training step of the real network on tensors without data, to find what its passes hold in memory.

Network, engine and loss run under torch's FakeTensorMode. Every tensor has a shape, a dtype and a storage with a size,
and nothing is computed or allocated, so that a model of any size passes on a laptop. A `Meter` notes when each storage
comes and goes. What the network does to memory is thus found and not described: a change of a layer, a kernel or a
family changes the forecast by itself. Only a few layers of each kind run (lifetimes.py).

Not seen are buffers inside of kernels: torch's operators and Triton kernels are known by what they take and give.
Tree attention's own CPU implementation is looked into.
"""

import copy
import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from fastrm.config import Config
from fastrm.data.packing import Pack
from fastrm.errors import ConfigError
from fastrm.forecast.full_pack import PackShape, make_pack
from fastrm.forecast.lifetimes import Fullest, Life, Meter, enough, fullest, repeated, storage_of
from fastrm.forecast.parameters import parts_of
from fastrm.forecast.stand_ins import norm_and_gate
from fastrm.model.experts import has_experts
from fastrm.model.layers import stock_gate, stock_norm
from fastrm.model.loading import LM_HEAD, stored_dtype
from fastrm.model.lora import nf4_layers
from fastrm.model.network import RewardNetwork
from fastrm.model.precision import convert_to_fp8
from fastrm.train.engine import LocalEngine
from fastrm.train.optim import storage_dtype
from fastrm_kernels import TreeLayout
from fastrm_kernels.tree_attention.blocks import block_layout
from fastrm_kernels.tree_attention.eager import attend, attend_backward, handle_of

PROGRESS = "memory: steps without data"
# Operations of which torch does not know what they give without data.
_UNKNOWN_TO_FAKE_TENSORS = (
    UnsupportedOperatorException, UnsupportedFakeTensorException, DynamicOutputShapeException,
    DataDependentOutputException,
)  # fmt: skip


class FakeSteps:
    """The steps of one network, each run once for all questions about it.

    Args:
        network: on the meta device, its parts frozen, its projections not fused.
        progress: called with the number of steps that have run and None, the unknown number of all, after each.
        whole: run every layer, and not only as many as tell what the others do.
    """

    def __init__(
        self, network: RewardNetwork, progress: Callable[[int, None], None] = lambda *_: None, whole: bool = False
    ):
        if any(has_experts(layer.mlp) for layer in network.language.layers):
            raise ConfigError(
                f"{network.model.config.model_type}: the memory of experts cannot be planned: torch knows no shapes of "
                "their products in float32; try a short run instead (run.max_steps: 3)"
            )
        self.network = network
        self._progress = progress
        self._whole = whole
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._networks: dict[tuple, RewardNetwork] = {}
        self._found: dict[tuple, tuple[list[Life], int]] = {}

    def fullest(
        self, config: Config, shape: PackShape, attention: str, *, alone: bool, gradients_stay: bool
    ) -> Fullest:
        """Find the most that forward and backward pass of a pack hold, without weights.

        Args:
            config: of the step.
            attention: implementation of `tree_attention`: eager, varlen, flash_attn or triton.
            alone: one process, which may store weights in bfloat16.
            gradients_stay: as of `lifetimes.fullest`.

        Raises:
            ConfigError: sizes of the model do not fit one another, or a pack is too large for the attention.
        """
        return fullest(*self.lives(config, shape, attention, alone), gradients_stay)

    def lives(self, config: Config, shape: PackShape, attention: str, alone: bool) -> tuple[list[Life], int]:
        """Return the lives of all storages of such a step, and the number of layers that they stand for."""
        narrow = self._narrow(config, alone)
        # No update is run: 8-bit states, and the package that they need, have no part in the passes.
        config = config.model_copy(update={"optim": config.optim.model_copy(update={"states": "fp32"})})
        if not narrow:
            precision = config.precision.model_copy(update={"weights": "fp32"})
            config = config.model_copy(update={"precision": precision})
        on_cpu = attention == "eager"
        emulate = on_cpu and config.precision.fp8 != "off"
        kind = narrow, config.model.fuse_projections, config.precision.fp8, emulate, config.model.quantize is not None
        functions = (stock_norm, stock_gate) if on_cpu else norm_and_gate(config, self.network)
        key = *kind, shape, attention, config.precision.dtype, functions, config.model.activation_checkpointing
        if key not in self._found:
            if kind not in self._networks:
                self._networks[kind] = self._fake_network(*kind)
            self._found[key] = self._run(self._networks[kind], config, shape, attention, functions)
            self._progress(len(self._found), None)
        return self._found[key]

    def _narrow(self, config: Config, alone: bool) -> frozenset[tuple[str, torch.dtype]]:
        """Return the names and dtypes of the weights that are not stored in float32."""
        if not alone:
            return frozenset()
        pick, stored = storage_dtype(self.network, config.precision, alone), stored_dtype(config.model.path)
        head = {} if self.network.lm_head is None else {LM_HEAD: self.network.lm_head.weight}
        weights = {f"model.{name}": weight for name, weight in self.network.model.named_parameters()} | head
        dtypes = {name: pick(name.removeprefix("model."), weight, stored) for name, weight in weights.items()}
        return frozenset((name, dtype) for name, dtype in dtypes.items() if dtype != torch.float32)

    def _fake_network(
        self, narrow: frozenset[tuple[str, torch.dtype]], fused: bool, recipe: str, emulate: bool, nf4: bool
    ) -> RewardNetwork:
        network, dtypes = copy.deepcopy(self.network), dict(narrow)
        for name, parameter in network.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])
        if fused:
            network.fuse_projections()
        # Without torchao no such run begins; its layers are then forecast in bfloat16, which holds more.
        if recipe != "off" and importlib.util.find_spec("torchao") is not None:
            convert_to_fp8(network, recipe, emulate=emulate)
        with self._mode:
            network.to_empty(device="cpu")
            # Without bitsandbytes no such run begins; its layers are then forecast in bfloat16, which holds more.
            if nf4 and importlib.util.find_spec("bitsandbytes") is not None:
                _quantize(network)
            return network.train()

    def _run(
        self, network: RewardNetwork, config: Config, shape: PackShape, attention: str, functions: tuple
    ) -> tuple[list[Life], int]:
        dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
        network.set_kernels_on_paper(dtype, attention, *functions)
        network.use_activation_checkpointing(config.model.activation_checkpointing)
        try:
            pack = _pack_with_layouts(network, shape, self._mode)
            with self._mode:
                engine = LocalEngine(network, config)
                kinds = _kinds(engine, pack)
                kept = range(len(kinds)) if self._whole else enough(kinds)
                lives = _run_layers(engine, pack, set(kept))
        except _UNKNOWN_TO_FAKE_TENSORS:  # no fault of the model
            raise
        except (RuntimeError, ValueError) as error:  # as a real step would, but before any weight is loaded
            where = "model.init" if config.model.path is None else f"model.path {config.model.path!r}"
            raise ConfigError(f"{where}: a step of this model fails: {error}") from error
        return lives if self._whole else repeated(lives, kinds, kept), len(kinds)


def _pack_with_layouts(network: RewardNetwork, shape: PackShape, mode: FakeTensorMode) -> Pack:
    """Make a pack with layouts. Some are made of numbers that are read from tensors: these have data."""
    if shape.grids:
        form = network.tower.plain_patches
        form.normalize(torch.zeros(1, len(form.mean) * form.side**2, dtype=torch.uint8))  # its table, for later
    with mode:
        pack = make_pack(shape, network)
    pack.layouts = network.lay_out(pack)
    for layout in pack.layouts.trees:
        handle_of(layout)  # made now, with its number
    return pack


def _bodies(layouts: Sequence[TreeLayout]) -> dict[object, Callable]:
    """Return the functions that replace tree attention's CPU operators: the operations that they consist of."""
    by_handle = {storage_of(handle_of(layout)): layout for layout in layouts}

    def layout_of(query, handle, causal):
        layout = by_handle[storage_of(handle)]
        block_layout(layout, causal, query.dtype, query.shape[1] * query.shape[2])  # made once for a pack, of indices
        return layout

    def forward(query, key, value, handle, scale, causal):
        layout = layout_of(query, handle, causal)
        return functools.partial(attend, query, key, value, layout, scale, causal)

    def backward(query, key, value, output, lse, upstream, handle, scale, causal):
        layout = layout_of(query, handle, causal)
        return functools.partial(attend_backward, query, key, value, output, lse, upstream, layout, scale, causal)

    names = torch.ops.fastrm
    return {names.tree_attention_eager.default: forward, names.tree_attention_eager_backward.default: backward}


def _quantize(network: RewardNetwork) -> None:
    from fastrm.model.nf4 import Nf4Linear

    for name, layer in nf4_layers(network.language).items():
        network.language.set_submodule(name, Nf4Linear(layer))


def _kinds(engine: LocalEngine, pack: Pack) -> list[int]:
    """Return a number for each layer, in the order of the forward pass, equal for layers that do the same."""
    numbers: dict[tuple, int] = {}
    seen = []  # kept, so that no two arguments have one address

    def watch(run, layer, hidden, arguments):
        seen.append((_kind(layer, arguments), arguments))
        return hidden

    with torch.no_grad(), engine.network.watched_layers(watch):
        engine.rewards(pack)
    return [numbers.setdefault(kind, len(numbers)) for kind, _ in seen]


def _kind(layer: nn.Module, arguments: tuple) -> tuple:
    weights = ((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), tuple(weights), tuple(map(id, arguments))


def _run_layers(engine: LocalEngine, pack: Pack, kept: set[int]) -> list[Life]:
    network = engine.network
    meter = Meter(parts_of(network) | dict.fromkeys(network.buffers(), ""), _bodies(pack.layouts.trees))
    numbers = itertools.count()

    def watch(run, layer, hidden, arguments):
        if (number := next(numbers)) not in kept:
            return hidden
        meter.begin(number, backward=False)
        output = run()
        if output.requires_grad:
            output.register_hook(lambda _: meter.begin(number, backward=True))
        return output

    hooks = [p.register_post_accumulate_grad_hook(meter.take) for p in network.parameters() if p.requires_grad]
    with meter, network.watched_layers(watch):
        for tensor in (value for value in vars(pack).values() if isinstance(value, torch.Tensor)):
            meter.count(tensor)
        total, _ = engine.loss_and_rewards(pack)
        meter.begin(None, backward=True)
        total.sum().backward()  # a critic's is of two parts
    lives = meter.lives()
    for hook in hooks:
        hook.remove()
    engine.discard()
    return lives
