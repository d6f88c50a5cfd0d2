"""The peak memory of a real training step, measured in a process of its own.

    python -m tests.helpers.memory_runs '[{"text": {...}, "mode": "full", ...}, ...]'

prints a line of JSON for each case: the rise of resident memory over what the process needs without the
model, and the segments of the pack. The environment is that of `measure`.
"""

import ctypes
import gc
import itertools
import json
import subprocess
import sys

from bench.harness.memory import reset_peak, status_bytes
from tests.helpers.own_process import environment
from tests.helpers.waiting import PATIENCE

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TEXT = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": False}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}


def measure(cases: list[dict]) -> list[dict]:
    """Run cases one after another in a new process; for each what `peak_of` gives.

    A case has `path`, a folder of a text model, or else `text` and perhaps `vision` or, for InternVL, `tiles` (sizes
    for transformers); and `load` (groups, words of a prompt and of a response, side of an image) and what differs from
    the defaults of mode, dtype, weights, states, fuse, freeze, pooling and packs (1: the step has no other pack).
    """
    # The threshold is fixed, so that it does not grow: large blocks come from the system and go back to it at once.
    variables = environment(OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    command = [sys.executable, "-m", "tests.helpers.memory_runs", json.dumps(cases)]
    run = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=PATIENCE)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return [json.loads(line) for line in run.stdout.splitlines()[-len(cases) :]]


def family_of(case: dict) -> str:
    """The model type of a case; that of `path` is any text model: its packs are of small token ids."""
    return "internvl" if "tiles" in case else "qwen2_5_vl" if "vision" in case else "qwen2"


def model_options(case: dict, tiny: bool = False) -> dict:
    """model.init of a case, or of a tiny model of the same kind."""
    text = {**TEXT, **case["text"], **(TINY if tiny else {})}
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    if "tiles" in case:
        vision = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        vision = {**vision, **case["tiles"], **(vision if tiny else {})}
        text_config = {"model_type": "qwen2", **text, "rope_parameters": ROPE}
        return {"model_type": "internvl", "text_config": text_config, "vision_config": vision}
    if "vision" not in case:
        return {"model_type": "qwen2", **text, "rope_parameters": ROPE}
    rope = {**ROPE, "mrope_section": [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "fullatt_block_indexes": [1]}
    vision |= {**({} if tiny else case["vision"]), "out_hidden_size": text["hidden_size"]}
    return {"model_type": "qwen2_5_vl", "text_config": {**text, "rope_parameters": rope}, "vision_config": vision}


def architecture_of(case: dict, tiny: bool = False):
    """The transformers config of a case."""
    from transformers import AutoConfig

    if "path" in case:
        return AutoConfig.from_pretrained(case["path"])
    options = model_options(case, tiny)
    options.get("text_config", options).update(dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")))
    return AutoConfig.for_model(**options)


def settings_of(case: dict):
    """The configuration of a case."""
    from fastrm.config import Config, ModelConfig, OptimConfig, PrecisionConfig

    origin = {"init": {"model_type": family_of(case)}, "tokenizer": "none"}
    paradigm = case.get("paradigm", "reward")
    return Config(
        paradigm=paradigm,
        model=ModelConfig(
            **({"path": case["path"]} if "path" in case else origin),
            activation_checkpointing=case.get("mode", "none"), freeze=case.get("freeze", []),
            fuse_projections=case.get("fuse", False), pooling=case.get("pooling", "anchor"),
        ),
        optim=OptimConfig(lr=1e-6, states=case.get("states", "fp32")),
        precision=PrecisionConfig(dtype=case.get("dtype", "fp32"), weights=case.get("weights", "fp32")),
    )  # fmt: skip


def make_engine(case: dict, tiny: bool = False):
    """A LocalEngine with random weights."""
    import torch
    from transformers import AutoModel

    from fastrm.model.loading import load_backbone
    from fastrm.model.network import RewardNetwork
    from fastrm.train.engine import LocalEngine

    config = settings_of(case)
    if "path" in case:
        backbone = load_backbone(case["path"])
    else:
        backbone = AutoModel.from_config(architecture_of(case, tiny), dtype=torch.float32)
    network = RewardNetwork(backbone, config.model.head, pooling=config.model.pooling, paradigm=config.paradigm)
    network.freeze(config.model.freeze)
    if config.model.fuse_projections:
        network.fuse_projections()
    network.set_kernels(torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32, attention="sdpa")
    network.use_activation_checkpointing(config.model.activation_checkpointing)
    return LocalEngine(network.train(), config)


def predict(case: dict, run: dict):
    """Return the `PeakMemory` that the plan has for a case and the pack that `peak_of` measured."""
    from fastrm.forecast.full_pack import PackShape
    from fastrm.forecast.memory import peak_memory

    steps = fake_steps(case)
    ends = list(itertools.accumulate(run["lengths"]))
    leaves = tuple(end - 1 for number, end in enumerate(ends) if number not in run["parents"])
    grids = tuple(map(tuple, run["grids"]))
    shape = PackShape(tuple(run["lengths"]), tuple(run["parents"]), leaves, grids, run["num_image_rows"])
    return peak_memory(steps, settings_of(case), shape, "eager", num_packs=case.get("packs", 2))


def fake_steps(case: dict, whole: bool = False):
    """Return the `FakeSteps` of a case's network."""
    import torch
    from transformers import AutoModel

    from fastrm.forecast.fake_step import FakeSteps
    from fastrm.model.network import RewardNetwork

    config = settings_of(case)
    with torch.device("meta"):
        backbone = AutoModel.from_config(architecture_of(case), dtype=torch.float32)
        network = RewardNetwork(backbone, config.model.head, pooling=config.model.pooling, paradigm=config.paradigm)
    network.freeze(config.model.freeze)
    return FakeSteps(network, whole=whole)


def make_packs(case: dict):
    """(small, large): a pack of a few tokens with an image, if there is a tower, and the one to measure."""
    from fastrm.data.template import TurnLoss
    from tests.helpers import support

    if "tiles" in case:
        support.FAMILIES["internvl"]["vision_config"]["image_size"] = case["tiles"]["image_size"]
    encoder = support.make_model(family_of(case))
    if "paradigm" in case:
        encoder.encoder.turns = TurnLoss(per_token=case["paradigm"] == "judge")
    packs = []
    for number, (groups, prompt, response, side) in enumerate([(1, 4, 4, 28), case["load"]]):
        records = [
            support.make_record(
                100 * number + n, prompt_words=prompt, response_words=(response, response + 1),
                images=[support.make_image(side, side, n)] if {"vision", "tiles"} & case.keys() else (),
            )
            for n in range(groups)
        ]  # fmt: skip
        packs.append(support.pack_of(encoder, records))
    return packs


def peak_of(case: dict) -> dict:
    """Measure in this process.

    Returns:
        state_bytes (weights, states and, with several packs, gradients), peak_bytes of a step, lengths and
        parents of the pack's segments, grids of its images, and tokens in its row that stand for them.
    """
    small, large = make_packs(case)
    # Libraries are loaded at first use, and oneDNN makes and keeps a program for every shape of bfloat16 product.
    warm = make_engine(case, tiny=case.get("dtype") != "bf16")
    warm.accumulate(large)
    warm.accumulate(small)
    warm.update(1e-6, 0)
    del warm
    resting = _resident("VmRSS")
    engine = make_engine(case)
    # The first update makes the optimizer's states; the gradient that the small pack leaves is then added to.
    engine.accumulate(small)
    engine.update(1e-6, 0)
    if case.get("packs", 2) > 1:
        engine.accumulate(small)
    state = _resident("VmRSS") - resting
    reset_peak()
    engine.accumulate(large)
    assert engine.update(1e-6, 1).finite
    peak = _resident("VmHWM", trim=False) - resting
    return {
        "state_bytes": state, "peak_bytes": peak, "lengths": large.lengths, "parents": large.parents,
        "grids": [list(map(int, grid)) for grid in large.media_grids],
        "num_image_rows": 0 if large.media_rows is None else len(large.media_rows),
    }  # fmt: skip


def _resident(field: str, trim: bool = True) -> int:
    if trim:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    return status_bytes(field)


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        print(json.dumps(peak_of(case)), flush=True)
