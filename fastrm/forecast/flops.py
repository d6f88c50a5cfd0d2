"""The floating-point operations of a training step, of one pass, and of generation, from shapes alone.

Arithmetic on a network that may live on torch's meta device, with its projections as transformers has
them. Norms, softmax, activations and the optimizer are left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from fastrm.forecast.parameters import PARTS, count_parameters, language_of, parts_of
from fastrm.forecast.workload import Workload, causal_pairs
from fastrm.model.experts import has_experts
from fastrm.model.network import RewardNetwork


@dataclass(frozen=True)
class Flops:
    """The floating-point operations of one step: a multiplication and an addition are two."""

    forward: int = 0
    backward: int = 0
    recomputed: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recomputed


def step_flops(
    network: RewardNetwork, load: Workload, *, shared: bool, images_once: bool, pruned: bool, checkpointing: bool
) -> dict[str, Flops]:
    """Return the operations of one optimizer step by part: "vision", "language", "attention".

    A matrix of P parameters costs per row 2 P forward; backward 2 P for the gradient of its input, if
    anything before it is trained, and 2 P for its own, if it is. An attention with queries of width
    Q = H * K costs per query-key pair 4 Q forward and 8 Q backward (the recomputation of the scores
    inside FlashAttention is not counted). Gradient checkpointing repeats the forward pass of each layer
    that has a backward pass, up to its last product, whose result no gradient needs: torch stops
    there. Embedding look-ups cost nothing.

    Args:
        shared: prompts are shared by their responses.
        images_once: the vision tower runs once per prompt, not once per conversation.
        pruned: the last layer computes only keys and values for every token.
    """
    num_images = load.num_images(images_once)
    num_rows = _num_rows(network, load.num_tokens(shared), load.num_tails, [load.image_tokens] * num_images)
    parts = {"vision": Flops(), "language": Flops(), "attention": Flops()}
    for matrix in _matrices(network):
        part = "vision" if matrix.rows in ("patches", "tower rows", "image tokens") else "language"
        parts[part] += _matrix_flops(matrix, num_rows[matrix.rows_pruned if pruned else matrix.rows], checkpointing)
    if network.paradigm != "reward":
        weight, reached = network.lm_weight, _gradient_reaches(network)["language model"]
        lm_head = _Matrix(weight.numel(), "turns", "turns", weight.requires_grad, reached, repeatable=False)
        parts["language"] += _matrix_flops(lm_head, load.num_tails * load.learnt_tokens, checkpointing)
    parts["attention"] = _attention_flops(network, load, num_images, shared, pruned, checkpointing)
    return parts


def pass_flops(
    network: RewardNetwork,
    num_tokens: int,
    num_pairs: int,
    paths: Sequence[int] = (),
    images: Sequence[int] = (),
    *,
    pruned: bool = False,
) -> int:
    """Return the operations of one forward pass over a pack: 2 for each weight and row, 4 Q for each query-key pair.

    Args:
        num_tokens: of the pack.
        num_pairs: query-key pairs of a causal layer over the pack.
        paths: tokens of each response whose reward is read, with its prompt.
        images: tokens of each image, and of each frame of a video, that the tower encodes.
        pruned: the last layer computes only keys and values for every token.
    """
    num_rows = _num_rows(network, num_tokens, len(paths), images)
    flops = sum(
        2 * num_rows[matrix.rows_pruned if pruned else matrix.rows] * matrix.num_parameters
        for matrix in _matrices(network)
    )
    num_layers = len(language_of(network).layers)
    pairs = (num_layers - 1) * num_pairs + (sum(paths) if pruned else num_pairs)
    flops += 4 * _query_width(network) * pairs
    if images:
        flops += 4 * _tower_width(network) * sum(map(network.tower.num_attention_pairs, images))
    return flops


def generation_flops(network: RewardNetwork, num_read: int, num_written: int, images: Sequence[int] = ()) -> int:
    """Return the operations of stock generation of one text with a cache of keys and values.

    One pass over the tokens that are read, then one over each token that was written but the last, which nothing
    reads: together the causal pass over all of these. The LM head is multiplied with one state for each token
    that is written. What a batch adds by padding is not counted.

    Args:
        network: of the language model; its reward head is not counted.
    """
    length = num_read + num_written - 1
    lm_head = 2 * num_written * language_of(network).embed_tokens.weight.numel()
    return pass_flops(network, length, causal_pairs(length), images=images) + lm_head


def _num_rows(network: RewardNetwork, num_tokens: int, num_anchors: int, images: Sequence[int]) -> dict[str, int]:
    """Return the rows that matrices are multiplied with; `images`: the tokens of each."""
    return {
        "patches": sum(images) * _patches_per_token(network),
        "tower rows": sum(map(network.tower.num_rows, images)) if images else 0,
        "image tokens": sum(images),
        "tokens": num_tokens,
        "anchors": num_anchors,
    }


@dataclass(frozen=True)
class _Matrix:
    """A weight matrix and what it is multiplied with: patches, tower rows, image tokens, tokens or anchors.

    Attributes:
        rows, rows_pruned: with a whole, and with a pruned last layer.
        input_gradient: its input needs one.
        repeatable: gradient checkpointing runs it again if its layer has a backward pass.
    """

    num_parameters: int
    rows: str
    rows_pruned: str
    trainable: bool
    input_gradient: bool
    repeatable: bool


_ROWS = {"vision tower": "tower rows", "projector": "image tokens", "language model": "tokens", "head": "anchors"}


def _matrices(network: RewardNetwork) -> Iterator[_Matrix]:
    """Yield all matrices of a forward pass; embeddings are looked up, not multiplied."""
    tower, layers = network.tower, language_of(network).layers
    parts, reached = parts_of(network), _gradient_reaches(network)
    of_pixels = set() if tower is None else set(_products(tower.embedding))
    # A layer's last product stands last in it, and is not computed again; the sum of experts needs that of each.
    repeated = {
        product
        for layer in (*layers, *(tower.blocks if tower else ()))
        for product in list(_products(layer))[: None if has_experts(getattr(layer, "mlp", layer)) else -1]
    }
    last = layers[-1]
    pruned = set(_products(last)) - {*_products(last.self_attn.k_proj), *_products(last.self_attn.v_proj)}
    for module in _products(network):
        if module is network.lm_head:  # multiplied with what is written alone
            continue
        weights = list(module.parameters(recurse=False))
        part = parts[weights[0]]
        rows = "patches" if module in of_pixels else _ROWS[part]
        yield _Matrix(
            num_parameters=int(_used(module) * sum(weight.numel() for weight in weights if weight.ndim > 1)),
            rows=rows,
            rows_pruned="anchors" if module in pruned else rows,
            trainable=weights[0].requires_grad,
            # Pixels need no gradient.
            input_gradient=reached[part] and module not in of_pixels,
            repeatable=module in repeated,
        )


def _products(module: nn.Module) -> Iterator[nn.Module]:
    """Return the linear and convolution layers, and those of experts with their routers, in order."""
    linear = (nn.Linear, nn.Conv2d, nn.Conv3d)
    experts = {part for mlp in module.modules() if has_experts(mlp) for part in (mlp.gate, mlp.experts)}
    return (part for part in module.modules() if isinstance(part, linear) or part in experts)


def _used(module: nn.Module) -> Fraction:
    """Return the share of a module's matrices that a row is multiplied with: of experts, those it goes through."""
    if not isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
        return Fraction(1)
    config = module.config
    return Fraction(config.num_experts_per_tok, config.num_experts)


def _gradient_reaches(network: RewardNetwork) -> dict[str, bool]:
    """Return for each part whether gradients pass through it: something in it or before it is trained."""
    trained = [count.trainable > 0 for count in count_parameters(network).values()]
    return {part: any(trained[: number + 1]) for number, part in enumerate(PARTS)}


def _matrix_flops(matrix: _Matrix, num_rows: int, checkpointing: bool) -> Flops:
    once = 2 * num_rows * matrix.num_parameters
    again = checkpointing and matrix.repeatable and matrix.input_gradient
    return Flops(once, once * (matrix.input_gradient + matrix.trainable), once * again)


def _attention_flops(
    network: RewardNetwork, load: Workload, num_images: int, shared: bool, pruned: bool, checkpointing: bool
) -> Flops:
    layers, reached = language_of(network).layers, _gradient_reaches(network)
    layer = load.attention_pairs(shared)
    pairs = (len(layers) - 1) * layer + (load.anchor_pairs if pruned else layer)
    total = _pair_flops(_query_width(network), pairs, reached["language model"], checkpointing)
    if num_images:
        pairs = num_images * network.tower.num_attention_pairs(load.image_tokens)
        total += _pair_flops(_tower_width(network), pairs, reached["vision tower"], checkpointing)
    return total


def _query_width(network: RewardNetwork) -> int:
    return language_of(network).layers[0].self_attn.q_proj.out_features


def _tower_width(network: RewardNetwork) -> int:
    shape = network.tower.kernels.attention.shape
    return shape.heads * shape.head_dim


def _pair_flops(width: int, pairs: int, differentiable: bool, checkpointing: bool) -> Flops:
    once = 4 * width * pairs
    return Flops(once, 2 * once * differentiable, once * (differentiable and checkpointing))


def _patches_per_token(network: RewardNetwork) -> int:
    return 1 if network.tower is None else network.tower.shape.merge**2
