"""Rows as conversations for models that write: what a critic or a judge is shown, and what it learns to answer.

    critic   one conversation for each response: [prompt's media, SPEC's prompt with question and response], [critique]
    judge    one for each preference and order: [prompt's media, SPEC's prompt with question and two responses],
             [thinking and verdict, in the form that the SPEC's parser reads]

Rows become such conversations as they are read, and all that comes later takes them as any others. Grouping, held-out
prompts and benchmarks' rows are decided on the rows as they were (`Record.original`).
"""

import functools
import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import Repr

from fastrm.data.record import MediaRef, Message, Preference, Record, Response
from fastrm.errors import ConfigError, RecordError
from fastrm.paradigm_config import section_of
from fastrm.prompts.forms import FORMS
from fastrm.prompts.spec import load_spec
from fastrm.prompts.template import PromptTemplate
from fastrm.prompts.verdicts import PAIRWISE, Verdict, find_better, write_verdict

_MOST_TEXTS = 16  # as many as records of one prompt are joined to (MAX_MERGED_RESPONSES)
_TAGS = re.compile("</?think>", re.IGNORECASE)
_REASON = re.compile(r"\b(?:because|since|as)\s.*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?\n]")
_brief = Repr()
_brief.maxstring = 60


@dataclass(frozen=True)
class TextReading:
    """The settings by which rows become conversations of a critic or a judge.

    Attributes:
        kind: ``critic`` or ``judge``.
        prompt, system, parser: those of the SPEC; a critic has no parser.
        missing: of a critic: ``refuse`` or ``empty``, see `CriticConfig`.
        ties: of a critic: ``ignore`` or ``half``, see `LossConfig`; ignored, they need no critiques.
        order, seed: of a judge: see `JudgeConfig`.
    """

    kind: str
    prompt: str
    system: str = ""
    parser: str = ""
    missing: str = "refuse"
    ties: str = "ignore"
    order: str = "random"
    seed: int = 0

    def convert(self, record: Record, thinking: str = "", judgement: Response | None = None) -> Record:
        """Return the conversations that are trained on in place of a record; its `original` is the record.

        Args:
            thinking: of a judge about the record's two responses, in their order.
            judgement: a judge's whole conversation, which the row has as others wrote it.

        Raises:
            RecordError: NO_CRITIQUE; ONLY_TIES without a preference; BAD_VERDICT for a text in which the parser does
                not find the row's verdict; NOT_SHOWN for what a conversation in text and media cannot show.
            ConfigError: for a prompt that cannot be filled in.
        """
        if self.kind == "critic":
            responses, preferences = self._criticised(record), record.preferences
        elif judgement is not None:
            self._check_verdict(judgement.text, _stated(record))
            responses, preferences = (judgement,), (Preference(0, 0),)
        else:
            responses, preferences = self._judged(record, thinking)
        return replace(record, responses=tuple(responses), preferences=tuple(preferences), original=record)

    def parts(self, record: Record) -> Iterator[Record]:
        """Yield what `convert` made of a row: whole, or of a judge in parts of at most 16 texts.

        A judge's texts need not be in one group, and those of a list are as many as its pairs. The preferences of the
        row stand in the `original` of the first part alone, so that they are counted once.
        """
        original, number = record.original, len(record.responses)
        if self.kind == "critic" or number <= _MOST_TEXTS:
            yield record
            return
        for start in range(0, number, _MOST_TEXTS):
            yield replace(
                record,
                responses=record.responses[start : start + _MOST_TEXTS],
                preferences=tuple(
                    replace(one, winner=one.winner - start, loser=one.loser - start)
                    for one in record.preferences
                    if start <= one.winner < start + _MOST_TEXTS
                ),
                original=replace(original, preferences=()) if start else original,
            )

    @property
    def lesson(self) -> str:
        """The part that is missing in the texts that `count_bare` counts: ``critique`` or ``thinking``."""
        return "critique" if self.kind == "critic" else "thinking"

    def count_bare(self, record: Record) -> int:
        """Return how many of the texts of `convert` teach no writing: empty critiques, or verdicts without thinking.

        Of a critic, the texts of responses that are compared count.
        """
        if self.kind == "critic":
            return sum(not record.responses[number].text for number in self._compared(record))
        return sum(not self._thinking(response.text) for response in record.responses)

    def _thinking(self, text: str) -> str:
        """Return what a judge's text says besides its verdict."""
        if self.parser == "better" and (found := find_better(text)) is not None:
            # Published answers give their reasons behind it. Of its own sentence, only a reason that is named as one.
            own, *behind = _SENTENCE_END.split(text[found[0] :])
            others = (*_SENTENCE_END.split(text[: found[0]])[:-1], *_REASON.findall(own), *behind)
            return " ".join(part for part in others if re.search(r"\w", part))
        return _TAGS.sub("", FORMS[self.parser].thinking(text)).strip()

    def _compared(self, record: Record) -> list[int]:
        """Return the numbers of the responses that a preference which is trained on is about."""
        ties = self.kind == "critic" and self.ties != "ignore"
        return sorted({number for one in record.preferences if ties or not one.tie for number in one.responses})

    def _criticised(self, record: Record) -> list[Response]:
        missing = _without_critique(record, self._compared(record))
        if missing and self.missing == "refuse":
            raise RecordError(
                "NO_CRITIQUE",
                f"the row has no critique of {_names(record, missing)}; fill in chosen_reason and rejected_reason of a "
                "pair, or critiques of a list of responses, or set critic.missing: empty",
            )
        return [
            self._conversation(one, one.critique if one.critique.strip() else "", response=said)
            for one in record.responses
            for said in shown_texts([one])
        ]

    def _judged(self, record: Record, thinking: str) -> tuple[list[Response], list[Preference]]:
        if thinking and len(record.responses) != 2:
            raise RecordError(
                "BAD_ROW",
                f'"thinking" is about two responses, and the row has {len(record.responses)}; write a row for each two',
            )
        if not thinking:
            self._check_critiques(record)
        numbers: dict[tuple, int] = {}
        responses, preferences = [], []
        for one in record.preferences:
            if one.tie or one.is_rating:
                continue
            for again, shown in enumerate(self._orders(record, one, is_fixed=bool(thinking))):
                verdict = Verdict.FIRST if shown[0] == one.winner else Verdict.SECOND
                response = self._comparison([record.responses[number] for number in shown], verdict, thinking)
                if (number := numbers.setdefault(response.key, len(responses))) == len(responses):
                    responses.append(response)
                preferences.append(Preference(number, number, weight=one.weight, again=bool(again)))
        if not preferences:
            raise RecordError("ONLY_TIES", "every preference is a tie, and a judge learns which response is better")
        return responses, preferences

    def _check_critiques(self, record: Record) -> None:
        """Refuse a row with critiques of some of its responses: a judge would learn for which ones there are any."""
        compared = self._compared(record)
        missing = _without_critique(record, compared)
        if 0 < len(missing) < len(compared):
            raise RecordError(
                "NO_CRITIQUE",
                f"the row has no critique of {_names(record, missing)}, but of others that it is compared with, and "
                "which one has a critique would give the verdict away; fill it in, or leave out all of the row's",
            )

    def _orders(self, record: Record, preference: Preference, *, is_fixed: bool) -> list[tuple[int, int]]:
        given = tuple(sorted(preference.responses))
        if is_fixed:
            return [given]
        if self.order == "both":
            return [given, given[::-1]]
        # By texts and media, not by id or place: copies of a row, with its responses in any order, are shown in one
        # order, and can be recognised as copies. By texts alone two answers would always be shown in one order,
        # whatever the image of their question.
        by_text = tuple(sorted(given, key=lambda number: record.responses[number].text))
        first = record.responses[by_text[0]]
        texts = [question_text(first), *(record.responses[number].text for number in by_text)]
        texts += [_content_name(ref) for ref in first.media]
        is_turned = random.Random("\0".join([str(self.seed), *texts])).random() < 0.5
        return [by_text[::-1] if is_turned else by_text]

    def _comparison(self, shown: Sequence[Response], verdict: Verdict, thinking: str) -> Response:
        first, second = shown_texts(shown)
        if not thinking:
            named = [(number, one.critique.strip()) for number, one in enumerate(shown, 1)]
            thinking = "\n".join(f"{self._noun} {number}: {critique}" for number, critique in named if critique)
        text = write_verdict(self.parser, verdict, thinking, self._noun)
        self._check_verdict(text, verdict)
        return self._conversation(shown[0], text, first=first, second=second)

    @property
    def _noun(self) -> str:
        """The word by which the prompt calls a response: "Response", or in "Answer 1 is better" "Answer"."""
        found = re.search(r"\b(\w+) 1 is better", self.prompt)
        return found[1] if found else "Response"

    def _check_verdict(self, text: str, wanted: Verdict | None) -> None:
        found = PAIRWISE[self.parser](text)
        if found is None or wanted not in (None, found):
            read = "no verdict" if found is None else f"the verdict {found.name.lower()}"
            raise RecordError(
                "BAD_VERDICT",
                f"the judge's text {_brief.repr(text)} holds {read} for the parser {self.parser} of judge.spec; "
                "correct it, or set the SPEC that it was written for",
            )

    def _conversation(self, shown: Response, said: str, **texts: str) -> Response:
        template = _template(self.prompt, tuple(texts))
        asked = template.fill(question=question_text(shown), **texts)
        system = (Message("system", (self.system,)),) if self.system else ()
        user = Message("user", (*prompt_media(shown), asked))
        return Response((*system, user, Message("assistant", (said,))))


def _without_critique(record: Record, compared: Sequence[int]) -> list[int]:
    return [number for number in compared if not record.responses[number].critique.strip()]


def _names(record: Record, numbers: Sequence[int]) -> str:
    return ", ".join(f"response {number} ({_brief.repr(record.responses[number].text)})" for number in numbers)


def reading_of(config) -> TextReading | None:
    """Return how a configuration's `paradigm` reads rows; None for reward, which takes them as they are.

    Raises:
        ConfigError: for a SPEC that cannot be used, or is of another kind.
    """
    if (section := section_of(config)) is None:
        return None
    spec, kind = load_spec(section.spec), "critic" if config.paradigm == "critic" else "pairwise"
    if spec.kind != kind:
        raise ConfigError(
            f"{config.paradigm}.spec {section.spec}: is a SPEC of kind {spec.kind}, wanted one of kind {kind} "
            "(docs/judges.md)"
        )
    PromptTemplate(spec.prompt, spec.shown).fill(question="", **dict.fromkeys(spec.shown, ""))
    own = section.model_dump(include={"missing", "order", "seed"})
    if kind == "critic":
        own["ties"] = config.loss.ties
    return TextReading(config.paradigm, spec.prompt, spec.system, spec.parser, **own)


def question_text(response: Response) -> str:
    """Return the text of a response's prompt; of several turns, each behind its role."""
    turns = response.messages[:-1]
    if len(turns) == 1:
        return turns[0].text.strip()
    return "\n".join(f"{turn.role}: {turn.text.strip()}" for turn in turns)


def prompt_media(response: Response) -> tuple[MediaRef, ...]:
    """Return the images and videos of a response's prompt, in order."""
    return tuple(part for message in response.messages[:-1] for part in message.parts if isinstance(part, MediaRef))


def _content_name(ref: MediaRef) -> str:
    """Return what stays the same of a medium wherever its folder lies: its file's name, or a digest of its bytes."""
    if ref.data is not None:
        return hashlib.sha256(ref.data).hexdigest()
    return f"{Path(ref.path).name} {ref.member} {ref.span}"


def shown_texts(responses: Sequence[Response]) -> list[str]:
    """Return the texts of responses that a critic or a judge is shown together, behind the one prompt that they have.

    Raises:
        RecordError: NOT_SHOWN where the texts and the prompt's media are not all that there is: tools, documents or
            tool calls, a response with an image or a video, or responses to different prompts.
    """
    for response in responses:
        unshown = "tools or documents" if response.arguments else "tool calls or the like"
        if response.arguments or any(message.fields for message in response.messages):
            raise RecordError("NOT_SHOWN", f"the row has {unshown}, and only texts and media are shown; leave it out")
        if any(isinstance(part, MediaRef) for part in response.messages[-1].parts):
            raise RecordError(
                "NOT_SHOWN", "a response holds an image or a video, and only its text is shown; leave it out"
            )
    if len({response.prompt_key for response in responses}) > 1:
        raise RecordError(
            "NOT_SHOWN", "the responses have different prompts, and a judge is shown one; leave the row out"
        )
    return [response.text for response in responses]


def _stated(record: Record) -> Verdict | None:
    """Return the verdict that a record's preference states; None without one."""
    if not record.preferences:
        return None
    first = record.preferences[0]
    return Verdict.TIE if first.tie else (Verdict.FIRST if first.winner == 0 else Verdict.SECOND)


@functools.lru_cache(maxsize=4)
def _template(prompt: str, names: tuple[str, ...]) -> PromptTemplate:
    return PromptTemplate(prompt, names)
