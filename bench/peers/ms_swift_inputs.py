"""The model, the images and the preferences that fastrm and ms-swift are compared on: the same files for both.

The folder holds `model/`, which both read (stock weights, and a linear head without bias under the key that both
use), and for each workload `<workload>.jsonl` in ms-swift's own format, which fastrm reads too. A group of four
responses is six rows with one prompt: ms-swift has no other form for it, fastrm makes one group of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from PIL import Image

from fastrm.config import HeadConfig, ModelConfig
from fastrm.data.media.format import FormatSettings
from fastrm.data.record import ImageRef, Message, Response
from fastrm.data.template import ConversationEncoder
from fastrm.data.tokenizer import train_tokenizer
from fastrm.data.tree import causal_pairs
from fastrm.json_files import to_json
from fastrm.limits import MediaLimits
from fastrm.model.architectures import find_architecture
from fastrm.model.export import make_encoder, save_model
from fastrm.model.network import RewardNetwork, init_backbone
from fastrm.train.step_cost import make_cost_model


@dataclass(frozen=True)
class Sizes:
    """The sizes of the inputs.

    Attributes:
        text, vision: of the two parts of Qwen2.5-VL: keyword arguments of its transformers config.
        vocabulary: of the tokenizer, at most.
        image_side: in pixels; a multiple of 28, so that nobody resizes.
        prompt_tokens: of a prompt with its image, up to where the response begins; in the mean if they vary.
        response_tokens: of a response with the end of its turn; likewise.
    """

    text: dict
    vision: dict
    vocabulary: int = 4096
    image_side: int = 448
    prompt_tokens: int = 1300
    response_tokens: int = 300


# 35 million parameters in the proportions of Qwen2.5-VL-7B: GQA, an MLP several times as wide, a tower of less than a
# tenth of the arithmetic. Large enough that matrix products decide, small enough for half a minute a step on two cores.
SIZES = Sizes(
    text={
        "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "initializer_range": 0.04,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [8, 12, 12]},
    },
    vision={
        "depth": 8, "hidden_size": 192, "intermediate_size": 512, "num_heads": 3, "out_hidden_size": 512,
        "window_size": 112, "fullatt_block_indexes": [3, 7], "initializer_range": 0.04,
    },
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """The preferences of one step.

    Attributes:
        prompts: in a step.
        responses: to each prompt, all of whose pairs are preferences.
        mixed: lengths vary as they do in real data, around those that `Sizes` says; else all are equal.
    """

    name: str
    prompts: int
    responses: int
    mixed: bool = False

    @property
    def pairs(self) -> int:
        """Preferences in a step."""
        return self.prompts * self.responses * (self.responses - 1) // 2

    def lengths(self, sizes: Sizes) -> list[tuple[int, list[int]]]:
        """Return for each prompt its number of tokens, and those of its responses."""
        if not self.mixed:
            return [(sizes.prompt_tokens, [sizes.response_tokens] * self.responses)] * self.prompts
        of_prompts = _spread(sizes.prompt_tokens, self.prompts)
        of_responses = _spread(sizes.response_tokens, self.prompts * self.responses)
        return [(tokens, of_responses[number :: self.prompts]) for number, tokens in enumerate(of_prompts)]


# The deviation of log lengths of the responses in LLaMA-Factory's English DPO demo, of which half have at most 180
# tokens and nine in ten at most 350.
LOG_DEVIATION = 0.52


def _spread(mean: int, count: int) -> list[int]:
    """Return evenly spaced quantiles of a log-normal distribution with this mean."""
    places = [NormalDist().inv_cdf((number + 0.5) / count) for number in range(count)]
    factors = [math.exp(LOG_DEVIATION * place) for place in places]
    return [round(mean * factor * count / sum(factors)) for factor in factors]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("pairs", 4, 2), Workload("pairs-mixed", 4, 2, mixed=True), Workload("groups-of-4", 1, 4),
    )
}  # fmt: skip


def make_inputs(folder: Path, sizes: Sizes = SIZES) -> None:
    """Write the model and all workloads; they are random, and the same at every call."""
    rng = np.random.default_rng(0)
    words = _words(rng, sizes.vocabulary // 4)
    text = " ".join(rng.choice(words, 30_000))
    tokenizer = train_tokenizer([(Message("user", (text,)),)], sizes.vocabulary)
    known = [word for word in words if len(tokenizer.encode(" " + word, add_special_tokens=False)) == 1]
    network = random_reward_model(tokenizer, sizes)
    save_model(network, folder / "model")
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for workload in WORKLOADS.values():
        rows = []
        for number, (prompt_tokens, response_tokens) in enumerate(workload.lengths(sizes)):
            image = images / f"{workload.name}-{number}.png"
            random_image(rng, sizes.image_side).save(image)
            prompt, responses = _texts(network.encoder, rng, known, image, prompt_tokens, response_tokens)
            rows += pair_rows(prompt, responses, str(image))
        lines = "".join(to_json(row) + "\n" for row in rows)
        (folder / f"{workload.name}.jsonl").write_text(lines)


def random_reward_model(tokenizer, sizes: Sizes) -> RewardNetwork:
    """Return a random float32 Qwen2.5-VL with a linear head without bias, ms-swift's only kind of head."""
    init = {"model_type": "qwen2_5_vl", "text_config": sizes.text, "vision_config": sizes.vision}
    torch.manual_seed(0)
    backbone = init_backbone(ModelConfig(init=init, tokenizer="given"), tokenizer)
    pixels = sizes.image_side**2
    settings = FormatSettings(min_pixels=min(pixels, 3136), max_pixels=pixels)
    encoder = make_encoder(backbone.config, tokenizer, None, "last_token", MediaLimits(), settings)
    network = RewardNetwork(backbone, HeadConfig(layers=1, bias=False), encoder)
    # The usual small head gives equal rewards, and a loss of log 2 whatever the model does.
    torch.nn.init.normal_(network.score.weight, std=0.2)
    return network


def step_flops(model: Path, workload: Workload, sizes: Sizes, checkpointing: str) -> tuple[int, int]:
    """Return FLOPs of a step's matrix products and attention, (fastrm's, ms-swift's), by `step_cost`'s formulas.

    fastrm runs each prompt and image once, and of the last layer only keys and values for all tokens; ms-swift runs two
    whole rows for each preference. Padding is left out. Their ratio is what shared work alone can gain.
    """
    config = find_architecture(ModelConfig(path=str(model)))[0]
    settings = ModelConfig(path=str(model), activation_checkpointing=checkpointing)
    ours = make_cost_model(config, settings)
    # A mean over all tokens needs the whole last layer.
    theirs = make_cost_model(config, settings.model_copy(update={"pooling": "mean"}))
    side = sizes.image_side // 28
    of_trees = of_rows = 0.0
    for prompt, responses in workload.lengths(sizes):
        tree_pairs = causal_pairs(prompt) + sum(causal_pairs(prompt + n) - causal_pairs(prompt) for n in responses)
        of_trees += ours.of_medium(side, side)
        of_trees += ours.per_token * (prompt + sum(responses)) + ours.per_attention_pair * tree_pairs
        for row in (prompt + n for n in responses):
            cost = theirs.of_medium(side, side) + theirs.per_token * row + theirs.per_attention_pair * causal_pairs(row)
            of_rows += (workload.responses - 1) * cost  # one row for each preference of the response
    return int(of_trees), int(of_rows)


def random_image(rng: np.random.Generator, side: int) -> Image.Image:
    """Return an image of squares of random colours, each as large as an image token."""
    squares = rng.integers(0, 256, (side // 28, side // 28, 3), dtype=np.uint8)
    return Image.fromarray(squares.repeat(28, axis=0).repeat(28, axis=1))


def pair_rows(prompt: str, responses: Sequence[str], image: str) -> list[dict]:
    """Return all pairs of the responses, the earlier one preferred, as rows of ms-swift."""
    return [
        {
            "messages": [{"role": "user", "content": "<image>" + prompt}, {"role": "assistant", "content": chosen}],
            "rejected_response": rejected,
            "images": [image],
        }
        for number, chosen in enumerate(responses)
        for rejected in responses[number + 1 :]
    ]


def _texts(
    encoder: ConversationEncoder, rng: np.random.Generator, words: Sequence[str], image: Path,
    prompt_tokens: int, response_tokens: Sequence[int],
) -> tuple[str, list[str]]:  # fmt: skip
    """Return a prompt and responses of exactly these numbers of tokens, with image and template."""
    end_of_turn = 2  # <|im_end|> and the newline after it
    responses = [_text(encoder, rng, words, num_tokens - end_of_turn) for num_tokens in response_tokens]
    turns = (Message("user", (ImageRef(path=str(image)), "")), Message("assistant", (responses[0],)))
    without_prompt = len(encoder.encode(Response(turns)).tokens) - response_tokens[0]
    return _text(encoder, rng, words, prompt_tokens - without_prompt), responses


def _text(encoder: ConversationEncoder, rng: np.random.Generator, words: Sequence[str], num_tokens: int) -> str:
    """Return random words, of which each but the first is known to be one token."""
    chosen = list(rng.choice(words, num_tokens))
    while (excess := encoder.num_text_tokens(" ".join(chosen)) - num_tokens) > 0:
        del chosen[-excess:]
    return " ".join(chosen)


def _words(rng: np.random.Generator, count: int) -> list[str]:
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    return ["".join(rng.choice(syllables, 2)) for _ in range(count)]
