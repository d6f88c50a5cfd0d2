"""The sections of the configuration that say what data is read: sources, limits, and the making of groups."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from fastrm.limits import MediaLimits
from fastrm.sections import NonNegative, Positive, Section


class SourceConfig(Section):
    """A source of preferences: files, a published set, or a set on the hub."""

    path: str | None = None
    """The rows: a .jsonl, .json or .parquet file, a folder of them, digits:train / digits:eval, or
    hub:owner/name[/config][:split]. With `set`: the set's folder, as published; default: read from the hub."""
    set: str | None = None
    """A published set by its name (`fastrm data sets` lists them), read as it was published."""
    format: Literal[
        "auto", "llamafactory", "swift", "povid", "completions", "ixc", "arena", "judge", "thinking", "rated",
        "groups", "labelled", "helpsteer", "mmpr", "flat", "trl", "messages", "json_text", "digits",
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
    pairs: Literal["all", "hard", "ratings"] | None = None
    """The preferences that scored responses give: all pairs, or hard: only the pair with the largest gap. ratings: no
    pairs, but each score by itself, for loss.kind mse; one response with a score is enough. Default: all, or what
    belongs to `set`."""
    margin: Annotated[float, Field(gt=0.0)] | None = None
    """The margin of a preference by the difference of two scores, which this factor multiplies (0.5: half of it), or by
    the strength that a row states. The loss subtracts it from the difference of the rewards. Default: no margin."""
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
        if self.margin is not None and self.pairs == "ratings":
            raise ValueError("margin is of pairs, and pairs: ratings makes none; leave one of them out")
        if self.path is None and self.set is None:
            raise ValueError("a source needs path, or set: one of the names that `fastrm data sets` lists")
        return self


class AgainstConfig(Section):
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


class DecontaminateConfig(Section):
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


# Sources that stand in a list, or in lists by the names of evaluation sets. pydantic puts the tags into its errors.
LIST, SETS = "<list>", "<sets>"
HELD_OUT = "held_out"
_SetName = Annotated[str, Field(pattern=r"^[\w.-]+$")]
_NamedSets = dict[_SetName, Annotated[list[SourceConfig], Field(min_length=1)]]
EvalSources = Annotated[
    Annotated[list[SourceConfig], Tag(LIST)] | Annotated[_NamedSets, Tag(SETS)],
    Discriminator(lambda value: SETS if isinstance(value, dict) else LIST),
]


class DataConfig(Section):
    """The data: sources, limits of sizes, and the way in which groups are made of rows."""

    train: list[SourceConfig] = []
    """Training sources, concatenated."""
    eval: EvalSources = []
    """Held-out sources, for evaluation: a list, or lists of them by names, as {easy: [{path: a.jsonl}], hard: [...]},
    which get figures of their own beside those of all."""
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
    max_image_pixels: Positive = MediaLimits.max_image_pixels
    """Pixels of an image file above which it is refused before it is decoded."""
    max_image_bytes: Positive = MediaLimits.max_image_bytes
    """Bytes of an image file above which it is refused before it is read."""
    video_frames: Annotated[int, Field(gt=0, le=768)] = 32
    """The number of evenly spaced frames that a video is read as; a shorter video gives all of its frames. At most
    768, as in the stock processor."""
    video_min_pixels: Positive = 128 * 28 * 28
    """Pixels to which smaller frames of videos are enlarged (the stock video processor's rule and default). Qwen3-VL
    bounds all frames of a video together: by video_frames times this, and so from above."""
    video_max_pixels: Positive = 768 * 28 * 28
    """Pixels to which larger frames of videos are shrunk (the stock video processor's rule and default). 32 frames of
    this size are 12,288 tokens."""
    frame_folder_fps: Annotated[float, Field(gt=0.0)] = 24.0
    """Frames per second of a video that is a folder of frames, which does not state them (the stock processor assumes
    24). Qwen2.5-VL's positions in time depend on it, and the times that Qwen3-VL
    writes."""
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
        for place, source in self.sources("eval").items():
            if source.repeat != 1.0 or source.held_out:
                raise ValueError(f"{place}: repeat and held_out are for data.train; remove them here")
        if HELD_OUT in self.eval:
            raise ValueError(f"data.eval.{HELD_OUT}: is the name of what data.train holds out; take another one")
        return self

    def sources(self, split: str) -> dict[str, SourceConfig]:
        """Return the sources of train or eval in order, by their places: data.train.0, or data.eval.hard.0."""
        found = getattr(self, split)
        lists = found if isinstance(found, dict) else {"": found}
        return {
            f"data.{split}.{name}{'.' * bool(name)}{number}": source
            for name, some in lists.items()
            for number, source in enumerate(some)
        }

    @property
    def eval_names(self) -> list[str]:
        """The names of the evaluation sets, with that of what training holds out; none for a list without names."""
        if not isinstance(self.eval, dict):
            return []
        return [*self.eval, *[HELD_OUT] * any(source.held_out for source in self.train)]

    @property
    def limits(self) -> MediaLimits:
        """The sizes above which an image or a video is refused."""
        return MediaLimits(self.max_image_bytes, self.max_image_pixels, self.max_video_bytes, self.max_video_seconds)
