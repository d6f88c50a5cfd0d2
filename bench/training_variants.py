"""The variants of the training step, as engines: what differs is how rewards come about."""

import dataclasses

import numpy as np
import torch
from torch import nn

from fastrm.config import Config
from fastrm.data.packing import EncodedGroup, Pack, Pixels, build_pack
from fastrm.data.record import ImageRef
from fastrm.model.backbone import BackboneRunner
from fastrm.model.fusion import split_fused
from fastrm.model.layers import decoder_layer
from fastrm.model.network import RewardNetwork
from fastrm.model.vision import VisionPlan
from fastrm.train.engine import LocalEngine
from fastrm.train.step_cost import make_cost_model
from training_shapes import TrainingShape, Variant
from workloads import IMAGE_PAD, PATCHES, image_groups

PAD = 0


class TrainingStep:
    """A variant on one workload: forward, backward, clipping and update, one pack a step.

    Args:
        network: with its weights; it is changed to what the variant wants and must not be used by another.
        config: of the run.
    """

    def __init__(self, variant: Variant, network: RewardNetwork, config: Config, shape: TrainingShape):
        self.variant, self.name, self.shape = variant, variant.name, shape
        if variant.fuse:
            network.fuse_projections()
        if variant.fp8 != "off":
            from fastrm.model.precision import convert_to_fp8

            network.fp8 = convert_to_fp8(network, variant.fp8)
        self.graphs = network.compile_layers() if variant.compile else None
        dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
        network.use_kernels(dtype, kernels=variant.kernels)
        if variant.plain:
            engine, network = _PlainEngine, _use_stock(network, config)
        else:
            engine = LocalEngine
            network.use_activation_checkpointing(config.model.activation_checkpointing)
            _take_out(network, variant, shape)
        self.engine = engine(network, config)
        self.pack, self.flops = make_pack(shape, variant), count_flops(network, config, shape, variant)
        self.pack.prepared = None if variant.plain else network.planner(self.pack)
        self.pack = self.pack.to(network.device)
        self.num_steps = 0

    def step(self, number: int) -> None:
        """One training step."""
        self.engine.accumulate(self.pack)
        update = self.engine.update(self.engine.config.optim.lr, self.num_steps)
        self.num_steps += 1
        assert update.finite, f"{self.name}: loss {update.loss}, gradient norm {update.grad_norm}"

    def gradients(self, number: int) -> tuple[float, dict[str, torch.Tensor]]:
        """Mean loss and its gradients by stock name; changes no weight."""
        loss = self.engine.loss(self.engine.rewards(self.pack), self.pack)
        loss.backward()
        network = self.engine.network
        found = {
            stock: piece.clone()
            for name, p in network.named_parameters()
            if p.grad is not None
            for stock, piece in split_fused(network, name, p.grad)
        }
        self.engine.discard()
        return float(loss.detach()), found

    def num_tokens(self, number: int) -> int:
        """Rows that the language model processes, padding included."""
        if self.variant.plain:
            return self.pack.padded_ids.numel()
        return self.pack.input_ids.shape[0]


@dataclasses.dataclass
class PlainBatch(Pack):
    """A pack's groups as a pairwise trainer collates them: two rows a preference, right-padded.

    Attributes:
        padded_ids: (2 E, N), all winners before all losers.
        last: (2 E,) index of each row's last token.
    """

    padded_ids: torch.Tensor | None = None
    last: torch.Tensor | None = None


class _PlainEngine(LocalEngine):
    """The stock model and its own attention, each conversation a padded row with its own image."""

    def rewards(self, pack: PlainBatch) -> torch.Tensor:
        network, half = self.network, self.config.precision.dtype == "bf16"
        with torch.autocast(network.device.type, dtype=torch.bfloat16, enabled=half):
            hidden = network.model(
                input_ids=pack.padded_ids,
                attention_mask=(torch.arange(pack.padded_ids.shape[1], device=network.device) <= pack.last[:, None]),
                mm_token_type_ids=(pack.padded_ids == IMAGE_PAD).int(),
                pixel_values=pack.pixel_values,
                image_grid_thw=torch.tensor(pack.image_grids, device=network.device),
                use_cache=False,
            ).last_hidden_state
            states = hidden[torch.arange(len(pack.last), device=network.device), pack.last]
            return network.score(states).squeeze(-1).float()


def _use_stock(network: RewardNetwork, config: Config) -> RewardNetwork:
    network.model.set_attn_implementation("sdpa")
    if config.model.activation_checkpointing != "none":
        # As peers switch it on; transformers renamed the method between the versions that we support.
        model = network.model
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        model.disable_input_require_grads()
    return network


def _take_out(network: RewardNetwork, variant: Variant, shape: TrainingShape) -> None:
    """Swap the runner for one that lacks what the variant lacks; fastrm itself has no such options."""
    runner = network._runner
    if not variant.prune:
        runner._last_layer = _WholeLastLayer(runner)
    if not variant.image_once and variant.share:
        runner.image_features = _SeenAgain(runner, copies=2 * shape.num_pairs // shape.num_groups)


class _WholeLastLayer:
    """The last layer like the others, for every token, then the anchors of it."""

    def __init__(self, runner: BackboneRunner):
        self._runner = runner

    def __call__(self, layer, hidden, cos, sin, anchors, layouts) -> torch.Tensor:
        runner = self._runner
        plan = runner._kernels.attention.plan(layouts.tree, torch.bfloat16 if hidden.is_cuda else hidden.dtype)
        return runner._run(decoder_layer, layer, hidden, cos, sin, plan, runner._kernels).index_select(0, anchors)


class _SeenAgain:
    """The vision tower on every image once for each row of a pairwise trainer, though one result serves all."""

    def __init__(self, runner: BackboneRunner, copies: int):
        self._encode, self.copies = runner.image_features, copies

    def __call__(self, pixel_values: torch.Tensor, plan: VisionPlan) -> torch.Tensor:
        features = self._encode(pixel_values, plan)
        for _ in range(self.copies - 1):
            # In the sum with weight 0, so that its backward pass runs as well.
            features = features + 0 * self._encode(pixel_values, plan)
        return features


def count_flops(network: RewardNetwork, config: Config, shape: TrainingShape, variant: Variant) -> float:
    """FLOPs of the step's matrix products and attention, those of recomputation and padding left out.

    By the formulas that balance ranks (fastrm/train/step_cost.py), which count the last layer as pruned; the
    rest of a whole last layer is left out here too, so that the share of the matmul rate is of useful work.
    """
    settings = config.model.model_copy(update={"activation_checkpointing": "none"})
    costs = make_cost_model(network.model.config, settings)
    groups, pixels = image_groups(
        shape.num_groups, shape.num_responses, shape.prefix_tokens, shape.response_tokens, shape.grid
    )
    if variant.plain or not (variant.share or variant.image_once):
        groups, pixels = _rows(groups, pixels)
    trees = [group.tree(variant.share and not variant.plain) for group in groups]
    images = len(pixels) * costs.of_image(*shape.grid)
    if variant.share and not variant.image_once:
        images *= 2 * shape.num_pairs // shape.num_groups
    return images + sum(
        costs.per_token * sum(tree.lengths) + costs.per_attention_pair * tree.num_attention_pairs for tree in trees
    )


def make_pack(shape: TrainingShape, variant: Variant) -> Pack:
    """The workload as the variant packs it, on the CPU."""
    groups, pixels = image_groups(
        shape.num_groups, shape.num_responses, shape.prefix_tokens, shape.response_tokens, shape.grid
    )
    if variant.plain or not (variant.share or variant.image_once):
        groups, pixels = _rows(groups, pixels)
    if not variant.plain:
        return build_pack(groups, pixels, PATCHES, share=variant.share, multiple=16 if variant.fp8 != "off" else 1)
    return _plain_batch(build_pack(groups, pixels, PATCHES, share=False), groups)


def _rows(groups: list[EncodedGroup], pixels: Pixels) -> tuple[list[EncodedGroup], Pixels]:
    """What pairwise trainers see: a group for each preference, with two responses and an image for each."""
    rows, copies = [], {}
    for group in groups:
        for preference in group.preferences:
            pair = []
            for number in (preference.winner, preference.loser):
                response = group.responses[number]
                spans = []
                for span in response.images:
                    ref = ImageRef(data=len(copies).to_bytes(4, "big"))
                    copies[ref.key] = pixels[span.ref.key]
                    spans.append(dataclasses.replace(span, ref=ref))
                pair.append(dataclasses.replace(response, images=tuple(spans)))
            edge = dataclasses.replace(preference, winner=0, loser=1)
            rows.append(dataclasses.replace(group, responses=tuple(pair), preferences=(edge,)))
    return rows, copies


def _plain_batch(pack: Pack, groups: list[EncodedGroup]) -> PlainBatch:
    responses = [group.responses[number] for number in (0, 1) for group in groups]
    lengths = np.array([len(response.tokens) for response in responses])
    tokens = [torch.from_numpy(response.tokens) for response in responses]
    # Images in the order of the rows: winners first.
    order = [number for half in (0, 1) for number in range(half, len(responses), 2)]
    counts = [rows * columns * frames for frames, rows, columns in pack.image_grids]
    patches = pack.patches.split(counts)
    fields = {field.name: getattr(pack, field.name) for field in dataclasses.fields(pack)}
    fields["patches"] = torch.cat([patches[number] for number in order])
    fields["image_grids"] = [pack.image_grids[number] for number in order]
    num_pairs = len(groups)
    fields["edges"] = torch.stack([torch.arange(num_pairs), torch.arange(num_pairs) + num_pairs], 1)
    return PlainBatch(
        **fields,
        padded_ids=nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD),
        last=torch.from_numpy(lengths - 1),
    )
