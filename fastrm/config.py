"""The typed, checked `Config`: one YAML file plus `a.b=c` overrides.

Files are read strictly, as yaml_files.py says; the data's sections are in data_config.py, those of a step in
loss_config.py. Relative paths are relative to the working directory.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from fastrm.data_config import DataConfig
from fastrm.errors import ConfigError
from fastrm.lora_config import LoraConfig, check_lora
from fastrm.loss_config import LossConfig, OptimConfig
from fastrm.names import device_name, dtype_name
from fastrm.paradigm_config import CriticConfig, JudgeConfig, Paradigm, check_paradigm, with_loss
from fastrm.sections import NonEmpty, NonNegative, Positive, Section
from fastrm.stopping_config import ACCURACY, LOSS_PARTS, StoppingConfig, metric_names
from fastrm.yaml_files import apply_override, dump_yaml, lay_over, read_chain, validate

Run = TypeVar("Run", bound=BaseModel)
# YAML 1.1 reads an unquoted `off` as false.
_Off = BeforeValidator(lambda value: "off" if value is False else value)
_NEW_HEAD = BeforeValidator(lambda value: {"new": True} if value == "new" else value)

_Dtype = BeforeValidator(dtype_name)  # also accepts bfloat16 and torch.bfloat16
# JSON, and YAML that fastrm has written, hold a date as text.
_Date = Annotated[
    datetime.date,
    BeforeValidator(lambda value: datetime.date.fromisoformat(value) if isinstance(value, str) else value),
]


class RunConfig(Section):
    """The run: its folder, length, records and devices."""

    dir: NonEmpty | None = None
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
    eval_groups: Positive | None = None
    """The most groups of each evaluation set that an evaluation reads, the same ones every time, drawn by a hash.
    Default: all."""
    eval_at_start: bool = False
    """Evaluate before the first step too, as step 0."""
    save_every: NonNegative = 0
    """Steps between checkpoints; 0 = only after the last step and on interruption."""
    keep_checkpoints: Positive = 2
    """The number of newest checkpoints that are kept; the one with the best evaluation is kept too."""
    export: Literal["last", "best"] = "last"
    """The weights of the model that the run leaves: those of the last step, or of the best evaluation (by
    eval/accuracy, or by early_stopping.metric)."""
    early_stopping: StoppingConfig | None = None
    """The rule by which a run stops before its last step, as {patience: 3} or {metric: eval/loss, patience: 2}."""
    overwrite: bool = False
    """Start over in the folder of a run: what the run there has left is deleted when the first step is about to begin,
    its prepared data excepted. `--resume` goes on as ever. A folder that is no run is refused."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Trackers that get the rows of metrics.jsonl, which is always written, and the settings (docs/training.md)."""
    name: NonEmpty | None = None
    """The name of the run in trackers. Default: that of its folder."""
    project: NonEmpty = "fastrm"
    """The project of the run in trackers; MLflow calls it an experiment."""
    tags: list[NonEmpty] = []
    """Tags of the run in trackers."""
    device: Annotated[str, BeforeValidator(device_name)] = "auto"
    """The device: auto (a GPU if there is one), cpu, cuda, or one GPU by its number, such as cuda:1."""
    num_processes: Positive | None = None
    """The number of ranks to start on this machine, one for each GPU. Default: all GPUs, or 1 on a CPU. Under torchrun
    or the deepspeed launcher, that launcher decides."""

    def best_metric(self, row: dict) -> str:
        """Return the figure that chooses the best evaluation, of which `row` is one."""
        usual = ACCURACY if ACCURACY in row or not row else "eval/loss"
        return usual if self.early_stopping is None else self.early_stopping.metric


class HeadConfig(Section):
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


class TrainedTokenizer(Section):
    """A small tokenizer that is trained on the data, for models that start from random weights."""

    train_vocab_size: Annotated[int, Field(ge=280)]
    """The size of a byte-level BPE that is trained on the text of data.train, with Qwen2.5-VL's special tokens and
    chat template."""


class ModelConfig(Section):
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
    lora: LoraConfig | None = None
    """Train low-rank adapters and the head, and leave the backbone as it is; `lora: {}` takes all defaults. Checkpoints
    and the export then hold the adapters and the head, and not the backbone (docs/lora.md)."""
    quantize: Literal["nf4"] | None = None
    """The storage of the linear layers of the language model's layers under lora: nf4 = 4.5 bits a weight (QLoRA,
    Dettmers et al., arXiv 2305.14314), by bitsandbytes. Default: by precision.weights."""
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
        check_lora(self)
        return self


class PrecisionConfig(Section):
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


class EngineConfig(Section):
    """The division of the training state over several ranks."""

    zero_stage: Literal[1, 2, 3] = 2
    """The stage of DeepSpeed ZeRO, which divides over the ranks: 1 the optimizer states, 2 also gradients, 3 also
    weights. One process divides nothing and does not use DeepSpeed."""


class Config(Section):
    """The configuration of a run."""

    names_elsewhere: ClassVar[dict[str, str]] = {
        "learning_rate": "optim.lr", "num_train_epochs": "run.epochs", "output_dir": "run.dir",
        "per_device_train_batch_size": "optim.batch_pairs, of all ranks together",
        "train_batch_size": "optim.batch_pairs, of all ranks together",
        "gradient_accumulation_steps": "optim.batch_pairs, which packs add up to whatever they hold",
        "max_length": "data.max_tokens_per_group", "max_seq_length": "data.max_tokens_per_group",
        "cutoff_len": "data.max_tokens_per_group", "bf16": "precision.dtype", "torch_dtype": "precision.dtype",
        "gradient_checkpointing": "model.activation_checkpointing", "lr_scheduler_type": "optim.schedule",
        "lora_rank": "model.lora, rank", "lora_alpha": "model.lora, alpha", "lora_target": "model.lora, targets",
        "peft_config": "model.lora", "load_in_4bit": "model.quantize", "run_name": "run.name",
        "logging_steps": "run.log_every", "save_steps": "run.save_every", "eval_steps": "run.eval_every",
        "save_total_limit": "run.keep_checkpoints", "model_name_or_path": "model.path",
        "deepspeed": "engine.zero_stage", "overwrite_output_dir": "run.overwrite", "eval_on_start": "run.eval_at_start",
        "load_best_model_at_end": "run.export, as best", "metric_for_best_model": "run.early_stopping, as its metric",
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
    paradigm: Paradigm = "reward"
    """The kind of model that is trained (docs/paradigms.md): reward = one that rewards a response directly; critic =
    one that writes a critique first and rewards behind it; judge = one that writes which of two responses is better."""
    critic: CriticConfig | None = None
    judge: JudgeConfig | None = None
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    precision: PrecisionConfig = PrecisionConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, tree):
        return with_loss(tree)

    @model_validator(mode="after")
    def _check(self):
        if self.optim.tokens_per_pack < self.data.max_tokens_per_group:
            raise ValueError(
                f"optim.tokens_per_pack {self.optim.tokens_per_pack} is below "
                f"data.max_tokens_per_group {self.data.max_tokens_per_group}: the largest group would "
                "not fit a pack; raise the first or lower the second"
            )
        for key, unlike in (("fp8", ("off",)), ("weights", ("auto", "fp32"))):
            value = getattr(self.precision, key)
            if self.model.quantize is not None and value not in unlike:
                raise ValueError(
                    f"precision.{key} {value} with model.quantize {self.model.quantize}: they are for the same layers; "
                    f"set precision.{key}: {unlike[0]}, or remove model.quantize"
                )
        if frozen := set(self.optim.lr_parts) & set(self.model.freeze):
            raise ValueError(
                f"optim.lr_parts: {min(frozen)} has a learning rate, but model.freeze takes it out of training; leave "
                "it out of one of them"
            )
        check_paradigm(self)
        self._check_evaluations()
        self._check_ratings()
        return self

    def _check_evaluations(self) -> None:
        """Refuse what waits for an evaluation that the run does not make."""
        run, data = self.run, self.data
        wanted = {"run.export: best": run.export == "best", "run.early_stopping": run.early_stopping is not None}
        wanted = [name for name, is_set in (wanted | {"run.eval_at_start": run.eval_at_start}).items() if is_set]
        if wanted and not data.eval and not any(source.held_out for source in data.train):
            raise ValueError(f"{wanted[0]} needs evaluations, and there is no data.eval; name a source there")
        if run.early_stopping is None:
            return
        parts = LOSS_PARTS if self.paradigm == "critic" else ()
        made = metric_names(data.eval_names, (*self.loss.eval_figures, *parts))
        if (metric := run.early_stopping.metric) not in made:
            raise ValueError(
                f"run.early_stopping.metric: got {metric!r}, which no evaluation makes; there are {', '.join(made)}"
            )
        if not run.eval_every:
            raise ValueError(
                "run.early_stopping needs evaluations while the run trains, and run.eval_every 0 makes one after the "
                "last step; set run.eval_every"
            )

    def _check_ratings(self) -> None:
        """Refuse sources of ratings for a loss of preferences, and the other way round."""
        kind = self.loss.kind
        if kind == "plackett_luce" and self.optim.group_weight == "group":
            raise ValueError(
                "optim.group_weight group shares out the weight of preferences, and loss.kind plackett_luce has one "
                "term for each place of a ranking; set optim.group_weight: preference"
            )
        for name, source in (self.data.sources("train") | self.data.sources("eval")).items():
            if kind == "mse" and source.pairs != "ratings":
                raise ValueError(f"loss.kind mse is of ratings, and {name} gives pairs; set {name}.pairs: ratings")
            if kind != "mse" and source.pairs == "ratings":
                raise ValueError(
                    f"{name}.pairs: ratings gives no preferences, which loss.kind {kind} is of; set loss.kind: mse, or "
                    f"leave {name}.pairs out"
                )

    @property
    def prunes_last_layer(self) -> bool:
        """True if the last layer's output is needed at the anchors alone, so that little else of it is computed."""
        return self.model.pooling == "anchor" and self.paradigm == "reward"

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML; loading it again gives an equal `Config`."""
        return dump_yaml(self.model_dump(mode="json"))


def load_config(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or its content as a dict, and what it extends; apply `a.b=value` overrides, and validate.

    The values of overrides are YAML.

    Raises:
        ConfigError: naming the file and line, or the override, of every problem found.
    """
    return load_run(Config, path, overrides)


def load_run(model: type[Run], path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Run:
    """Read the file of a run as `model`: what its `extends` names, itself, then `a.b=value` overrides.

    A dict stands for a file's content. It has no name to make run.dir of, and what it extends is relative to the
    working folder.

    run.dir is each file's own, so that two runs never share a folder because one extends the other.

    Raises:
        ConfigError: naming the file and line, or the override, of every problem found.
    """
    *files, (_, tree, places) = read_chain(path)
    for _, own, own_places in reversed(files):
        if isinstance(tree.get("run"), dict):
            tree["run"].pop("dir", None)
            places.pop(("run", "dir"), None)
        lay_over(model, (tree, places), (own, own_places))
    for override in overrides:
        apply_override(tree, places, override)
    if isinstance(tree.get("run", {}), dict):
        run = tree.setdefault("run", {})
        if run.get("dir") is None:
            if isinstance(path, Mapping):
                raise ConfigError('config: run.dir is missing, which a file has by its name; add {"run": {"dir": ...}}')
            run["dir"] = f"runs/{Path(path).stem}"
    return validate(model, tree, places, "config" if isinstance(path, Mapping) else str(path))
