"""The typed, checked `Config`: one YAML file plus `a.b=c` overrides.

Files are read strictly, as yaml_files.py says. Relative paths are relative to the working directory.
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

_Dtype = BeforeValidator(dtype_name)  # also accepts bfloat16 and torch.bfloat16
# JSON, and YAML that fastrm has written, hold a date as text.
_Date = Annotated[
    datetime.date,
    BeforeValidator(lambda value: datetime.date.fromisoformat(value) if isinstance(value, str) else value),
]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, frozen=True
    )


class RunConfig(_Section):
    """The run: its folder, length, records and devices."""

    dir: str | None = None
    """The folder of the run: metrics, checkpoints, export. Default: runs/<name of the YAML file>."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The seed of the initial weights and, as (seed, epoch, position), of the order of the data."""
    epochs: Positive = 1
    """Passes over the training groups; ignored if max_steps is set."""
    max_steps: Positive | None = None
    """Optimizer steps of the whole run; the data is passed as often as they need."""
    log_every: Positive = 1
    """Steps between rows of metrics.jsonl; a row holds the means since the last one."""
    eval_every: NonNegative = 0
    """Steps between evaluations on data.eval; 0 = only after the last step."""
    save_every: NonNegative = 0
    """Steps between checkpoints; 0 = only after the last step and on interruption."""
    keep_checkpoints: Positive = 2
    """The number of newest checkpoints that are kept; the one with the best evaluation is kept too."""
    report_to: list[Literal["tensorboard", "wandb"]] = []
    """Loggers that are used besides metrics.jsonl, which is always written."""
    device: Annotated[str, BeforeValidator(device_name)] = "auto"
    """The device: auto (a GPU if there is one), cpu, cuda, or one GPU by its number, such as cuda:1."""
    num_processes: Positive | None = None
    """The number of ranks to start on this machine, one for each GPU. Default: all GPUs, or 1 on a CPU. Under torchrun
    or the deepspeed launcher, that launcher decides."""


class SourceConfig(_Section):
    """A source of preferences: files, a published set, or a set on the hub."""

    path: str | None = None
    """The rows: a .jsonl, .json or .parquet file, a folder of them, digits:train / digits:eval, or
    hub:owner/name[/config][:split]. With `set`: the set's folder, as published; default: read from the hub."""
    set: str | None = None
    """A published set by its name (`fastrm data sets` lists them), read as it was published."""
    format: Literal[
        "auto", "llamafactory", "swift", "povid", "completions", "arena", "judge", "rated", "groups", "labelled",
        "helpsteer", "mmpr", "flat", "trl", "messages", "json_text", "digits",
    ] = "auto"  # fmt: skip
    """The layout of the rows; auto decides row by row from their keys."""
    images: str | None = None
    """The folder, or tar/zip archive, that paths of images and videos are relative to; an archive in parts
    (images.zip_aa, ...) is named without their endings. Default: the file's folder. none: the rows have no images and
    videos, and <image> in their texts is text; elsewhere it is the place of an image, and <<image>> is the text."""
    columns: dict[str, str] = {}
    """Other names of columns in the file: the key that fastrm reads, and the file's name for it, as {prompt: question,
    chosen: better, images: img}. They are checked against the file's first rows."""
    ignore: list[str] = []
    """Keys of the rows that are metadata: they are not read, and not reported as unread."""
    pairs: Literal["all", "hard"] | None = None
    """The preferences that scored responses give: all pairs, or hard: only the pair with the largest gap. Default:
    all, or what belongs to `set`."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """A factor of the loss weight of every preference of this source."""
    repeat: Annotated[float, Field(gt=0.0)] = 1.0
    """The number of times that an epoch holds each group of this source: 2 = all twice, 1.5 = all once and half of
    them, drawn by a hash of the prompt, once more, 0.55 = 55 % of them. Training sources only."""
    cap: Positive | None = None
    """The most preferences of this source, before `repeat`: whole groups, drawn by a hash of the prompt."""
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] | Positive = 0.0
    """The groups that leave the training set and join the evaluation: a share (0.01) or a number (500), drawn by a
    hash of the prompt. A prompt that is held out of one source is held out of all. Training sources only."""
    name: str | None = None
    """The name of all its rows in per-source metrics. Default: that of `set`, the row's `source`, the file's name."""

    @model_validator(mode="after")
    def _check_origin(self):
        if "" in (self.path, self.images):
            raise ValueError("path and images of a source must not be empty: an empty path would be the working folder")
        if self.path is None and self.set is None:
            raise ValueError("a source needs path, or set: one of the names that `fastrm data sets` lists")
        return self


class AgainstConfig(_Section):
    """Data that training must not contain: a benchmark, or a data source."""

    name: str | None = None
    """A benchmark that `fastrm eval MODEL bench:NAME` knows. Default: `path` is a data source in any known layout."""
    path: str | None = None
    """The benchmark's local copy. Default: read from the hub."""
    images: str | None = None
    """The folder, or tar/zip archive, that its image paths are relative to."""

    @model_validator(mode="after")
    def _check(self):
        if "" in (self.path, self.images):
            raise ValueError("path and images must not be empty: an empty path would be the working folder")
        if self.name is None and self.path is None:
            raise ValueError("data.decontaminate.against: an entry needs name, path, or both")
        return self


class DecontaminateConfig(_Section):
    """The rules by which records of benchmarks are removed from training."""

    against: Annotated[list[str | AgainstConfig], Field(min_length=1)]
    """The data that training must not contain: names of benchmarks, paths of data sources, or {name, path, images}."""
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
    """The data: sources, limits of sizes, and the way in which groups are made of rows."""

    train: list[SourceConfig] = []
    """Training sources, concatenated."""
    eval: list[SourceConfig] = []
    """Held-out sources, for evaluation."""
    prepared: str | None = None
    """The folder of the prepared set; several runs may share it. A set that was made under other settings is refused.
    Default: run.dir/prepared, which is made again when the settings or the files change."""
    max_tokens_per_group: Positive = 32768
    """The most tokens of a group's packed tree. A longer group is refused and named; nothing is ever truncated."""
    min_pixels: Positive = 56 * 56
    """Pixels to which smaller images are enlarged (the stock image processor's rule, Qwen)."""
    max_pixels: Positive = 28 * 28 * 1280
    """Pixels to which larger images are shrunk (the stock image processor's rule, Qwen)."""
    max_tiles: Annotated[int, Field(ge=1, le=64)] = 12
    """The most tiles into which InternVL cuts an image, the thumbnail not counted (the stock InternVL processor's rule
    and default). Qwen has min_pixels and max_pixels instead."""
    image_mean: Annotated[list[float], Field(min_length=3, max_length=3)] | None = None
    """The mean of red, green and blue (0 to 1) that the image processor subtracts. Default: the model's own."""
    image_std: Annotated[list[Annotated[float, Field(gt=0.0)]], Field(min_length=3, max_length=3)] | None = None
    """The deviations of red, green and blue that the image processor then divides by. Default: the model's own. Set
    mean and deviation only for a model that starts at random, on unusual images."""
    max_image_pixels: Positive = MediaLimits.max_pixels
    """Pixels of an image file above which it is refused before it is decoded."""
    max_image_bytes: Positive = MediaLimits.max_bytes
    """Bytes of an image file above which it is refused before it is read."""
    video_frames: Annotated[int, Field(gt=0, le=768)] = 32
    """The number of evenly spaced frames that a video is read as; a shorter video gives all of its frames. At most
    768, as in the stock processor."""
    video_min_pixels: Positive = 128 * 28 * 28
    """Pixels to which smaller frames of videos are enlarged (the stock video processor's rule and default)."""
    video_max_pixels: Positive = 768 * 28 * 28
    """Pixels to which larger frames of videos are shrunk (the stock video processor's rule and default). 32 frames of
    this size are 12,288 tokens."""
    frame_folder_fps: Annotated[float, Field(gt=0.0)] = 24.0
    """Frames per second of a video that is a folder of frames, which does not state them (the stock processor assumes
    24). Only Qwen2.5-VL's positions in time depend on it."""
    max_video_bytes: Positive = MediaLimits.max_video_bytes
    """Bytes of a video file above which it is refused before it is read."""
    max_video_seconds: Annotated[float, Field(gt=0.0)] = MediaLimits.max_video_seconds
    """Seconds of a video above which it is refused before it is decoded."""
    merge_groups: bool = True
    """Merge records with the same images and prompt into one group."""
    deduplicate: bool = True
    """Train once on records that agree in prompt, images, responses and preferences, whatever their source; the copies
    are named in the quarantine. False keeps copies; the paper says nothing of them."""
    decontaminate: DecontaminateConfig | None = None
    """Keep records of benchmarks out of training. The paper mentions no decontamination, so the default is off."""
    share_prefixes: bool = True
    """Pack responses as prefix trees, so that a shared prompt is computed once. False packs each response whole, for
    comparison."""
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
    """The reward head: linear layers with an activation between them."""

    layers: Annotated[int, Field(ge=1, le=5)] = 2
    """The number of linear layers: D -> D (layers - 1 times), then D -> 1. The paper has 2."""
    activation: Literal["none", "tanh", "relu", "silu"] = "silu"
    """The activation between the layers. The paper has SiLU."""
    bias: bool = True
    """Give all layers a bias."""
    new: bool = False
    """Draw a random head even if model.path holds a trained one, whose weights are then left out and named. `head:
    new` says the same with the other settings' defaults. Not stored in the export."""

    def stored(self) -> dict[str, Any]:
        """Return the settings that describe the head itself, as config.json of an export holds them."""
        return self.model_dump(exclude={"new"})


class TrainedTokenizer(_Section):
    """A small tokenizer that is trained on the data, for models that start from random weights."""

    train_vocab_size: Annotated[int, Field(ge=280)]
    """The size of a byte-level BPE that is trained on the text of data.train, with Qwen2.5-VL's special tokens and
    chat template."""


class ModelConfig(_Section):
    """The model: backbone, tokenizer, head, and the way in which layers are computed."""

    path: str | None = None
    """The folder or hub id of a backbone or of a reward model, whose head is then kept, whoever trained it; a run's
    folder, or a LoRA adapter's, which is merged into its base model (docs/models.md)."""
    init: dict[str, Any] | None = None
    """A transformers config (with model_type) to initialise at random instead of `path`."""
    tokenizer: str | TrainedTokenizer | None = None
    """The folder or hub id of the tokenizer; default: `path`. With `init`: a folder, or {train_vocab_size: n}."""
    head: Annotated[HeadConfig, _NEW_HEAD] = HeadConfig()
    """The reward head. Settings that are left out are taken from the files of a model that holds a trained head, and
    settings that contradict the files are refused. The same holds for anchor and pooling."""
    anchor: Literal["last_token", "end_of_turn", "before_padding"] = "last_token"
    """The token that the head reads: the last of the rendered response (for Qwen the newline after <|im_end|>), the
    last special token that ends the turn, or the last that is not the pad_token_id of config.json, as transformers'
    classes for sequence classification do. Stored in the export."""
    pooling: Literal["anchor", "mean"] = "anchor"
    """The state that the head reads: the anchor's, or the mean over all tokens up to it, prompt and images included
    (needs the last layer for every token). Stored in the export."""
    template_date: _Date | None = None
    """The date for a chat template that reads the clock, as 2026-07-26. Default: the day of the run's first start.
    Stored in the run, in the prepared set and in the export."""
    freeze: list[Literal["vision", "projector", "language"]] = []
    """Parts without gradient: the vision tower, its projector (Qwen: merger), the language model."""
    attention: Literal["auto", "sdpa", "flash", "flash_attn", "triton"] = "auto"
    """The attention backend: sdpa runs anywhere; flash = torch's varlen FlashAttention, CUDA with bf16 only;
    flash_attn = that of the flash-attn package (an extra); triton = our kernel, CUDA; auto follows `kernels`."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """The activations that the backward pass computes again instead of keeping them: none; selective: all of a layer
    but its matrix products and attention; full: whole layers. It saves memory and costs time."""
    fuse_projections: bool = False
    """Compute q, k and v in one matrix product, and gate and up in one. Files keep the stock names."""
    export_dtype: Annotated[Literal["auto", "fp32", "bf16"], _Dtype] = "auto"
    """The precision of the backbone in the exported model; auto = precision.dtype, that of its products. The head is
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
    """The coefficient of mean((r_w + r_l)^2), the zero-coefficient regulariser: an ablation in the paper."""
    length_normalization: bool = False
    """Divide each reward by log(response tokens + 1) before the loss. An ablation in the paper."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """The probability that a preference label is flipped."""
    ties: Literal["ignore", "half"] = "ignore"
    """The treatment of ties: ignore leaves them out; half makes each two opposite preferences of half weight."""


class OptimConfig(_Section):
    """The optimizer AdamW, its learning rate, and the size of a step."""

    lr: Annotated[float, Field(gt=0.0)] = 3e-6
    """The peak learning rate of AdamW. The default is the paper's best of 1e-5, 3e-6, 1e-6 and 3e-7."""
    betas: Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's decay rates of the first and the second moment; the defaults are AdamW's usual ones."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's eps, which is added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """The decay of weight matrices, as in AdamW; biases, norms and embeddings have none."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The learning rate after warm-up: half a cosine down to min_lr_ratio * lr, or constant."""
    warmup_ratio: Fraction = 0.1
    """The share of all steps over which the rate rises linearly from 0."""
    min_lr_ratio: Fraction = 0.0
    """The rate after the last step, as a share of lr (cosine)."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """The global gradient norm above which a step's gradient is scaled down to it; 0 = never."""
    batch_pairs: Positive = 128
    """Preferences of a step, over all ranks: it takes whole groups until it has so many. The paper has 128."""
    group_weight: Literal["preference", "group"] = "preference"
    """The weight of a preference. preference: each counts 1. group: each group counts 1, shared by its preferences."""
    tokens_per_pack: Positive = 32768
    """The token budget of one forward pass. It bounds the memory; the gradient of a step does not depend on it."""
    states: Literal["fp32", "8bit"] = "fp32"
    """The storage of AdamW's two moments: float32, or for the backbone's matrices torchao's 8-bit code."""


class PrecisionConfig(_Section):
    """The precision of products and weights."""

    dtype: Annotated[Literal["fp32", "bf16"], _Dtype] = "bf16"
    """The precision of matrix products: bf16 = bfloat16 (autocast), fp32 = float32."""
    weights: Annotated[Literal["auto", "fp32", "bf16"], _Dtype] = "auto"
    """The storage of the backbone's weight matrices: auto = float32 where they are trained; frozen ones stay bfloat16
    or float16 where their files have that and one process runs with dtype bf16, which changes no bit of any result.
    fp32 = float32 throughout. bf16 = bfloat16 with stochastically rounded updates, in half the memory. Norms, biases,
    embeddings and the head stay float32, and so do all gradients."""
    fp8: Annotated[Literal["off", "tensorwise", "rowwise", "rowwise_gw_hp"], _Off] = "off"
    """The FP8 recipe for large linear layers of the language model (torchao's recipes; needs dtype bf16, and compile:
    layers to be fast). tensorwise: one scale a tensor, so that a reward depends slightly on what else is in its pack.
    rowwise: one scale a token and an output; rewards do not depend on the pack. rowwise_gw_hp: rowwise with weight
    gradients in bfloat16; the nearest to bf16, with two thirds of the gain."""

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
    """The division of the training state over several ranks."""

    zero_stage: Literal[1, 2, 3] = 2
    """The stage of DeepSpeed ZeRO, which divides over the ranks: 1 the optimizer states, 2 also gradients, 3 also
    weights. One process divides nothing and does not use DeepSpeed."""


class Config(_Section):
    """The configuration of a run."""

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
    """The names here of keys of transformers' trainer, TRL, LLaMA-Factory and ms-swift, for a hint."""
    kernels: Literal["auto", "triton", "eager"] = "auto"
    """The implementation of head, loss and attention: triton = our kernels, CUDA; eager = PyTorch's own operations;
    auto = for each of them the one that was measured to be faster on this device, eager where none was."""
    compile: Annotated[Literal["off", "layers"], _Off] = "off"
    """The use of torch.compile: layers = decoder layers and vision blocks, for any number of tokens; off."""
    check_exactness: bool = True
    """Compare, before the first step, rewards of two of the run's own groups, an image among them if there are any,
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
        """Return the resolved configuration as YAML; loading it again gives an equal `Config`."""
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
