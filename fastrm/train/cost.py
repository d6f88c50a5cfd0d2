"""What a training step costs, from shapes alone: parameters, memory and floating-point operations.

Everything here is arithmetic on a network that may live on torch's meta device. Parameter counts are
exact. Memory and operations follow the formulas in the docstrings and are estimates: they leave out
norms, softmax, optimizer arithmetic, communication, fragmentation and the CUDA context.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fastrm.model.network import RewardNetwork

# In the order in which a forward pass runs them.
PARTS = ("vision tower", "projector", "embeddings", "language model", "head")


@dataclass(frozen=True)
class Parameters:
    """Numbers of one part, or of a whole network: all, and those with a gradient."""

    total: int
    trainable: int

    @property
    def frozen(self) -> int:
        return self.total - self.trainable


def count_parameters(network: RewardNetwork) -> dict[str, Parameters]:
    """Exact parameter counts by part (PARTS; those of the vision tower are 0 for a text model)."""
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in network.named_parameters():
        count = counts[_part(name)]
        count[0] += parameter.numel()
        count[1] += parameter.numel() * parameter.requires_grad
    return {part: Parameters(*count) for part, count in counts.items()}


def sum_parameters(parts: dict[str, Parameters]) -> Parameters:
    """All parts together."""
    return Parameters(sum(p.total for p in parts.values()), sum(p.trainable for p in parts.values()))


def _part(name: str) -> str:
    if name.startswith("score."):
        return "head"
    if name.startswith("model.visual."):
        return "projector" if name.startswith("model.visual.merger.") else "vision tower"
    return "embeddings" if ".embed_tokens." in name else "language model"


def zero_state_bytes(parameters: Parameters, stage: int, num_gpus: int) -> int:
    """Bytes per GPU of weights, gradients and AdamW state under DeepSpeed ZeRO in bf16.

    Rajbhandari et al. 2020 (arXiv 1910.02054), section 3.1 and figure 1: for each trainable parameter
    2 bytes of weight, 2 of gradient and K = 12 of optimizer state (float32 weight and two moments).
    Stage 1 divides the optimizer state by the number of GPUs, stage 2 the gradients too, stage 3 the
    weights too. A frozen parameter has its 2-byte weight only.
    """
    shares = [1 if stage < divided_from else num_gpus for divided_from in (3, 2, 1)]
    weights, gradients, optimizer = 2 * parameters.total, 2 * parameters.trainable, 12 * parameters.trainable
    # Rounded up: the last shard is padded.
    return sum(-(-size // share) for size, share in zip((weights, gradients, optimizer), shares, strict=True))


def local_state_bytes(parameters: Parameters) -> int:
    """Bytes of weights, gradients and AdamW state of the local engine: all in float32.

    4 + 4 + 8 = 16 for each trainable parameter, 4 for each frozen one.
    """
    return 16 * parameters.trainable + 4 * parameters.frozen


def autocast_weight_bytes(network: RewardNetwork) -> int:
    """Bytes of the bf16 copies of trained matrices that autocast holds until a forward pass ends.

    The head has none: it computes in float32.
    """
    matrices = (matrix for matrix in _matrices(network) if matrix.trainable and matrix.rows != "anchors")
    return sum(2 * matrix.num_parameters for matrix in matrices)


def layer_activation_bytes(hidden: int, attention: int, key_value: int, intermediate: int, bf16: bool) -> int:
    """Bytes per token that autograd keeps of one decoder layer of the Llama/Qwen kind.

    The residual stream and the norms are float32 (4 bytes), matrix products in bf16 (c = 2) or
    float32 (c = 4); D hidden, Q = H * K of all query heads, KV of all key heads, I intermediate:

        two norms, each its input and the normalised input      2 * (4 + 4) * D
        inputs of q, k, v and of gate, up                        c * n * D
        queries, keys, values and output of the attention        c * (2 * Q + 2 * KV)
        gate, its activation, up, and their product              c * 4 * I

    Under bf16 autocast every product casts its input anew (n = 5); in float32 they share it (n = 2).
    Attention keeps no score matrix (FlashAttention), and its row statistics are left out.
    """
    compute = 2 if bf16 else 4
    inputs = 5 if bf16 else 2
    return 16 * hidden + compute * (inputs * hidden + 2 * attention + 2 * key_value + 4 * intermediate)


def last_layer_activation_bytes(hidden: int, key_value: int, bf16: bool) -> int:
    """The same for the pruned last layer, where only keys and values see every token.

    Its norm's input and normalised input, the inputs of k and v, the keys and the values.
    """
    compute = 2 if bf16 else 4
    return 8 * hidden + compute * ((2 if bf16 else 1) * hidden + 2 * key_value)


def activation_bytes(network: RewardNetwork, num_tokens: int, num_patches: int, bf16: bool) -> dict[str, int]:
    """Bytes of activations for the backward pass of one pack, without and with gradient checkpointing.

    With it, every layer keeps its float32 input, and one layer at a time is whole. The vision tower's
    blocks count by the decoder layer's formula, and only if they are trained.

    Args:
        num_tokens: T of the pack.
        num_patches: image patches of the pack, before merging.
    """
    layers = _language(network).layers
    attention, mlp = layers[0].self_attn, layers[0].mlp
    hidden, key_value = attention.q_proj.in_features, attention.k_proj.out_features
    layer = num_tokens * layer_activation_bytes(
        hidden, attention.q_proj.out_features, key_value, mlp.gate_proj.out_features, bf16
    )
    last = num_tokens * last_layer_activation_bytes(hidden, key_value, bf16)
    depth, block, block_input = _vision_activations(network, num_patches, bf16)
    return {
        "whole": (len(layers) - 1) * layer + last + depth * block,
        "checkpointed": len(layers) * num_tokens * 4 * hidden + depth * block_input + max(layer, block),
    }


def _vision_activations(network: RewardNetwork, num_patches: int, bf16: bool) -> tuple[int, int, int]:
    """(blocks, bytes of one, bytes of one's input) of a trained vision tower; zeros for a frozen one."""
    if count_parameters(network)["vision tower"].trainable == 0:
        return 0, 0, 0
    blocks = network.model.visual.blocks
    width = blocks[0].attn.qkv.in_features
    intermediate = max(module.out_features for module in blocks[0].mlp.modules() if isinstance(module, nn.Linear))
    block = layer_activation_bytes(width, width, width, intermediate, bf16)
    return len(blocks), num_patches * block, num_patches * 4 * width


def _language(network: RewardNetwork) -> nn.Module:
    return network.model.language_model if network.is_vision else network.model


@dataclass(frozen=True)
class Workload:
    """What one optimizer step is taken to contain. Every prompt has one image and two responses.

    Attributes:
        num_pairs: preferences of the step.
        image_tokens, prompt_text_tokens, response_tokens: of each prompt and each response.
    """

    num_pairs: int
    image_tokens: int
    prompt_text_tokens: int
    response_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return self.image_tokens + self.prompt_text_tokens

    def num_tokens(self, shared: bool) -> int:
        """Tokens of the step: with shared prompts, or each conversation whole."""
        return self.num_pairs * ((1 if shared else 2) * self.prompt_tokens + 2 * self.response_tokens)

    def attention_pairs(self, shared: bool) -> int:
        """Query-key pairs of causal attention in one layer: n (n + 1) / 2 for a sequence of n tokens.

        A shared prompt attends to itself once; each response attends to the prompt and to itself.
        """
        prompt, response = self.prompt_tokens, self.response_tokens
        if not shared:
            return self.num_pairs * 2 * _causal(prompt + response)
        return self.num_pairs * (_causal(prompt) + 2 * (prompt * response + _causal(response)))

    @property
    def anchor_pairs(self) -> int:
        """Query-key pairs of a layer with queries at the anchors only."""
        return self.num_pairs * 2 * (self.prompt_tokens + self.response_tokens)


def _causal(length: int) -> int:
    return length * (length + 1) // 2


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one step: a multiplication and an addition are two."""

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
    """Operations of one optimizer step by part: "vision", "language", "attention".

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
    num_images = load.num_pairs * (1 if images_once else 2) * (load.image_tokens > 0)
    num_rows = {
        "patches": num_images * load.image_tokens * patches_per_token(network),
        "image tokens": num_images * load.image_tokens,
        "tokens": load.num_tokens(shared),
        "anchors": 2 * load.num_pairs,
    }
    parts = {"vision": Flops(), "language": Flops(), "attention": Flops()}
    for matrix in _matrices(network):
        part = "vision" if matrix.rows in ("patches", "image tokens") else "language"
        parts[part] += _matrix_flops(matrix, num_rows[matrix.rows_pruned if pruned else matrix.rows], checkpointing)
    parts["attention"] = _attention_flops(network, load, num_images, shared, pruned, checkpointing)
    return parts


@dataclass(frozen=True)
class _Matrix:
    """A weight matrix and what it is multiplied with: patches, image tokens, tokens or anchors.

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


_ROWS = {"vision tower": "patches", "projector": "image tokens", "language model": "tokens", "head": "anchors"}
# What a decoder layer or vision block computes last, by the names of the stock classes.
_LAST_PRODUCTS = ("mlp.down_proj", "mlp.fc2")


def _matrices(network: RewardNetwork) -> Iterator[_Matrix]:
    """All matrices of a forward pass; embeddings are looked up, not multiplied."""
    num_layers = len(_language(network).layers)
    reached = _gradient_reaches(network)
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv3d):
            continue
        part = _part(f"{name}.")
        is_pruned = f".layers.{num_layers - 1}." in name and not name.endswith(("k_proj", "v_proj"))
        yield _Matrix(
            num_parameters=module.weight.numel(),
            rows=_ROWS[part],
            rows_pruned="anchors" if is_pruned else _ROWS[part],
            trainable=module.weight.requires_grad,
            # Pixels need no gradient.
            input_gradient=reached[part] and "patch_embed" not in name,
            repeatable=(".layers." in name or ".blocks." in name) and not name.endswith(_LAST_PRODUCTS),
        )


def _gradient_reaches(network: RewardNetwork) -> dict[str, bool]:
    """For each part: is anything in it or before it trained, so that gradients pass through it?"""
    trained = [count.trainable > 0 for count in count_parameters(network).values()]
    return {part: any(trained[: number + 1]) for number, part in enumerate(PARTS)}


def _matrix_flops(matrix: _Matrix, num_rows: int, checkpointing: bool) -> Flops:
    once = 2 * num_rows * matrix.num_parameters
    again = checkpointing and matrix.repeatable and matrix.input_gradient
    return Flops(once, once * (matrix.input_gradient + matrix.trainable), once * again)


def _attention_flops(
    network: RewardNetwork, load: Workload, num_images: int, shared: bool, pruned: bool, checkpointing: bool
) -> Flops:
    layers, reached = _language(network).layers, _gradient_reaches(network)
    layer = load.attention_pairs(shared)
    pairs = (len(layers) - 1) * layer + (load.anchor_pairs if pruned else layer)
    width = layers[0].self_attn.q_proj.out_features
    total = _pair_flops(width, pairs, reached["language model"], checkpointing)
    if num_images:
        num_patches = load.image_tokens * patches_per_token(network)
        pairs = num_images * _vision_pairs(network.model.config.vision_config, num_patches)
        width = network.model.visual.blocks[0].attn.qkv.in_features
        total += _pair_flops(width, pairs, reached["vision tower"], checkpointing)
    return total


def _pair_flops(width: int, pairs: int, differentiable: bool, checkpointing: bool) -> Flops:
    once = 4 * width * pairs
    return Flops(once, 2 * once * differentiable, once * (differentiable and checkpointing))


def _vision_pairs(vision, num_patches: int) -> int:
    """Query-key pairs of one image over all blocks; windows at the image's edge count as full ones."""
    full = vision.depth
    window = num_patches
    if hasattr(vision, "fullatt_block_indexes"):
        full = len(vision.fullatt_block_indexes)
        window = min(num_patches, (vision.window_size // vision.patch_size) ** 2)
    return num_patches * (full * num_patches + (vision.depth - full) * window)


def patches_per_token(network: RewardNetwork) -> int:
    """Image patches that the projector merges into one token."""
    return network.model.config.vision_config.spatial_merge_size**2 if network.is_vision else 1
