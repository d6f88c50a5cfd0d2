"""One YAML file plus `a.b=c` overrides -> a typed, checked `Config`.

Strict, as yaml_files.py says. Relative paths are relative to the working directory.
"""

import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fastrm.limits import MediaLimits
from fastrm.names import device_name, dtype_name
from fastrm.yaml_files import apply_override, dump_yaml, read_yaml, validate

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# YAML 1.1 reads an unquoted `off` as false.
_Off = BeforeValidator(lambda value: "off" if value is False else value)
_NEW_HEAD = BeforeValidator(lambda value: {"new": True} if value == "new" else value)

_Dtype = BeforeValidator(dtype_name)  # bfloat16 and torch.bfloat16 too
# JSON, and YAML that we have written ourselves, hold it as text.
_Date = Annotated[
    datetime.date,
    BeforeValidator(lambda value: datetime.date.fromisoformat(value) if isinstance(value, str) else value),
]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, frozen=True
    )


class RunConfig(_Section):
    dir: str | None = None
    """Run folder: metrics, checkpoints, export. Default: runs/<name of the YAML file>."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the initial weights and, as (seed, epoch, position), the order of the data."""
    epochs: Positive = 1
    """Passes over the training groups; ignored when max_steps is set."""
    max_steps: Positive | None = None
    """Optimizer steps of the whole run; the data is passed as often as they need."""
    log_every: Positive = 1
    """Steps between rows of metrics.jsonl; a row holds the means since the last one."""
    eval_every: NonNegative = 0
    """Steps between evaluations on data.eval; 0 = only after the last step."""
    save_every: NonNegative = 0
    """Steps between checkpoints; 0 = only after the last step and on interruption."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept; the one with the best evaluation is kept besides."""
    report_to: list[Literal["tensorboard", "wandb"]] = []
    """Loggers besides metrics.jsonl, which is always written."""
    device: Annotated[str, BeforeValidator(device_name)] = "auto"
    """auto (a GPU if there is one), cpu, cuda, or one GPU by its number: cuda:1."""
    num_processes: Positive | None = None
    """Ranks to start on this machine, one for each GPU. Default: all GPUs, or 1 on a CPU. Under torchrun or
    the deepspeed launcher, that launcher decides."""


class SourceConfig(_Section):
    path: str | None = None
    """A .jsonl, .json or .parquet file, a folder of them, digits:train / digits:eval, or
    hub:owner/name[/config][:split]. With `set`: the set's folder, as published; default: read from the hub."""
    set: str | None = None
    """A published set by its name (`fastrm data sets` lists them), read as it was published."""
    format: Literal[
        "auto", "llamafactory", "swift", "povid", "completions", "arena", "judge", "rated", "groups", "labelled",
        "helpsteer", "mmpr", "flat", "trl", "messages", "json_text", "digits",
    ] = "auto"  # fmt: skip
    """Layout of the rows; auto decides row by row from their keys."""
    images: str | None = None
    """Folder, or tar/zip archive, that paths of images and videos are relative to; of an archive in parts
    (images.zip_aa, ...) the name without them. Default: the file's folder. none: the rows have no images and videos,
    and <image> in their texts is text; elsewhere it is the place of an image, and <<image>> is the text."""
    columns: dict[str, str] = {}
    """Where the file has other names for its columns: the key that fastrm reads, and the file's name for it, as
    {prompt: question, chosen: better, images: img}. Checked against the file's first rows."""
    ignore: list[str] = []
    """Keys of the rows that are metadata: they are not read, and not reported as unread."""
    pairs: Literal["all", "hard"] | None = None
    """Of responses with scores, the preferences between all, or only the one with the largest gap. Default: all,
    or what belongs to `set`."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Multiplies the loss weight of every preference of this source."""
    repeat: Annotated[float, Field(gt=0.0)] = 1.0
    """Times that an epoch holds each group of this source: 2 = all twice, 1.5 = all once and half of them, drawn by
    a hash of the prompt, once more, 0.55 = 55 % of them. Training sources only."""
    cap: Positive | None = None
    """At most this many preferences of this source, before `repeat`: whole groups, drawn by a hash of the prompt."""
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] | Positive = 0.0
    """Groups that leave the training set and join the evaluation: a share (0.01) or a number (500), drawn by a hash
    of the prompt. A prompt that is held out of one source is held out of all. Training sources only."""
    name: str | None = None
    """Name of all its rows in per-source metrics. Default: that of `set`, the row's own `source`, the file's name."""

    @model_validator(mode="after")
    def _check_origin(self):
        if self.path is None and self.set is None:
            raise ValueError("a source needs path, or set: one of the names that `fastrm data sets` lists")
        return self


class AgainstConfig(_Section):
    name: str | None = None
    """A benchmark that `fastrm eval MODEL bench:NAME` knows. Default: `path` is a data source in any known layout."""
    path: str | None = None
    """The benchmark's local copy. Default: read from the hub."""
    images: str | None = None
    """Folder, or tar/zip archive, that its image paths are relative to."""

    @model_validator(mode="after")
    def _check(self):
        if self.name is None and self.path is None:
            raise ValueError("data.decontaminate.against: an entry needs name, path, or both")
        return self


class DecontaminateConfig(_Section):
    against: Annotated[list[str | AgainstConfig], Field(min_length=1)]
    """What training must not contain: names of benchmarks, paths of data sources, or {name, path, images}."""
    image_hash: bool = True
    """Remove records with an image of the same bytes."""
    perceptual_hash: bool | Annotated[int, Field(ge=0, le=16)] = True
    """Remove records with an image that looks the same: 64-bit hashes (pHash) that differ in at most this many bits;
    true: 4. Decodes every image."""
    image_question: bool = True
    """Remove records with the same image and the same question."""
    response_pair: bool = True
    """Remove records with the same two responses, in either order; without images, to the same question. With
    images, pairs of which both have fewer than 8 words do not count."""


class DataConfig(_Section):
    train: list[SourceConfig] = []
    """Training sources, concatenated."""
    eval: list[SourceConfig] = []
    """Held-out sources."""
    prepared: str | None = None
    """Folder of the prepared set; several runs may share it. One that was made under other settings is refused.
    Default: run.dir/prepared, which is made anew when the settings or the files change."""
    max_tokens_per_group: Positive = 32768
    """A group whose packed tree is longer is refused and named; nothing is ever truncated."""
    min_pixels: Positive = 56 * 56
    """Images are enlarged to at least this many pixels (the stock image processor's rule, Qwen)."""
    max_pixels: Positive = 28 * 28 * 1280
    """Images are shrunk to at most this many pixels (the stock image processor's rule, Qwen)."""
    max_tiles: Annotated[int, Field(ge=1, le=64)] = 12
    """InternVL cuts an image into at most this many tiles, the thumbnail not counted (the stock InternVL
    processor's rule and default). Qwen: min_pixels and max_pixels instead."""
    image_mean: Annotated[list[float], Field(min_length=3, max_length=3)] | None = None
    """Red, green and blue (0 to 1) that the image processor subtracts. Default: the model's own."""
    image_std: Annotated[list[Annotated[float, Field(gt=0.0)]], Field(min_length=3, max_length=3)] | None = None
    """What it divides by then. Set both for a model that starts at random, on unusual images only."""
    max_image_pixels: Positive = MediaLimits.max_pixels
    """An image file that declares more pixels is refused before it is decoded."""
    max_image_bytes: Positive = MediaLimits.max_bytes
    """An image file with more bytes is refused before it is read."""
    video_frames: Annotated[int, Field(gt=0, le=768)] = 32
    """Evenly spaced frames that a video is read as; one that has fewer gives all (768: the stock processor's most)."""
    video_min_pixels: Positive = 128 * 28 * 28
    """Frames of videos are enlarged to at least this many pixels (the stock video processor's rule and default)."""
    video_max_pixels: Positive = 768 * 28 * 28
    """Frames of videos are shrunk to at most this many pixels (the stock video processor's rule and default). 32
    frames of this size are 12,288 tokens."""
    frame_folder_fps: Annotated[float, Field(gt=0.0)] = 24.0
    """Frames per second of a video that is a folder of frames, which does not say (the stock processor assumes 24).
    Only Qwen2.5-VL's positions in time depend on it."""
    max_video_bytes: Positive = MediaLimits.max_video_bytes
    """A video file with more bytes is refused before it is read."""
    max_video_seconds: Annotated[float, Field(gt=0.0)] = MediaLimits.max_video_seconds
    """A longer video is refused before it is decoded."""
    merge_groups: bool = True
    """Merge records with the same images and prompt into one group."""
    deduplicate: bool = True
    """Train once on records that agree in prompt, images, responses and preferences, whatever their source; the
    others are named in the quarantine. False keeps copies; the paper says nothing of them."""
    decontaminate: DecontaminateConfig | None = None
    """Keep records of benchmarks out of training. The paper mentions no decontamination, so the default is off."""
    share_prefixes: bool = True
    """Pack responses as prefix trees. False packs each response whole, for comparison."""
    num_workers: NonNegative = 1
    """Processes that decode and tokenise ahead of the training step; 0 = in the training process."""

    @model_validator(mode="after")
    def _check(self):
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"data.min_pixels {self.min_pixels} is above data.max_pixels {self.max_pixels}")
        if self.video_min_pixels > self.video_max_pixels:
            raise ValueError(
                f"data.video_min_pixels {self.video_min_pixels} is above data.video_max_pixels {self.video_max_pixels}"
            )
        for number, source in enumerate(self.eval):
            if source.repeat != 1.0 or source.held_out:
                raise ValueError(f"data.eval.{number}: repeat and held_out are for data.train; remove them here")
        return self


class HeadConfig(_Section):
    layers: Annotated[int, Field(ge=1, le=5)] = 2
    """Linear layers: D -> D (layers - 1 times), then D -> 1."""
    activation: Literal["none", "tanh", "relu", "silu"] = "silu"
    """Between the layers."""
    bias: bool = True
    """Biases on all layers."""
    new: bool = False
    """Draw a head even where model.path holds a trained one, whose weights are then left out and named. `head: new`
    says the same with the other settings' defaults. Not stored in the export."""

    def stored(self) -> dict[str, Any]:
        """What describes the head itself, as config.json of an export holds it."""
        return self.model_dump(exclude={"new"})


class TrainedTokenizer(_Section):
    train_vocab_size: Annotated[int, Field(ge=280)]
    """Byte-level BPE of this size, trained on the text of data.train, with Qwen2.5-VL's special
    tokens and chat template. For models that start from random weights."""


class ModelConfig(_Section):
    path: str | None = None
    """Folder or hub id of a backbone or of a reward model, whose head is then kept, whoever trained it; a run's folder,
    or a LoRA adapter's, which is merged into its base model (docs/models.md)."""
    init: dict[str, Any] | None = None
    """A transformers config (with model_type) to initialise at random instead of `path`."""
    tokenizer: str | TrainedTokenizer | None = None
    """Folder or hub id; default: `path`. With `init`: a folder, or {train_vocab_size: n}."""
    head: Annotated[HeadConfig, _NEW_HEAD] = HeadConfig()
    """Of a model that holds a trained head, what is left out here comes from its files, and what contradicts them is
    refused. So do anchor and pooling."""
    anchor: Literal["last_token", "end_of_turn", "before_padding"] = "last_token"
    """Token that the head reads: the last of the rendered response (for Qwen the newline after
    <|im_end|>), the last special token that ends the turn, or the last that is not the pad_token_id of config.json, as
    transformers' classes for sequence classification do. Stored in the export."""
    pooling: Literal["anchor", "mean"] = "anchor"
    """What the head reads: the anchor's hidden state, or the mean over all tokens up to it, prompt and images
    included (needs the last layer for every token). Stored in the export."""
    template_date: _Date | None = None
    """Date that a chat template which reads the clock is given, as 2026-07-26. Default: the day of the run's first
    start. Stored in the run, in the prepared set and in the export."""
    freeze: list[Literal["vision", "projector", "language"]] = []
    """Parts without gradient: the vision tower, its projector (Qwen: merger), the language model."""
    attention: Literal["auto", "sdpa", "flash", "flash_attn", "triton"] = "auto"
    """sdpa runs anywhere; flash = torch's varlen FlashAttention, CUDA with bf16 only; flash_attn = that of the
    flash-attn package (an extra); triton = our kernel, CUDA; auto follows `kernels`."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: nothing; everything of a layer but its
    matrix products and attention; or whole layers."""
    fuse_projections: bool = False
    """Compute q, k and v in one matrix product, and gate and up in one. Files keep the stock names."""
    export_dtype: Annotated[Literal["auto", "fp32", "bf16"], _Dtype] = "auto"
    """Precision of the backbone in the exported model; auto = precision.dtype, that of its products. The head is
    float32 in any case."""

    @model_validator(mode="after")
    def _check(self):
        if (self.path is None) == (self.init is None):
            raise ValueError("set exactly one of model.path and model.init")
        if self.init is not None and "model_type" not in self.init:
            raise ValueError("model.init needs model_type, for example qwen2_5_vl or qwen2")
        if self.init is not None and self.tokenizer is None:
            raise ValueError("model.init needs model.tokenizer: a folder, or {train_vocab_size: n}")
        if self.init is None and isinstance(self.tokenizer, TrainedTokenizer):
            raise ValueError("model.tokenizer {train_vocab_size: n} is for model.init; with model.path leave it out")
        return self


class LossConfig(_Section):
    """The training objective.

    `loss` and, on held-out data, `eval/loss` in metrics.jsonl are this objective with all that is set here, so that
    one run's two curves can be compared; runs of different settings are compared by accuracy.
    """

    center: Annotated[float, Field(ge=0.0)] = 0.0
    """Coefficient of mean((r_w + r_l)^2), the zero-coefficient (centering) regulariser."""
    length_normalization: bool = False
    """Divide each reward by log(response tokens + 1) before the loss."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Probability that a preference label is flipped."""
    ties: Literal["ignore", "half"] = "ignore"
    """half: a tie is two opposite preferences of half the weight each."""


class OptimConfig(_Section):
    lr: Annotated[float, Field(gt=0.0)] = 3e-6
    """Peak learning rate of AdamW."""
    betas: Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """On weight matrices only; biases, norms and embeddings have none."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up: half a cosine to min_lr_ratio * lr, or constant."""
    warmup_ratio: Fraction = 0.1
    """Share of all steps over which the rate rises linearly from 0."""
    min_lr_ratio: Fraction = 0.0
    """Rate after the last step, as a share of lr (cosine)."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Global gradient norm is clipped to this; 0 = not clipped."""
    batch_pairs: Positive = 128
    """A step takes whole groups in order until it has this many preferences."""
    group_weight: Literal["preference", "group"] = "preference"
    """preference: every preference counts 1. group: every group counts 1, shared by its preferences."""
    tokens_per_pack: Positive = 32768
    """Token budget of one forward pass; the gradient of a step does not depend on it."""
    states: Literal["fp32", "8bit"] = "fp32"
    """AdamW's two moments: float32, or for the backbone's matrices torchao's 8-bit code, one scale for 256."""


class PrecisionConfig(_Section):
    dtype: Annotated[Literal["fp32", "bf16"], _Dtype] = "bf16"
    """bf16: matrix products in bfloat16 (autocast)."""
    weights: Annotated[Literal["auto", "fp32", "bf16"], _Dtype] = "auto"
    """Weight matrices of the backbone: auto = float32 where they are trained; what is frozen stays bfloat16 or float16
    where its files have that and one process runs with dtype bf16, which changes no bit of any result. fp32 = float32
    throughout. bf16 = bfloat16 with stochastically rounded updates, in half the memory. Norms, biases, embeddings and
    the head stay float32, and so do all gradients."""
    fp8: Annotated[Literal["off", "tensorwise", "rowwise", "rowwise_gw_hp"], _Off] = "off"
    """Large linears of the language model in FP8 (torchao's recipes; needs dtype bf16, and compile: layers to be
    fast). tensorwise: one scale a tensor, so that a reward depends slightly on what else is in its pack.
    rowwise: one scale a token and an output; rewards do not depend on the pack. rowwise_gw_hp: the same with
    weight gradients in bfloat16; the nearest to bf16, with two thirds of the gain."""

    @model_validator(mode="after")
    def _check(self):
        if self.fp8 != "off" and self.dtype != "bf16":
            raise ValueError(
                f"precision.fp8 {self.fp8} with precision.dtype {self.dtype}: FP8 is for bfloat16 matrix products; set "
                "precision.dtype: bf16, or precision.fp8: off"
            )
        if self.weights == "bf16" and self.dtype != "bf16":
            raise ValueError(
                f"precision.weights bf16 with precision.dtype {self.dtype}: bfloat16 weights are for bfloat16 matrix "
                "products; set precision.dtype: bf16, or precision.weights: fp32"
            )
        return self


class EngineConfig(_Section):
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO: divides over the ranks the optimizer states; also gradients; also weights. One process
    divides nothing and does not use DeepSpeed."""


class Config(_Section):
    names_elsewhere: ClassVar[dict[str, str]] = {
        "learning_rate": "optim.lr", "num_train_epochs": "run.epochs", "output_dir": "run.dir",
        "per_device_train_batch_size": "optim.batch_pairs, of all ranks together",
        "train_batch_size": "optim.batch_pairs, of all ranks together",
        "gradient_accumulation_steps": "optim.batch_pairs, which packs add up to whatever they hold",
        "max_length": "data.max_tokens_per_group", "max_seq_length": "data.max_tokens_per_group",
        "cutoff_len": "data.max_tokens_per_group", "bf16": "precision.dtype", "torch_dtype": "precision.dtype",
        "gradient_checkpointing": "model.activation_checkpointing", "lr_scheduler_type": "optim.schedule",
        "logging_steps": "run.log_every", "save_steps": "run.save_every", "eval_steps": "run.eval_every",
        "save_total_limit": "run.keep_checkpoints", "model_name_or_path": "model.path",
        "deepspeed": "engine.zero_stage",
    }  # fmt: skip
    """What keys of transformers' trainer, TRL, LLaMA-Factory and ms-swift are called here, for a hint."""
    kernels: Literal["auto", "triton", "eager"] = "auto"
    """Head, loss and attention: triton = our kernels, CUDA; eager = PyTorch's own operations; auto = for
    each of them the one that was measured to be faster on this device, eager where none was."""
    compile: Annotated[Literal["off", "layers"], _Off] = "off"
    """layers: decoder layers and vision blocks through torch.compile, for any number of tokens."""
    check_exactness: bool = True
    """Before the first step, compare rewards of two of the run's own groups, an image among them where there are any,
    with those of the stock transformers class with the same weights, in the precision of the run; a difference that
    rounding does not explain ends the run. A model is checked once (fastrm/model/first_use.py)."""
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    precision: PrecisionConfig = PrecisionConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _check(self):
        if self.optim.tokens_per_pack < self.data.max_tokens_per_group:
            raise ValueError(
                f"optim.tokens_per_pack {self.optim.tokens_per_pack} is below "
                f"data.max_tokens_per_group {self.data.max_tokens_per_group}: the largest group would "
                "not fit a pack; raise the first or lower the second"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved configuration; loading it again gives an equal `Config`."""
        return dump_yaml(self.model_dump(mode="json"))


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML), and validate.

    Raises:
        ConfigError: naming the file and line, or the override, of every problem found.
    """
    path = Path(path)
    tree, places = read_yaml(path)
    for override in overrides:
        apply_override(tree, places, override)
    if isinstance(tree.get("run", {}), dict):
        run = tree.setdefault("run", {})
        if run.get("dir") is None:
            run["dir"] = f"runs/{path.stem}"
    return validate(Config, tree, places, str(path))
