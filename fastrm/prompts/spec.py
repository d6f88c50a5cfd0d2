"""The SPEC of a judge or critic: one YAML file, as the shipped ones in specs/, or one of your own."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from fastrm.errors import ConfigError
from fastrm.prompts.forms import before_cut
from fastrm.prompts.verdicts import PAIRWISE, POINTWISE, Parser, Verdict
from fastrm.sections import NonEmpty, NonNegative, Positive, Section
from fastrm.yaml_files import lay_over, read_yaml, validate

PREFIX = "judge:"
_FIXED = frozenset({"messages", "model", "n", "stream"})  # of a request: what is asked, and how one text comes back


class GeneratorSection(Section):
    """The model that writes."""

    model: NonEmpty
    """A folder or hub id, which transformers loads here; with `url`, the model's name there."""
    url: NonEmpty | None = None
    """An OpenAI-compatible server, such as http://127.0.0.1:8000/v1: vLLM, SGLang, a vendor. Default: none."""
    key_env: NonEmpty = "OPENAI_API_KEY"
    """The environment variable with the server's key, if it wants one."""
    batch: Positive = 8
    """Texts that are written together here; with `url`, requests at a time."""
    timeout: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds after which an answer of the server must have come whole."""
    tries: Positive = 8
    """Tries of one request, where the server is away, overloaded, limits the rate or breaks off."""
    extra_body: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of each request to a `url`, as the server names them, above those that are sent otherwise; null leaves one
    out, as in {max_tokens: null, max_completion_tokens: 4096}."""

    @model_validator(mode="after")
    def _check(self):
        if self.extra_body and self.url is None:
            raise ValueError("extra_body: is sent to a server; leave it out, or set url")
        if fixed := sorted(_FIXED.intersection(self.extra_body)):
            raise ValueError(f"extra_body: {', '.join(fixed)}: is what the judge itself asks; leave it out")
        return self


class DecodingSection(Section):
    """The way in which texts are written."""

    max_tokens: Positive = 1024
    """The longest text in tokens; a longer one is cut, and has a verdict only where its tag, box, line or last sentence
    was written before that."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0: always the likeliest token."""
    seed: NonNegative = 0
    """The seed of drawing; of the order too where that is random."""


class JudgeSpec(Section):
    """A judge or critic: what it is shown, and how its verdicts are read."""

    kind: Literal["pairwise", "pointwise", "critic"] = "pairwise"
    """pairwise: a text compares two responses; pointwise: a text scores one; critic: a text is a critique of one, and a
    reward is read behind it."""
    parser: str = ""
    """The way to read verdicts (docs/judges.md). pairwise: r1_reward, boxed, better, better_in_answer; pointwise:
    score; critic: none."""
    prompt: NonEmpty
    """A jinja2 template of the user's turn, with `question`, and `first` and `second` (pairwise) or `response`
    (pointwise, critic). Images of the prompt come before it."""
    system: str = ""
    """The system turn; empty: none."""

    generator: GeneratorSection | None = None
    """The model that writes; default: none, for texts that are there already (--from)."""
    decoding: DecodingSection = DecodingSection()
    """The way in which it writes."""
    order: Literal["both", "as_given", "random", "round_robin", "bracket"] = "both"
    """The order in which a pairwise judge sees two responses: both, one after the other; as_given: as in the row;
    random: one of them, by the seed; round_robin: all ordered pairs of a row's responses, n (n - 1) of n; bracket: a
    single elimination between them, 2 (n - 1)."""
    votes: Positive = 1
    """Texts for each question; the majority decides. Of a critic: critiques of each response, whose rewards are
    averaged."""
    scorer: NonEmpty | None = None
    """The reward model of a critic, which reads a reward behind each critique; default: generator.model, a critic that
    fastrm trained."""

    @model_validator(mode="after")
    def _check(self):
        if self.votes > 1 and not self.decoding.temperature:
            raise ValueError("votes: more than one at temperature 0 are all the same; set decoding.temperature: 1.0")
        if self.kind != "pairwise" and self.order != "both":
            raise ValueError(f"order: a {self.kind} judge sees one response at a time; leave it out")
        known = {"pairwise": PAIRWISE, "pointwise": POINTWISE, "critic": {}}[self.kind]
        if self.kind == "critic" and self.parser:
            raise ValueError(f"parser: got {self.parser!r}; a critic writes no verdict: leave it out")
        if known and self.parser not in known:
            raise ValueError(f"parser: got {self.parser!r}; a {self.kind} judge has one of: {', '.join(known)}")
        if self.scorer is not None and self.kind != "critic":
            raise ValueError("scorer: reads what a critic writes; leave it out, or set kind: critic")
        return self

    @property
    def shown(self) -> tuple[str, ...]:
        """The names that its prompt has for the responses."""
        return ("first", "second") if self.kind == "pairwise" else ("response",)

    @property
    def gives_rewards(self) -> bool:
        """True if it gives a reward to each response of a row, which need no preferences then."""
        return self.kind != "pairwise" or self.order in ("round_robin", "bracket")

    @property
    def parse(self) -> Parser:
        """The parser itself; a critic has none."""
        return (PAIRWISE | POINTWISE)[self.parser]

    def read(self, text: str, *, is_cut: bool) -> Verdict | float | None:
        """Return what a text says, by the parser; nothing, if it was cut before the verdict was written.

        Released scripts do not know of cuts: `parse` is their rule.
        """
        whole = before_cut(self.parser, text) if is_cut else text
        return None if whole is None else self.parse(whole)


def shipped_names() -> list[str]:
    """Return the names of the SPECs that fastrm brings."""
    return sorted(file.name.removesuffix(".yaml") for file in files("fastrm.prompts").joinpath("specs").iterdir())


def load_spec(name: str) -> JudgeSpec:
    """Read a SPEC: a name of a shipped one, or the path of a YAML file.

    Raises:
        ConfigError: for a name that is neither, or a file with problems, each with its line.
    """
    if name in shipped_names():
        path = _shipped(name)
    elif not (path := Path(name)).is_file():
        raise ConfigError(
            f"{PREFIX}{name}: neither a shipped judge nor a file; wanted one of {', '.join(shipped_names())}, or the "
            "path of a YAML file (docs/judges.md)"
        )
    tree, places = read_yaml(path)
    if (base := tree.pop("extends", None)) is not None:
        if base not in shipped_names():
            raise ConfigError(f"{path}: extends: got {base!r}, wanted a shipped judge: {', '.join(shipped_names())}")
        below = read_yaml(_shipped(base))
        lay_over(JudgeSpec, below, (tree, places))
        tree, places = below
    return validate(JudgeSpec, tree, places, str(path))


def _shipped(name: str) -> Path:
    return Path(str(files("fastrm.prompts").joinpath("specs", f"{name}.yaml")))
