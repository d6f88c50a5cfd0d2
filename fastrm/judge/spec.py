"""The SPEC of a judge: one YAML file, as the shipped ones in specs/, or one of your own."""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fastrm.errors import ConfigError
from fastrm.judge.verdicts import PAIRWISE, POINTWISE, Parser
from fastrm.sections import NonEmpty, Section
from fastrm.yaml_files import read_yaml, validate

PREFIX = "judge:"


class JudgeSpec(Section):
    """A judge: what it is shown, and how its verdicts are read."""

    kind: Literal["pairwise", "pointwise"] = "pairwise"
    """pairwise: a text compares two responses; pointwise: a text scores one."""
    parser: NonEmpty
    """The way to read verdicts (docs/judges.md). pairwise: r1_reward, boxed, better, better_in_answer; pointwise:
    score."""
    prompt: NonEmpty = Field()
    """A jinja2 template of the user's turn, with `question`, and `first` and `second` (pairwise) or `response`
    (pointwise). Images of the prompt come before it."""
    system: str = ""
    """The system turn; empty: none."""

    @model_validator(mode="after")
    def _check(self):
        known = PAIRWISE if self.kind == "pairwise" else POINTWISE
        if self.parser not in known:
            raise ValueError(f"parser: got {self.parser!r}; a {self.kind} judge has one of: {', '.join(known)}")
        return self

    @property
    def parse(self) -> Parser:
        """The parser itself."""
        return (PAIRWISE | POINTWISE)[self.parser]


def shipped_names() -> list[str]:
    """Return the names of the SPECs that fastrm brings."""
    return sorted(file.name.removesuffix(".yaml") for file in files("fastrm.judge").joinpath("specs").iterdir())


def load_spec(name: str) -> JudgeSpec:
    """Read a SPEC: a name of a shipped one, or the path of a YAML file.

    Raises:
        ConfigError: for a name that is neither, or a file with problems, each with its line.
    """
    if name in shipped_names():
        path = Path(str(files("fastrm.judge").joinpath("specs", f"{name}.yaml")))
    elif not (path := Path(name)).is_file():
        raise ConfigError(
            f"{PREFIX}{name}: neither a shipped judge nor a file; wanted one of {', '.join(shipped_names())}, or the "
            "path of a YAML file (docs/judges.md)"
        )
    tree, places = read_yaml(path)
    return validate(JudgeSpec, tree, places, str(path))
