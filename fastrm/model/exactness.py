"""A comparison of a loaded model's rewards with the stock transformers class, on the user's own groups.

Our layers evaluate a stock model by code of their own (backbone.py). Tests compare both on the models that we had; this
check compares them on the user's model, config, versions and device, before any reward is used. The stock class is made
from the config, takes the weights that are in memory (no second copy of them; fused matrices as views of their parts),
and reads one conversation at a time, with stock attention and, for images, the stock processor. The head is the
network's own module.

The allowed difference has this reason. Sums are taken in another order, and a few intermediate values are rounded in
one and not in the other; nothing else differs. So the bound is measured, not guessed: the stock model runs DRAWS times
more with the factors of every matrix product, and the state that the head reads, off by one unit of rounding (2^-24 in
float32, 2^-8 in bfloat16), up or down by chance. The root mean square of what that changes in the rewards, s, is the
effect of one rounding at every product. Two implementations that both round there differ by sqrt(2) s; up to four
further operations between two products round too (norm, rotary embedding, softmax, activation), which makes sqrt(2 * 5)
s = 3.2 s; s comes from few rewards and may be off by a factor of two; and the largest of a few normal deviates lies
within three of them: 3.2 * 2 * 3 < ROUNDINGS = 20. Measured on the tests' models, the difference is at most 3.2 s. In
float32 a setting that is not read moves rewards by ten thousand times s.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from fastrm.data.media.format import MediaSpan, Patches
from fastrm.data.media.images import decode_image
from fastrm.data.packing import build_pack
from fastrm.data.record import ImageRef, VideoRef
from fastrm.data.template import EncodedResponse
from fastrm.errors import ExactnessError
from fastrm.model.config_keys import unknown_keys
from fastrm.model.families import FAMILIES, has_axes
from fastrm.model.loading import WeightsOnMeta
from fastrm.model.lora import add_lora, lora_modules, plain_state, quantised_modules
from fastrm.model.network import RewardNetwork
from fastrm.model.samples import Sample

ROUNDINGS = 20
LAYERS = 2  # layers of a network that is checked instead of the whole
# The most operations of a check on a CPU, some ten seconds of one core.
CPU_OPERATIONS = 10**12
DRAWS = 3  # draws of directions of rounding
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_GO_ON = (
    "check_exactness: false (training), --no-check-exactness (score, eval) or check_exactness=False (Python) go on "
    "without this check"
)
_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Agreement:
    """The result of a comparison; `difference` and `bound` are in units of the reward.

    Attributes:
        dtype: of the matrix products: fp32, bf16 or fp16.
        whole: all layers; else the first two.
        against: the stock class and its version.
    """

    num_rewards: int
    difference: float
    bound: float
    dtype: str
    whole: bool
    against: str


def describe(found: Sequence[Agreement]) -> str:
    """Describe results in one line, such as `exact: 4 rewards agree with transformers to 3e-7`."""
    by_kind = [[part for part in found if part.whole == whole] for whole in (True, False)]
    count = sum(part.num_rewards for part in by_kind[0] or by_kind[1])
    whole, cut = (None if not parts else _how_far(parts) for parts in by_kind)
    if whole is None:
        return f"exact: {count} rewards of the first {LAYERS} layers agree with transformers {cut}"
    line = f"exact: {count} rewards agree with transformers {whole}"
    return line if cut is None else f"{line}, those of the first {LAYERS} layers {cut}"


def _how_far(parts: Sequence[Agreement]) -> str:
    difference = max(part.difference for part in parts)
    to = f"to {difference:.0e}".replace("e-0", "e-") if difference else "to the bit"
    return to if parts[0].dtype == "fp32" and parts[0].whole else f"{to} in {parts[0].dtype}"


def check_network(
    network: RewardNetwork,
    sample: Sample,
    *,
    autocast: torch.dtype | None = None,
    share: bool = True,
    multiple: int = 1,
    whole: bool = True,
) -> list[Agreement]:
    """Compare the rewards of a group with those of the stock class; nothing if stock gives no finite ones.

    All layers are compared in the precision of the run. Where that is not float32, in which alone a small fault shows,
    the first two layers are compared in float32 besides; and nothing but they where the whole model would take the
    device's memory or minutes of a CPU. Random states, gradients and the network are left as they were. Layers are not
    compiled here, and products in FP8 are computed in bf16: FP8 rounds more coarsely than most faults show.

    Args:
        network: on its device, kernels chosen.
        autocast: dtype of the matrix products where training computes them under autocast; None: as the weights.
        share, multiple: as packs of the run are made.
        whole: False: the network is one that `first_layers` has made.

    Raises:
        ExactnessError: if a reward lies further from stock's than rounding explains.
    """
    device, found = network.device, []
    options = {"share": share, "multiple": multiple}
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # for Triton's launches
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with on_device, forked, torch.no_grad(), _evaluating(network):
        if whole and (device.type != "cpu" or _num_operations(network, sample) <= CPU_OPERATIONS):
            with _autocast(device, autocast), suppress(torch.OutOfMemoryError):
                found += _compare(network, sample, whole=True, **options)
        if not found or found[0].dtype != "fp32":
            found += _compare(first_layers(network) if whole else network, sample, whole=False, **options)
    return found


@contextmanager
def _evaluating(network: RewardNetwork) -> Iterator[None]:
    """Leave out the dropout of adapters until the block ends."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _autocast(device: torch.device, dtype: torch.dtype | None):
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _num_operations(network: RewardNetwork, sample: Sample) -> int:
    """Estimate the operations of a check's passes: two for a weight and a token. Embeddings are looked up."""
    embedding = network.model.get_input_embeddings().weight.numel()
    num_weights = sum(parameter.numel() for parameter in network.parameters()) - embedding
    num_tokens = sum(len(sample.group.responses[number].tokens) for number in sample.chosen)
    return 2 * num_weights * num_tokens * (2 + DRAWS)


def _compare(network: RewardNetwork, sample: Sample, *, whole: bool, share: bool, multiple: int) -> list[Agreement]:
    """Compare both sides, with the autocast that is on."""
    ours = _packed_rewards(network, sample, share, multiple)
    stock = StockModel(network)
    try:
        wanted = stock.rewards(sample)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        where = sample.group.origin or sample.group.id
        raise ExactnessError(
            f"not comparable: {where}: {stock.name} fails on what was scored here: {str(error).strip()}; the config "
            f"and the files beside it may be of different models. {_GO_ON}"
        ) from error
    moved = [stock.moved_rewards(sample, seed) for seed in range(DRAWS)]
    if not all(map(math.isfinite, wanted)):
        return []
    squares = [(a - b) ** 2 for draw in moved for a, b in zip(draw, wanted, strict=True)]
    # If a reward is the last bias alone, nothing before it matters. A log probability is a difference of two logarithms
    # and logits, each rounded, on both sides.
    least = _EPS * max(*map(abs, wanted), 4 * stock.largest_logarithm)
    bound = ROUNDINGS * math.sqrt(sum(squares) / len(squares)) + least
    worst = max(range(len(wanted)), key=lambda place: _distance(ours[place], wanted[place]))
    difference = _distance(ours[worst], wanted[worst])
    if not difference <= bound:
        raise ExactnessError(_complaint(network, stock.name, sample, worst, ours[worst], wanted[worst], bound))
    weights = (module.weight for module in network.model.modules() if isinstance(module, nn.Linear))
    weight = next(weight for weight in weights if weight.is_floating_point())
    dtype = _NAMES[product_dtype(weight, weight)]
    return [Agreement(len(wanted), difference, bound, dtype, whole, stock.name)]


@torch.no_grad()
def first_layers(network: RewardNetwork, tensors: Iterable[tuple[str, torch.Tensor]] | None = None) -> RewardNetwork:
    """Make a network of the first two decoder layers and vision blocks, in float32, with eager kernels.

    Weights that are float32 are shared. The others are copied, except the embedding, whose rows are widened as they
    are looked up.

    Args:
        tensors: (stock name, whole tensor) of all weights, each valid until the next, where the network has only parts
            of them; all are taken, and those of the first layers copied.
    """
    with WeightsOnMeta():
        model = transformers.AutoModel.from_config(
            _config_of_first_layers(network.model.config), dtype=torch.float32, attn_implementation="eager"
        )
        cut = RewardNetwork(model, network.head_settings, network.encoder, network.pooling, network.paradigm)
    there = dict(cut.named_modules())
    if targets := [name for name in lora_modules(network) if name in there]:
        add_lora(cut, network.lora, targets)
    embedding = model.get_input_embeddings().weight
    wanted = {name: parameter is embedding for name, parameter in cut.named_parameters()}
    wanted |= dict.fromkeys(cut.state_dict().keys() - wanted.keys(), False)
    state = {}
    for name, tensor in plain_state(network) if tensors is None else tensors:
        if name in wanted:
            tensor = tensor if tensors is None else tensor.detach().clone()
            state[name] = tensor if wanted[name] else tensor.float()
    cut.load_state_dict(state, assign=True)
    _widen(model)
    cut.to(network.device).eval().set_kernels(torch.float32, kernels="eager", attention="sdpa")
    return cut


def _config_of_first_layers(config):
    config = copy.deepcopy(config)
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    text.num_hidden_layers = min(LAYERS, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:LAYERS]
    if vision is not None:
        FAMILIES[config.model_type].keep_first_blocks(vision, LAYERS)
    return config


def _widen(model: nn.Module) -> None:
    """Make a model's embedding return float32, whatever its dtype."""
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())


def _distance(ours: float, wanted: float) -> float:
    return abs(ours - wanted) if math.isfinite(ours) else math.inf


def _packed_rewards(network: RewardNetwork, sample: Sample, share: bool, multiple: int) -> list[float]:
    """Return the rewards of the chosen responses, from one pack of the whole group."""
    vision = network.encoder.vision
    patch_format = None if vision is None else vision.patch_format
    options = {"share": share, "multiple": multiple, "turns": network.encoder.turns}
    pack = build_pack([sample.group], sample.pixels, patch_format, **options)
    pack.layouts = network.lay_out(pack)
    with network.plain_layers():
        rewards = network(pack.to(network.device)).float().tolist()
    return [rewards[number] for number in sample.chosen]


class StockModel:
    """The stock base model of a network's config, on the network's own weights, and the network's head.

    Attributes:
        name: of the class, with the version of transformers.
        largest_logarithm: the largest logit, or logarithm of a sum of their exponentials, of a judge's texts so far.
    """

    largest_logarithm = 0.0

    def __init__(self, network: RewardNetwork):
        self._network = network
        config = copy.deepcopy(network.model.config)  # the model writes its attention into its config
        with WeightsOnMeta():
            model = transformers.AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        # The tensors are shared: `assign` copies nothing, and a fused matrix is split into views. PEFT's layers are
        # what peft itself would put into this model.
        own = quantised_modules(network.model) | lora_modules(network.model)
        for name, module in own.items():  # a quantised layer comes before the adapter around it
            model.set_submodule(name, module)
        inside = tuple(f"{name}." for name in own)
        state = {name: value for name, value in network.model.state_dict().items() if not name.startswith(inside)}
        model.load_state_dict(state, strict=not own, assign=True)
        self._model = model.to(network.device).eval()
        if network.model.get_input_embeddings()._forward_hooks:
            _widen(self._model)
        self.name = f"transformers {transformers.__version__} ({type(model).__name__})"

    def rewards(self, sample: Sample) -> list[float]:
        """Return rewards of the chosen responses, each conversation alone."""
        found = []
        for number in sample.chosen:
            inputs = self._inputs(sample.group.responses[number], sample.pixels)
            hidden = self._model(**inputs, use_cache=False).last_hidden_state[0]  # (n, D)
            if self._network.paradigm == "judge":
                found.append(self._mean_log_probability(hidden, sample.group.responses[number]))
                continue
            state = hidden.float().mean(0) if self._network.pooling == "mean" else hidden[-1]
            with torch.autocast(state.device.type, enabled=False):
                head = next(self._network.score.parameters())
                found.append(float(self._network.score(state.to(head.dtype))))
        return found

    def _mean_log_probability(self, hidden: torch.Tensor, response: EncodedResponse) -> float:
        start, stop = response.turn
        rows = hidden[start - 1 : stop - 1]
        logits = nn.functional.linear(rows, self._network.lm_weight.to(rows.dtype)).float()
        self.largest_logarithm = max(
            self.largest_logarithm, float(logits.abs().max()), float(logits.logsumexp(1).abs().max())
        )
        targets = torch.from_numpy(response.tokens[start:stop]).to(rows.device)
        return -float(nn.functional.cross_entropy(logits, targets))

    def moved_rewards(self, sample: Sample, seed: int) -> list[float]:
        """Return these rewards with every product's factors off by a unit of rounding, up or down by chance."""
        generator = torch.Generator().manual_seed(seed)

        def move(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            signs = 2 * torch.randint(0, 2, states.shape, generator=generator, dtype=torch.int8) - 1
            return states + states * (torch.finfo(dtype).eps / 2 * signs.to(states.device, states.dtype))

        def before(module: nn.Module, inputs: tuple) -> tuple:
            return (move(inputs[0], product_dtype(inputs[0], module.weight)), *inputs[1:])

        def after(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
            return move(output, output.dtype)

        language = getattr(self._model, "language_model", self._model)
        modules = [*self._model.modules(), *self._network.score.modules()]
        products = [module for module in modules if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)]
        # The head computes in float32, but the state that stock hands to it was rounded like all states.
        handles = [module.register_forward_pre_hook(before) for module in products]
        handles.append(language.norm.register_forward_hook(after))
        try:
            return self.rewards(sample)
        finally:
            for handle in handles:
                handle.remove()

    def _inputs(self, response: EncodedResponse, pixels: dict[str, Patches]) -> dict[str, torch.Tensor]:
        """Return the stock model's keyword arguments for one conversation, on its device."""
        vision = self._network.encoder.vision
        ids = torch.from_numpy(response.tokens)[None]
        inputs = {"input_ids": ids}
        if vision is not None:
            inputs |= self._images([span.ref for span in response.media if isinstance(span.ref, ImageRef)])
            inputs |= self._videos([span for span in response.media if isinstance(span.ref, VideoRef)], pixels)
            if has_axes(self._network.model.config):  # stock needs the kinds of tokens: images (1) and videos (2)
                kinds = [(ids == vision.placeholders.get(kind, -1)).int() for kind in (ImageRef, VideoRef)]
                inputs["mm_token_type_ids"] = kinds[0] + 2 * kinds[1]
        return {name: value.to(self._network.device) for name, value in inputs.items()}

    def _images(self, refs: list[ImageRef]) -> dict[str, torch.Tensor]:
        """Return the stock image processor's tensors for images."""
        encoder = self._network.encoder
        if not refs:
            return {}
        images = [decode_image(ref, encoder.limits) for ref in refs]
        found = encoder.vision.processor(images=images, return_tensors="pt", **encoder.vision.stock_options)
        return {name: found[name] for name in ("pixel_values", "image_grid_thw") if name in found}

    def _videos(self, spans: list[MediaSpan], pixels: dict[str, Patches]) -> dict[str, torch.Tensor]:
        """Return our patches of videos, whose stock processor needs torchvision."""
        vision = self._network.encoder.vision
        spans = [span for span in spans if span.first_token == 0]  # a video may stand in several runs
        if not spans:
            return {}
        patches = [pixels[span.ref.key] for span in spans]
        values = [vision.patch_format.normalize(torch.from_numpy(part.values)) for part in patches]
        grids = torch.tensor([part.grid for part in patches])
        times = vision.stock_times(spans)
        return {"pixel_values_videos": torch.cat(values), "video_grid_thw": grids, **times}


def product_dtype(states: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Return the dtype in which the product of the two is computed; a quantised weight takes that of the states."""
    device = states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype if weight.is_floating_point() else states.dtype


def _complaint(
    network: RewardNetwork, name: str, sample: Sample, worst: int, ours: float, wanted: float, bound: float
) -> str:
    group, number = sample.group, sample.chosen[worst]
    causes = list(_likely_causes(network))
    return (
        f"not exact: {group.origin or group.id}: response {number} has reward {ours:.7g} here and {wanted:.7g} in "
        f"{name} with the same weights; rounding explains a difference of {bound:.1e}, this is "
        f"{_distance(ours, wanted):.1e}. Likeliest causes: {'; '.join(causes)}. Please report it with "
        f"config.json. {_GO_ON}"
    )


def _likely_causes(network: RewardNetwork) -> Iterator[str]:
    if names := unknown_keys(network.model.config):
        yield f"keys of config.json that fastrm does not know and stock may read: {', '.join(names)}"
    if network.attention.name != "sdpa":
        yield f"the attention backend {network.attention.name}: try attention: sdpa"
    if network.head_kernels.name != "eager" or not network.norm_and_gate.startswith("stock"):
        yield "a kernel: try kernels: eager"
    yield f"a change in transformers {transformers.__version__} that fastrm was not tested with"
