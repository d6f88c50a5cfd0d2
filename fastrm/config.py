"""One YAML file plus `a.b=c` overrides -> a typed, checked `Config`.

Strict: a key that does not exist, a value of the wrong type, a duplicate key or a combination that
cannot work is a `ConfigError` that names the file and line (or the override) and, for a misspelt
key, the nearest one that exists. Relative paths are relative to the working directory.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fastrm.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# YAML 1.1 reads an unquoted `off` as false.
_Off = BeforeValidator(lambda value: "off" if value is False else value)


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, frozen=True
    )


class RunConfig(_Section):
    dir: str | None = None
    """Run folder: metrics, checkpoints, export. Default: runs/<name of the YAML file>."""
    seed: NonNegative = 0
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda if there is one, else cpu."""
    num_processes: Positive | None = None
    """Ranks to start on this machine, one for each GPU. Default: all GPUs, or 1 on a CPU. Under torchrun or
    the deepspeed launcher, that launcher decides."""


class SourceConfig(_Section):
    path: str
    """A .jsonl, .json or .parquet file, a folder of them, or digits:train / digits:eval."""
    format: Literal["auto", "groups", "flat", "trl", "llamafactory", "swift", "rated", "digits"] = "auto"
    """Layout of the rows; auto decides row by row from their keys."""
    images: str | None = None
    """Folder, or tar/zip archive, that image paths are relative to. Default: the file's folder."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Multiplies the loss weight of every preference of this source."""
    name: str | None = None
    """Name of all its rows in per-source metrics. Default: the row's own `source`, else the file's name."""


class DataConfig(_Section):
    train: list[SourceConfig] = []
    """Training sources, concatenated."""
    eval: list[SourceConfig] = []
    """Held-out sources."""
    max_tokens_per_group: Positive = 32768
    """A group whose packed tree is longer is refused and named; nothing is ever truncated."""
    min_pixels: Positive = 56 * 56
    """Images are enlarged to at least this many pixels (the stock image processor's rule)."""
    max_pixels: Positive = 28 * 28 * 1280
    """Images are shrunk to at most this many pixels (the stock image processor's rule)."""
    image_mean: Annotated[list[float], Field(min_length=3, max_length=3)] | None = None
    """Red, green and blue (0 to 1) that the image processor subtracts. Default: the model's own."""
    image_std: Annotated[list[Annotated[float, Field(gt=0.0)]], Field(min_length=3, max_length=3)] | None = None
    """What it divides by then. Set both for a model that starts at random, on unusual images only."""
    max_image_pixels: Positive = 50_000_000
    """An image file that declares more pixels is refused before it is decoded."""
    max_image_bytes: Positive = 64 * 2**20
    """An image file with more bytes is refused before it is read."""
    merge_groups: bool = True
    """Merge records with the same images and prompt into one group."""
    share_prefixes: bool = True
    """Pack responses as prefix trees. False packs each response whole, for comparison."""
    num_workers: NonNegative = 1
    """Processes that decode and tokenise ahead of the training step; 0 = in the training process."""

    @model_validator(mode="after")
    def _check(self):
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"data.min_pixels {self.min_pixels} is above data.max_pixels {self.max_pixels}")
        return self


class HeadConfig(_Section):
    layers: Annotated[int, Field(ge=1, le=5)] = 2
    """Linear layers: D -> D (layers - 1 times), then D -> 1."""
    activation: Literal["none", "tanh", "relu", "silu"] = "silu"
    """Between the layers."""
    bias: bool = True
    """Biases on all layers."""


class TrainedTokenizer(_Section):
    train_vocab_size: Annotated[int, Field(ge=280)]
    """Byte-level BPE of this size, trained on the text of data.train, with Qwen2.5-VL's special
    tokens and chat template. For models that start from random weights."""


class ModelConfig(_Section):
    path: str | None = None
    """Folder or hub id of a backbone, or folder of an exported reward model, whose head is then kept."""
    init: dict[str, Any] | None = None
    """A transformers config (with model_type) to initialise at random instead of `path`."""
    tokenizer: str | TrainedTokenizer | None = None
    """Folder or hub id; default: `path`. With `init`: a folder, or {train_vocab_size: n}."""
    head: HeadConfig = HeadConfig()
    anchor: Literal["last_token", "end_of_turn"] = "last_token"
    """Token that the head reads: the last of the rendered response (for Qwen the newline after
    <|im_end|>), or the last special token that ends the turn. Stored in the export."""
    freeze: list[Literal["vision", "projector", "language"]] = []
    """Parts without gradient: the vision tower's blocks, its merger, the language model."""
    attention: Literal["auto", "sdpa", "flash", "triton"] = "auto"
    """sdpa runs anywhere; flash = torch's varlen FlashAttention, CUDA with bf16 only; triton = our
    kernel, CUDA; auto follows `kernels`."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: nothing; everything of a layer but its
    matrix products and attention; or whole layers."""
    fuse_projections: bool = False
    """Compute q, k and v in one matrix product, and gate and up in one. Files keep the stock names."""

    @model_validator(mode="after")
    def _check(self):
        if (self.path is None) == (self.init is None):
            raise ValueError("set exactly one of model.path and model.init")
        if self.init is not None and "model_type" not in self.init:
            raise ValueError("model.init needs model_type, for example qwen2_5_vl or qwen2")
        if self.init is not None and self.tokenizer is None:
            raise ValueError("model.init needs model.tokenizer: a folder, or {train_vocab_size: n}")
        return self


class LossConfig(_Section):
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
    dtype: Literal["fp32", "bf16"] = "bf16"
    """bf16: matrix products in bfloat16 (autocast)."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Weight matrices of the backbone: float32, or bfloat16 with stochastically rounded updates, in half the
    memory. Norms, biases, embeddings and the head stay float32, and so do all gradients."""
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
    kernels: Literal["auto", "triton", "eager"] = "auto"
    """Head, loss and attention: triton = our kernels, CUDA; eager = PyTorch's own operations; auto = for
    each of them the one that was measured to be faster on this device, eager where none was."""
    compile: Annotated[Literal["off", "layers"], _Off] = "off"
    """layers: decoder layers and vision blocks through torch.compile, for any number of tokens."""
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
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `3e-6` is a number, as everyone who writes it means."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would read as numbers."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

# PyYAML lets these out of its converters, for example for 2020-13-45, 0b_ and !!bool x.
_NOT_YAML = (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML), and validate.

    Raises:
        ConfigError: naming the file and line, or the override, of every problem found.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    tree, places = _parse_yaml(text, str(path))
    for override in overrides:
        _apply_override(tree, places, override)
    if isinstance(tree.get("run", {}), dict):
        run = tree.setdefault("run", {})
        if run.get("dir") is None:
            run["dir"] = f"runs/{path.stem}"
    return _validate(tree, places, str(path))


def _parse_yaml(text: str, path: str) -> tuple[dict, dict[tuple, str]]:
    """Plain objects, and for every key path the `file:line` where it stands."""
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        places: dict[tuple, str] = {}
        if root is not None:
            _note_places(root, (), path, places, set())
        tree = loader.construct_document(root) if root is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except _NOT_YAML as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{path}: not valid YAML: {reason}; quote texts that look like numbers or dates") from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got a {type(tree).__name__}, wanted sections such as `model:` and `data:`")
    return tree, places


def _note_places(node: yaml.Node, prefix: tuple, path: str, places: dict[tuple, str], seen: set[int]) -> None:
    if id(node) in seen:
        # Aliases can nest into exponentially large documents; no configuration needs them.
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: YAML aliases are not accepted; repeat the value")
    seen.add(id(node))
    places.setdefault(prefix, f"{path}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = (*prefix, key_node.value)
            if key in places:
                raise ConfigError(f"{path}:{key_node.start_mark.line + 1}: key {_dotted(key)} stands twice")
            places[key] = f"{path}:{key_node.start_mark.line + 1}"
            _note_places(value_node, key, path, places, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_places(item, (*prefix, index), path, places, seen)


def _apply_override(tree: dict, places: dict[tuple, str], override: str) -> None:
    where = f"override {override!r}"
    key, separator, value = override.partition("=")
    names = [int(name) if name.isdecimal() else name for name in key.split(".")]
    if not separator or "" in names:
        raise ConfigError(f"{where}: wanted the form section.key=value, for example optim.lr=1e-5")
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except _NOT_YAML:
        raise ConfigError(f"{where}: the value is not valid YAML; quote it") from None
    node: Any = tree
    for depth, name in enumerate(names[:-1]):
        if isinstance(node, list) and isinstance(name, int) and name < len(node):
            node = node[name]
        elif isinstance(node, dict):
            if not isinstance(node.get(name), dict | list):
                node[name] = {}
                places[tuple(names[: depth + 1])] = where
            node = node[name]
        else:
            raise ConfigError(f"{where}: there is no {_dotted(names[: depth + 1])} to set")
    if isinstance(node, list) and not (isinstance(names[-1], int) and names[-1] < len(node)):
        raise ConfigError(f"{where}: there is no {_dotted(names)} to set")
    node[names[-1]] = parsed
    for stale in [place for place in places if place[: len(names)] == tuple(names)]:
        del places[stale]
    places[tuple(names)] = where


def _validate(tree: dict, places: dict[tuple, str], path: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(problem, places, path) for problem in error.errors()]
        # A union reports the same misfit once per member; one line is enough for its reader.
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _explain(problem: dict, places: dict[tuple, str], path: str) -> str:
    location = tuple(problem["loc"])
    known = location
    while known and known not in places:
        known = known[:-1]
    where = places.get(known, path)
    if problem["type"] == "extra_forbidden":
        section = _model_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), section, n=1, cutoff=0.4)
        hint = f"did you mean {_dotted((*location[:-1], near[0]))}?" if near else f"keys: {', '.join(section)}"
        return f"{where}: unknown key {_dotted(location)}; {hint}"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    if problem["type"] == "missing":
        return f"{where}: {_dotted(location)} is missing; it has no default"
    return f"{where}: {_dotted(location)}: got {problem['input']!r}; {problem['msg'].lower()}"


def _model_at(location: tuple) -> list[str]:
    """Field names of the section at a location such as ("data", "train", 0)."""
    section: Any = Config
    for name in location:
        if isinstance(name, int):
            continue
        if not (isinstance(section, type) and issubclass(section, BaseModel)) or name not in section.model_fields:
            continue
        annotation = section.model_fields[name].annotation
        arguments = [annotation, *getattr(annotation, "__args__", ())]
        section = next((a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)), section)
    return list(section.model_fields)


def _dotted(names) -> str:
    return ".".join(str(name) for name in names)
