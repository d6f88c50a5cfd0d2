"""A model folder of a published shape with random weights, laid out like its checkpoint, to try real sizes.

    python bench/models/random_model.py Qwen2.5-VL-7B-Instruct FOLDER              the whole model, 16.6 GB in bf16
    python bench/models/random_model.py Qwen2.5-VL-7B-Instruct FOLDER --layers 2   two decoder layers, two vision blocks

Widths, heads, vocabulary and the ids of special tokens are the published ones. Weights are bf16 in shards with their
index, with an LM head where the checkpoint has one. The tokenizer knows few words, and spells others out in bytes.
No more than one shard is held in memory.
"""

import argparse
import json
import math
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file

import bench  # noqa: F401  (the kernels' path)
from fastrm.data.record import Message
from fastrm.data.tokenizer import CHAT_LAYOUTS, train_tokenizer
from fastrm.json_files import to_json
from fastrm.limits import MediaLimits
from fastrm.model.architectures import PUBLISHED
from fastrm.model.export import make_encoder
from fastrm.model.families import VISION_FAMILIES, chat_layout
from fastrm.model.network import media_token_ids

SHARD_BYTES = 2 * 10**9  # but a larger tensor has a shard of its own
# The first special ids of the published vocabularies: all ordinary tokens are below.
SPECIAL_IDS = {
    "<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645, "<|vision_start|>": 151_652,
    "<|vision_end|>": 151_653, "<|vision_pad|>": 151_654, "<|image_pad|>": 151_655, "<|video_pad|>": 151_656,
    "<img>": 151_665, "</img>": 151_666, "<IMG_CONTEXT>": 151_667,
}  # fmt: skip
# The text that the tokenizer learns words from.
SENTENCES = (
    "What is in the picture? Describe the image.", "The picture shows a red bus in front of a house.",
    "Two dogs are playing with a ball on the grass.", "I cannot see that in this image.", "A boat on the blue water.",
)  # fmt: skip
POOL_ELEMENTS = 2**24 + 3  # odd, so that no row of a matrix begins where the one before did


def write_model(
    name: str, folder: Path, *, layers: int | None = None, vocabulary: int | None = None, tile: int | None = None,
    dtype: torch.dtype = torch.bfloat16, shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write a model folder.

    Args:
        name: of a published model, a key of PUBLISHED.
        layers: of the language model, and as many of the vision tower; None: all of both.
        vocabulary: rows of the embedding; None: as published. The special tokens stay as far from its end.
        tile: pixels of a side of InternVL's tiles; None: as published, 448, of which a tile is 256 tokens.
        dtype: of all weights.
        shard_bytes: a shard is closed before it would become larger.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    folder.mkdir(parents=True, exist_ok=True)
    options, published = published_options(name, layers, tile), PUBLISHED[name].options
    num_rows = published.get("text_config", published)["vocab_size"]
    vocabulary = vocabulary or num_rows
    tokenizer = padded_tokenizer(options["model_type"], vocabulary, num_rows - vocabulary)
    config = make_config(options, tokenizer, vocabulary)
    is_vision = config.model_type in VISION_FAMILIES
    with torch.device("meta"):
        model = (AutoModelForImageTextToText if is_vision else AutoModelForCausalLM).from_config(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config.get_text_config().tie_word_embeddings:
        shapes.pop("lm_head.weight")
    _write_shards(folder, shapes, dtype, shard_bytes)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if is_vision:
        make_encoder(config, tokenizer, None, "last_token", MediaLimits()).vision.save(folder)


def published_options(name: str, layers: int | None, tile: int | None = None) -> dict:
    """Return the keyword arguments of the transformers config, cut to so many layers and to such tiles."""
    options = PUBLISHED[name].options
    if tile is not None:
        vision = {**options["vision_config"], "image_size": [tile, tile]}
        options = {**options, "vision_config": vision, "image_seq_length": (tile // 28) ** 2}
    if layers is None:
        return options
    if "text_config" not in options:
        return {**options, "num_hidden_layers": layers}
    of_vision = {
        "qwen2_5_vl": {"depth": layers, "fullatt_block_indexes": [layers - 1]},
        "qwen2_vl": {"depth": layers},
        "qwen3_vl": {"depth": layers, "deepstack_visual_indexes": list(range(layers - 1))},
        "internvl": {"num_hidden_layers": layers},
    }  # fmt: skip
    return {
        **options, "text_config": {**options["text_config"], "num_hidden_layers": layers},
        "vision_config": {**options["vision_config"], **of_vision[options["model_type"]]},
    }  # fmt: skip


def make_config(options: dict, tokenizer, vocabulary: int):
    """Return the transformers config with the vocabulary and the special tokens' ids."""
    from transformers import AutoConfig

    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    ids["vocab_size"] = vocabulary
    if "text_config" not in options:
        return AutoConfig.for_model(**options | ids)
    options = {**options, "text_config": options["text_config"] | ids}
    return AutoConfig.for_model(**options, **media_token_ids(options["model_type"], tokenizer))


def padded_tokenizer(model_type: str, vocabulary: int, shift: int):
    """Return a small tokenizer whose special tokens have the published ids less `shift`; unused tokens fill gaps."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    layout = chat_layout(model_type)
    small = train_tokenizer([(Message("user", (text,)),) for text in SENTENCES], 500, layout)
    tree = json.loads(small.backend_tokenizer.to_str())
    special = CHAT_LAYOUTS[layout].special_tokens
    ids = {token: SPECIAL_IDS[token] - shift for token in special}
    taken = {number: token for token, number in ids.items()}
    ordinary = iter([token for token in tree["model"]["vocab"] if token not in ids])
    names = [taken.get(n) or next(ordinary, f"<unused {n}>") for n in range(max(taken) + 1)]
    assert len(names) <= vocabulary and next(ordinary, None) is None, "the vocabulary is too small"
    tree["model"]["vocab"] = {token: number for number, token in enumerate(names)}
    for added in tree["added_tokens"]:
        added["id"] = ids[added["content"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(to_json(tree)), chat_template=small.chat_template,
        eos_token=small.eos_token, pad_token=small.pad_token, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _write_shards(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int) -> None:
    """Write random tensors as model-00001-of-0000N.safetensors with the index; one shard is in memory."""
    shards, size = [[]], 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    pool = (0.02 * torch.randn(POOL_ELEMENTS, generator=torch.Generator().manual_seed(0))).to(dtype)
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_tensor(name, shapes[name], pool) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(to_json(index, indent=2, sort_keys=True) + "\n")


def random_tensor(name: str, shape: tuple[int, ...], pool: torch.Tensor) -> torch.Tensor:
    """Return values of the pool from a place that the name decides; vectors are five times them, norms around 1."""
    size = math.prod(shape)
    found = torch.empty(size, dtype=pool.dtype)
    start, done = zlib.crc32(name.encode()) % len(pool), 0
    while done < size:
        part = pool[start : start + size - done]
        found[done : done + len(part)] = part
        start, done = 0, done + len(part)
    if len(shape) == 1:
        found = found * 5 + name.endswith("weight")
    return found.view(shape)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(PUBLISHED))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="of the language model and of the vision tower; default: all")
    parser.add_argument("--vocabulary", type=int, help="rows of the embedding; default: as published")
    arguments = parser.parse_args()
    write_model(arguments.name, arguments.folder, layers=arguments.layers, vocabulary=arguments.vocabulary)
    size = sum(file.stat().st_size for file in arguments.folder.glob("*.safetensors"))
    print(f"{arguments.folder}: {size / 1e9:.1f} GB of random weights in the shape of {arguments.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
