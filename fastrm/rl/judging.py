"""The reward of a generative judge that learns: for the form of its text, its verdict, and thinking that agrees.

The formula is R1-Reward's (arXiv 2505.02835; yfzhang114/r1_reward, openrlhf/models/remote_rm/math_verifier_mllm.py):
0.5 format + accuracy (1 + 0.5 consistency), with format and accuracy 0 or 1, and consistency 1, 0 or -1.
"""

from typing import NamedTuple

from fastrm.errors import ConfigError, DataError
from fastrm.prompts.forms import FORMS, agreement
from fastrm.prompts.spec import JudgeSpec, load_spec
from fastrm.prompts.verdicts import Verdict
from fastrm.rl.answers import extract_answer


class JudgeText(NamedTuple):
    """A text of a judge, read.

    Attributes:
        verdict: as the SPEC's parser reads it.
        is_formed: the text has exactly the form of `FORMS`.
        consistency: as `agreement`: 1, 0 or -1.
    """

    verdict: Verdict | None
    is_formed: bool
    consistency: int


class JudgeReward:
    """The reward of a text that compares two responses: format F + accuracy A + consistency A C.

    F is 1 if the text has exactly the SPEC's form, A is 1 if its verdict names the better response, and C is 1 or -1
    as its thinking ends for the response of the verdict or for the other one, 0 if it does not say; F and A are else 0.

        Rewards(scheme="judge", judge=JudgeReward("r1_reward"))
    """

    def __init__(self, spec: str | JudgeSpec, *, format: float = 0.5, accuracy: float = 1.0, consistency: float = 0.5):
        """Choose a judge and the three weights; the defaults are R1-Reward's.

        LLaVA-Critic-R1's are format 0.1, accuracy 0.9, consistency 0.

        Args:
            spec: a pairwise judge: a shipped SPEC's name, the path of one, or one that was read.

        Raises:
            ConfigError: for a SPEC that cannot be read, or of a judge that does not compare two responses.
        """
        self.spec = load_spec(spec) if isinstance(spec, str) else spec
        if self.spec.kind != "pairwise":
            raise ConfigError(
                f"spec: got {spec if isinstance(spec, str) else self.spec.parser!r}, whose kind is {self.spec.kind}; "
                "wanted a judge of kind pairwise, which says which of two responses is better"
            )
        self._form = FORMS[self.spec.parser]
        self._weights = format, accuracy, consistency

    @property
    def best(self) -> float:
        """The reward of a text that is right in all."""
        return sum(self._weights)

    def read(self, text: str, *, is_cut: bool = False) -> JudgeText:
        """Read a text of the judge.

        Args:
            is_cut: it ended at its longest length, and has a verdict only where that was written before.
        """
        verdict = self.spec.read(text, is_cut=is_cut)
        return JudgeText(verdict, self._form.is_kept(text), agreement(self._form, text, verdict))

    def value(self, text: str, is_right: bool) -> float:
        """Return the reward of a text, of which is known whether its verdict is right."""
        said, (format, accuracy, consistency) = self.read(text), self._weights
        return format * said.is_formed + is_right * (accuracy + consistency * said.consistency)

    def is_right(self, text: str, truth: str) -> bool:
        """Return whether the verdict of a text names the better response; a tie, or no verdict, does not.

        Args:
            truth: the place of the better response, 1 or 2, bare or as `extract_answer` finds it.

        Raises:
            DataError: for a place that is none.
        """
        place = extract_answer(truth).strip()
        if place not in ("1", "2"):
            raise DataError(f"true answer: got {truth!r:.80}, wanted the place of the better response, 1 or 2")
        return self.spec.parse(text) is Verdict(int(place))
