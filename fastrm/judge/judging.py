"""The ways to judge records whose costs are measured: a reward model's pass, a judge's texts, a critic's both."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastrm.config import ModelConfig
from fastrm.data.group import GroupSize, encode_group
from fastrm.data.record import Record
from fastrm.errors import ConfigError, DataError, RecordError
from fastrm.evaluate.models import open_models
from fastrm.evaluate.options import ModelChoice, ScoringOptions
from fastrm.forecast.flops import generation_flops, pass_flops
from fastrm.judge.command import make_writer, rounds
from fastrm.judge.critics import conversations, scorer_of
from fastrm.judge.generations import Generation
from fastrm.judge.local import LocalModel
from fastrm.judge.questions import Refusal, Written
from fastrm.model.architectures import meta_network
from fastrm.model.network import RewardNetwork
from fastrm.prompts.spec import JudgeSpec
from fastrm.ui import Display

PAIR, OF_GROUP, BRACKET = "pair", "group_of_8", "group_of_8_bracket"


class Work(NamedTuple):
    """The work of one judgement; None: not known."""

    tokens_generated: int | None
    tokens_read: int | None
    flops: int | None


class Judging(ABC):
    """A way to judge records, of which costs are measured.

    Attributes:
        ways: the names of what is judged: PAIR, OF_GROUP and, of a pairwise judge, BRACKET.
        warm_up: those that are judged once before anything is measured.
        device: that computes; None: somewhere else.
    """

    ways: tuple[str, ...] = (PAIR, OF_GROUP)
    warm_up: tuple[str, ...] = (PAIR, OF_GROUP)
    device: torch.device | None

    @abstractmethod
    def judge(self, way: str, record: Record) -> Any:
        """Return what judging a record gives; this is what is timed."""

    @abstractmethod
    def work_of(self, record: Record, judged: Any) -> Work:
        """Return the work that `judge` did."""


class RewardModelJudging(Judging):
    """A reward model, which scores a record in one packed pass; of an ensemble, each member does."""

    def __init__(self, model: str, options: ScoringOptions, display: Display, *, behind_critique: bool = False):
        """Load the model, as `fastrm eval` does.

        Args:
            behind_critique: as for `RewardModel.from_pretrained`.

        Raises:
            ConfigError, StorageError: for a model that cannot be used.
        """
        choice, self._budget = ModelChoice((Path(model),)), options.tokens_per_pack
        self._ensemble = open_models(choice, options, display, behind_critique=behind_critique)
        self.device = self._ensemble.models[0].network.device

    def judge(self, way: str, record: Record) -> Any:
        """Return the rewards of a record.

        Raises:
            DataError: for one that cannot be scored.
        """
        (found,) = self._ensemble.score_records([record], self._budget)
        if isinstance(found, RecordError):
            raise DataError(f"{record.origin}: {found.message} ({found.code})")
        return found

    def work_of(self, record: Record, judged: Any) -> Work:
        """Return the work of the pass of each model that scores the record, added up."""
        return _total([_work_of_pass(model.network, record) for model in self._ensemble.scoring(record)])


def _work_of_pass(network: RewardNetwork, record: Record) -> Work:
    """Return the work of one model's pass, whose tokens are those of the record's tree."""
    group = encode_group(record, network.encoder)
    size = GroupSize.of(group)
    paths = [len(response.tokens) for response in group.responses]
    images = [medium.height * medium.width for medium in size.media for _ in range(medium.frames)]
    pruned = network.pooling == "anchor"
    flops = pass_flops(network, size.num_tokens, size.num_attention_pairs, paths, images, pruned=pruned)
    return Work(0, size.num_tokens, flops)


def _total(works: Sequence[Work]) -> Work:
    return Work(*(None if None in part else sum(part) for part in zip(*works, strict=True)))


class JudgeJudging(Judging):
    """A generative judge, which writes texts; none of them is kept."""

    warm_up = (PAIR,)  # it runs all that a group runs, which takes long

    def __init__(self, spec: JudgeSpec, options: ScoringOptions):
        """Load the model, if the SPEC names no server.

        Args:
            options: whose device and dtype are the model's.

        Raises:
            ConfigError: for a model or URL that cannot be used.
        """
        self._specs = {PAIR: spec, OF_GROUP: spec}
        if spec.kind == "pairwise":
            self.ways = (PAIR, OF_GROUP, BRACKET)
            of_pair = spec.order if spec.order in ("as_given", "random") else "both"
            orders = {PAIR: of_pair, OF_GROUP: "round_robin", BRACKET: "bracket"}
            self._specs = {way: spec.model_copy(update={"order": order}) for way, order in orders.items()}
        self._writer = make_writer(spec, options)
        self._network, self.device = None, None
        if isinstance(self._writer, LocalModel):
            self.device = self._writer.device
            with suppress(ConfigError):  # transformers writes with more architectures than those that are counted here
                self._network = meta_network(self._writer.config, ModelConfig(path=spec.generator.model))

    def judge(self, way: str, record: Record) -> list[Written]:
        """Write all texts that judging a record takes.

        Raises:
            ConfigError, DataError: for a row that the judge cannot be shown.
            ServerError: for a server that gives no answer.
        """
        found: list[Generation] = []
        judged: list[Written] = []
        for questions in rounds(self._specs[way], [record], found):
            written = list(self._writer.write(questions))
            if refusal := next((one for one in written if isinstance(one, Refusal)), None):
                raise DataError(refusal.message)
            found += [Generation(one.question.id, one.question.order, one.text, one.is_cut) for one in written]
            judged += written
        return judged

    def work_of(self, record: Record, judged: list[Written]) -> Work:
        """Return the tokens of all texts and prompts, and the operations of each text by itself."""
        sizes = [one.size for one in judged]
        if None in sizes:
            return Work(None, None, None)
        flops = None
        if self._network is not None:
            flops = 0
            for one in judged:
                count = len(one.question.images)
                images = [one.size.image_tokens // count] * count if count else []
                flops += generation_flops(self._network, one.size.read, one.size.written, images)
        return Work(sum(size.written for size in sizes), sum(size.read for size in sizes), flops)


class CriticJudging(JudgeJudging):
    """A critic, which writes critiques and scores the conversations that end with them in one packed pass."""

    ways = (PAIR, OF_GROUP)

    def __init__(self, spec: JudgeSpec, options: ScoringOptions, display: Display):
        """Load the model that writes and the one that scores, which may be the same files.

        Raises:
            ConfigError, StorageError: for models that cannot be used.
        """
        super().__init__(spec, options)
        self._spec = spec
        self._scorer = RewardModelJudging(scorer_of(spec), options, display, behind_critique=True)

    def judge(self, way: str, record: Record) -> tuple[list[Written], Record, Any]:
        """Return the critiques of a record's responses, the conversations that end with them, and their rewards.

        Raises:
            ConfigError, DataError, ServerError: as of a judge, and for conversations that cannot be scored.
        """
        written = super().judge(way, record)
        critiques = [Generation(one.question.id, one.question.order, one.text) for one in written]
        (group,) = conversations(self._spec, [record], {record.id: critiques})
        return written, group, self._scorer.judge(way, group)

    def work_of(self, record: Record, judged: tuple[list[Written], Record, Any]) -> Work:
        """Return the work of writing and that of the pass, added up."""
        written, group, rewards = judged
        return _total([super().work_of(record, written), self._scorer.work_of(group, rewards)])
