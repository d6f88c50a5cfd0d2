"""The options of `fastrm score`, `eval` and `serve` that come to them as objects; loads neither torch nor numpy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastrm.errors import ConfigError
from fastrm.limits import MediaLimits
from fastrm.storage import check_output


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """The ways to read the rows of a data file.

    Attributes:
        images: the folder or archive that the paths of images are relative to; None: the folder of the data file.
        data_format: the layout of the rows, or auto.
        columns: the file's names for keys, by the keys.
        ignore: keys that are metadata and are not reported.
    """

    images: str | None = None
    data_format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    ignore: Sequence[str] = field(default_factory=list)

    @property
    def as_source(self) -> dict:
        """The settings under their names in `SourceConfig`."""
        return {"images": self.images, "format": self.data_format, "columns": self.columns, "ignore": self.ignore}


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """The settings of models that score, and of their forward passes.

    Attributes:
        rows: the ways to read the data.
        tokens_per_pack: token budget of one forward pass.
        num_workers: processes that decode images ahead of the forward passes; 0: this one does.
        device, dtype, template_date, limits, check_exactness, normalize: as for `RewardModel.from_pretrained`.
    """

    rows: RowOptions = field(default_factory=RowOptions)
    tokens_per_pack: int = 32768
    num_workers: int = 1
    device: str = "auto"
    dtype: str = "auto"
    template_date: str | None = None
    limits: MediaLimits = field(default_factory=MediaLimits)
    check_exactness: bool = True
    normalize: bool = False


@dataclass(frozen=True)
class Outputs:
    """The files to write besides what is printed: figures, their picture, and a page."""

    json: Path | None = None
    png: Path | None = None
    report: Path | None = None

    def check(self) -> None:
        """Refuse files that cannot be written, before the work that they are for.

        Raises:
            StorageError: naming the file.
        """
        for path in filter(None, (self.json, self.png, self.report)):
            check_output(path)


@dataclass(frozen=True)
class ModelChoice:
    """The models, and the way to combine their rewards.

    Attributes:
        models: folders of reward models, or one ensemble file.
        combine: mean, accuracy or margin; None: the mean, or what the file says.
        validation: preferences that give the weights of accuracy and margin.
        route: ``text=MODEL``, or None.
        save: the file to write the ensemble to, or None.
        compare: two models stand side by side and are no ensemble.
    """

    models: tuple[Path, ...] = ()
    combine: str | None = None
    validation: str | None = None
    route: str | None = None
    save: Path | None = None
    compare: bool = False

    def check(self) -> None:
        """Refuse a choice that cannot work, before anything is loaded.

        Raises:
            ConfigError: for no model, a malformed route, or a validation file that is not used.
        """
        if not self.models:
            raise ConfigError("name a model: fastrm eval MODEL... DATA, or --scores FILE for somebody else's scores")
        if self.compare and (len(self.models) != 2 or self != ModelChoice(self.models, compare=True)):
            raise ConfigError(
                f"--compare sets two models side by side, which are no ensemble: got {len(self.models)}, wanted fastrm "
                "eval A B DATA --compare, without --ensemble, --validation, --route and --save-ensemble"
            )
        weighted = self.combine in ("accuracy", "margin")
        if weighted and self.validation is None:
            raise ConfigError(f"--ensemble {self.combine} takes its weights from --validation FILE; name one")
        if weighted and len(self.models) < 2:
            raise ConfigError(f"--ensemble {self.combine} needs two models or more, got {len(self.models)}")
        if self.validation is not None and not weighted:
            raise ConfigError("--validation is for the weights of --ensemble accuracy or margin; add one of them")
        _ = self.text_model

    @property
    def text_model(self) -> Path | None:
        """The model that scores inputs without images, or None.

        Raises:
            ConfigError: for a malformed route.
        """
        if self.route is None:
            return None
        kind, _, model = self.route.partition("=")
        if kind != "text" or not model:
            raise ConfigError(f"--route: got {self.route!r}, wanted text=MODEL, for inputs without images")
        return Path(model)


@dataclass(frozen=True)
class JudgeTexts:
    """The texts of a judge or critic: those that are there, or the place of new ones.

    Attributes:
        written: a file of texts to measure without generating; None: the SPEC's generator writes.
        generations: the file in which generated texts are kept; None: runs/judges/NAME.jsonl.
        given: a critic's texts are the critiques that rows hold themselves.
        votes, max_tokens, temperature: in the place of the SPEC's; with `written`, those of the run that wrote it.
    """

    written: Path | None = None
    generations: Path | None = None
    given: bool = False
    votes: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            ConfigError: naming them.
        """
        if self.written is not None and self.generations is not None:
            raise ConfigError("--from measures texts that are there, --generations keeps new ones; name one of them")
        if self.written is not None and self.given:
            raise ConfigError("--from measures texts that are there; leave --given-critiques out")
        if self.given and replace(self, given=False) != JudgeTexts():
            raise ConfigError("--given-critiques takes the rows' own; leave the options of generated texts out")
