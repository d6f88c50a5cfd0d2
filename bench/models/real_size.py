"""Whole random models of published sizes: load, train a step with a frozen backbone, export, load again and score.

    python bench/models/real_size.py --dir /scratch/real --models 3B 7B
    python bench/models/real_size.py --dir /scratch/real --models 7B --layers 2      two layers of the 7B's widths

Each part runs in a process of its own and reports its seconds and its peak of resident memory, mapped files and
libraries included. A checkpoint has the names and the dtype (bf16) of the published one, random values, and a small
trained tokenizer, whose ids are some of the real vocabulary's. It is made tensor by tensor and removed at the end, but
for --keep; the disk needs room for it and for the export. Results go to bench/results, where a part that is measured
again replaces its row, and the table to standard output.
"""

import argparse
import contextlib
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.harness.memory import reset_peak, status_bytes
from bench.harness.pages import table
from bench.harness.results import RESULTS, device_name, environment, file_of, write_json
from fastrm.json_files import to_json

PARTS = ("make", "load", "step", "score", "score fp32")
# The pair that is trained on and scored has an image of 448 x 448 (256 tokens) and texts of this many words.
PROMPT_WORDS, RESPONSE_WORDS, IMAGE_SIDE = 300, 100, 448
WORDS = ("the", "a", "red", "blue", "cat", "dog", "sits", "on", "why", "this", "yes", "no", "one", "two", "three")
GB = 1e9
# The keys that identify a row of the results.
KEY = ("model", "layers", "part")


def main() -> None:
    """Run all parts of all models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="scratch folder: twice the size of a model")
    parser.add_argument("--models", nargs="+", choices=["3B", "7B"], default=["3B", "7B"])
    parser.add_argument("--layers", type=int, default=None, help="of both towers; default: all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1], help="after make, in this order")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--keep", action="store_true", help="leave the model's files in --dir for another call")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(to_json(run_part(options.part, options.models[0], options.layers, options.dir)))
        return
    result = {"device": device_name(), **environment()}
    suffix = "" if options.layers is None else f"-{options.layers}-layers"
    path = file_of(result["device"], f"-real-size{suffix}.json", options.out)
    rows = {tuple(row[key] for key in KEY): row for row in _earlier(path)}
    for model in options.models:
        for row in measure_model(model, options.layers, options.dir, options.parts, options.keep):
            rows[tuple(row[key] for key in KEY)] = row
    found = sorted(rows.values(), key=lambda row: row["model"])
    write_json(path, {**result, "rows": found})
    print(table_of(found))
    print(f"written to {path}")


def _earlier(path: Path) -> list[dict]:
    """Read the rows of earlier calls: parts may be measured one by one."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def measure_model(model: str, layers: int | None, folder: Path, parts: list[str], keep: bool) -> list[dict]:
    """Measure parts of one model, each in a process of its own; return their rows.

    Args:
        keep: leave the model's files for another call, which then makes no checkpoint.
    """
    scratch = folder / (model if layers is None else f"{model}-{layers}-layers")
    is_made = (scratch / "checkpoint" / "tokenizer.json").exists()
    scratch.mkdir(parents=True, exist_ok=True)
    needed, free = (1.1 if is_made else 2.1) * checkpoint_bytes(model, layers), shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(f"{folder}: {model} needs {needed / GB:.1f} GB for its files, there are {free / GB:.1f} GB")
    rows = []
    try:
        for part in [*([] if is_made else ["make"]), *(part for part in parts if part != "make")]:
            command = [sys.executable, __file__, "--dir", scratch, "--models", model, "--part", part]
            command += [] if layers is None else ["--layers", str(layers)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{model}, {part}: ended with {done.returncode}; its messages are above")
            rows += [{"model": model, "layers": layers, **row} for row in json.loads(done.stdout.splitlines()[-1])]
            print(to_json(rows[-1]), file=sys.stderr, flush=True)
    finally:
        if not keep:
            shutil.rmtree(scratch)
    return rows


def run_part(part: str, model: str, layers: int | None, folder: Path) -> list[dict]:
    """Run one part in a child process; return one or more rows."""
    checkpoint, export = folder / "checkpoint", folder / "export"
    if part == "make":
        return [_measured("make the checkpoint", lambda: make_checkpoint(model, layers, checkpoint))]
    if part == "load":
        return _load(checkpoint)
    if part == "step":
        return _step(checkpoint, export)
    return _score(export, "fp32" if part.endswith("fp32") else "auto")


def _load(checkpoint: Path) -> list[dict]:
    import torch

    from fastrm.model.loading import load_backbone

    kept = []
    row = _measured("load the backbone, bf16", lambda: kept.append(load_backbone(str(checkpoint), torch.bfloat16)))
    return [row | _weights(kept[0])]


def _step(checkpoint: Path, export: Path) -> list[dict]:
    """Load for training with the backbone frozen, run one step, and export the model beside the checkpoint."""
    from fastrm.config import Config
    from fastrm.data.tokenizer import load_tokenizer
    from fastrm.train.engine import LocalEngine
    from fastrm.train.setup import export_model, make_network

    tree = {"model": {"path": str(checkpoint), "freeze": ["vision", "projector", "language"]}}
    config, kept, done = Config.model_validate(tree), [], []

    def load() -> None:
        kept.append(LocalEngine(make_network(config, load_tokenizer(str(checkpoint))), config))

    def step() -> None:
        kept[0].accumulate(_pack(kept[0].network))
        done.append(kept[0].update(1e-3, 0))

    rows = [_measured("load for training, backbone frozen", load)]
    rows[0] |= _weights(kept[0].network)
    rows.append(_measured("one step of the head", step) | {"loss": done[0].loss, "finite": done[0].finite})
    rows.append(_measured("export, bf16", lambda: export_model(kept[0], export)))
    rows[-1]["file_bytes"] = sum(file.stat().st_size for file in export.glob("*.safetensors"))
    rows[-1]["files"] = sorted(file.name for file in export.glob("*.safetensors"))
    return rows


def _score(export: Path, dtype: str) -> list[dict]:
    import fastrm

    kept, rewards = [], []
    name = "load the export for scoring" + ("" if dtype == "auto" else f", {dtype}")
    rows = [_measured(name, lambda: kept.append(fastrm.RewardModel.from_pretrained(export, dtype=dtype)))]
    rows[0] |= _weights(kept[0].network) | {"weights": kept[0].weights}
    rows.append(_measured("score two responses", lambda: rewards.extend(kept[0].score([_group()])[0])))
    rows[-1]["rewards"] = rewards
    assert all(map(math.isfinite, rewards))
    return rows


def _measured(name: str, function) -> dict:
    """Return seconds and peak bytes of one call: of all resident memory, and of that not backed by files."""
    anonymous, stop = [status_bytes("RssAnon")], threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            anonymous.append(status_bytes("RssAnon"))

    reset_peak()
    before, sampler = status_bytes("VmRSS"), threading.Thread(target=sample)
    sampler.start()
    started = time.perf_counter()
    try:
        function()
    finally:
        seconds = time.perf_counter() - started
        stop.set()
        sampler.join()
    return {
        "part": name, "seconds": seconds, "before_bytes": before, "peak_bytes": status_bytes("VmHWM"),
        "peak_anonymous_bytes": max(anonymous),
    }  # fmt: skip


def _weights(network) -> dict:
    return {"weight_bytes": sum(parameter.nbytes for parameter in network.parameters())}


def _group() -> dict:
    """Return a group of a prompt with an image and two responses, as the Python API takes it."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
    prompt, *responses = (" ".join(random.choice(WORDS, n)) for n in (PROMPT_WORDS, RESPONSE_WORDS, RESPONSE_WORDS))
    return {"prompt": prompt, "images": [Image.fromarray(pixels)], "responses": responses}


def _pack(network):
    """Return the group as one pack with one preference."""
    from fastrm.data.batching import PackPlan
    from fastrm.data.loader import PackBuilder
    from fastrm.data.sources.layouts.groups import group_record

    record = group_record({**_group(), "preferences": [[0, 1]]}, 0, require_preferences=True)
    loaded = PackBuilder([record], network.encoder, True, lay_out=network.lay_out)[PackPlan((0,), 0, True)]
    assert not loaded.refused, loaded.refused
    return loaded.pack


def stock_model(model: str, layers: int | None, tokenizer=None):
    """Return the published architecture with its LM head, on torch's meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from fastrm.model.architectures import PUBLISHED

    options = dict(PUBLISHED[f"Qwen2.5-VL-{model}-Instruct"].options)
    if layers is not None:
        options["text_config"] = {**options["text_config"], "num_hidden_layers": layers}
        options["vision_config"] = {
            **options["vision_config"], "depth": layers, "fullatt_block_indexes": [layers - 1]
        }  # fmt: skip
    if tokenizer is not None:
        for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
            key = f"{name.removesuffix('_pad')}_token_id"
            options[key] = tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        options["text_config"] = {**options["text_config"], "pad_token_id": tokenizer.pad_token_id}
    tied = options["text_config"]["tie_word_embeddings"]
    config = AutoConfig.for_model(**options, dtype="bfloat16", tie_word_embeddings=tied)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")


def checkpoint_bytes(model: str, layers: int | None) -> int:
    """Return the bytes of all weights in bf16, each counted once."""
    return 2 * sum(parameter.numel() for parameter in stock_model(model, layers).parameters())


def make_checkpoint(model: str, layers: int | None, folder: Path) -> None:
    """Write a checkpoint with published names and shards of 5 GB, one tensor in memory at a time."""
    import torch

    from fastrm.data.media.qwen2_vl import load_qwen_format
    from fastrm.data.record import Message
    from fastrm.data.tokenizer import train_tokenizer
    from fastrm.model.weight_writer import WeightWriter

    tokenizer = train_tokenizer([(Message("user", (" ".join(WORDS),)),)], 300)
    stock = stock_model(model, layers, tokenizer)
    names = {
        name: name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        for name, _ in stock.named_parameters()  # a tied LM head is no parameter of its own
    }
    shutil.rmtree(folder, ignore_errors=True)  # left by a call that was stopped
    folder.mkdir()
    writer = WeightWriter(folder, [(names[n], tuple(p.shape), torch.bfloat16) for n, p in stock.named_parameters()])
    # The pool is drawn once, and matrices begin at different places in it: eight billion draws would take minutes.
    drawn = torch.empty(2**26 + 3, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))
    first = 0
    for name, parameter in stock.named_parameters():
        if parameter.ndim > 1:
            repeats = 2 + parameter.numel() // drawn.numel()
            value = drawn.repeat(repeats)[first : first + parameter.numel()].view(parameter.shape)
            first = (first + parameter.numel()) % drawn.numel()
        else:
            value = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
        writer.write(names[name], value)
        del value
    writer.close()
    stock.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    load_qwen_format(stock.config.vision_config, tokenizer, None, None).save(folder)


def table_of(rows: list[dict]) -> str:
    """Return the rows as a Markdown table; memory in GB of 10^9 bytes."""
    columns = ("model", "part", "seconds", "weights, GB", "peak resident, GB", "of it anonymous, GB")
    cells = []
    for row in rows:
        weights = f"{row['weight_bytes'] / GB:.2f}" if "weight_bytes" in row else ""
        cells.append((
            row["model"], row["part"], f"{row['seconds']:.1f}", weights, f"{row['peak_bytes'] / GB:.2f}",
            f"{row['peak_anonymous_bytes'] / GB:.2f}",
        ))  # fmt: skip
    return "\n".join(table(columns, cells))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
