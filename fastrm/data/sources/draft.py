"""The last step of every layout: responses and preferences, checked, as a `Record`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from fastrm.data.record import Message, Preference, Record, Response
from fastrm.data.sources.conversation import escaped, template_arguments, unescaped, without_placeholders
from fastrm.data.sources.media import Resolve
from fastrm.data.sources.values import check_number
from fastrm.errors import RecordError


@dataclass(frozen=True)
class Draft:
    """A row as its layout has read it, before it is checked.

    Attributes:
        scores: one for each response, instead of preferences, which `to_record` makes of them.
        strength: how much better the winner of the one preference is, where the row says so.
        left_out: errors of the parts of a row that are left out, while the rest is used.
        all_responses: all responses of the row, in order, where `left_out` names some; scoring takes them.
        places: of `responses` among `all_responses`.
        problem: the reason why the row has no preference; it can be scored nevertheless.
        names: names of the responses in messages; ``responses[i]`` without them.
        judgement: reads a judge's whole conversation, which the row is as others wrote it; may raise RecordError. None
            for other rows.
    """

    responses: tuple[Response, ...]
    preferences: tuple[Preference, ...] = ()
    scores: tuple[float, ...] | None = None
    strength: float = 0.0
    left_out: tuple[RecordError, ...] = ()
    all_responses: tuple[Response, ...] = ()
    places: tuple[int, ...] = ()
    problem: RecordError | None = None
    names: tuple[str, ...] = ()
    judgement: Callable[[], Response] | None = None


def answer(prompt: tuple[Message, ...], said: str | Message) -> Response:
    """Make a response to a prompt. `to_record` refuses an empty one where preferences are wanted.

    Args:
        said: its text, or the assistant's whole turn.
    """
    message = Message("assistant", (said,)) if isinstance(said, str) else said
    return Response((*prompt, message))


def read_draft(
    parse: Callable[[dict, Resolve], Draft],
    row: dict,
    resolve: Resolve,
    *,
    is_scored: bool,
    placeholders_are_text: bool = False,
) -> Draft:
    """Read a row by its layout's `parse`, with the chat template's arguments besides the messages.

    Args:
        is_scored: a placeholder in a response is text, as a policy may write it; in training it is an error.
        placeholders_are_text: they are, in prompts as well: the source says `images: none`.

    Raises:
        RecordError: the row cannot be used.
    """
    draft = parse(escaped(row) if placeholders_are_text else row, resolve)
    arguments = template_arguments(row)

    def finished(number: int, response: Response) -> Response:
        *messages, said = response.messages
        messages.append(without_placeholders(said, f"response {number}", refuse=not is_scored))
        if placeholders_are_text:
            if response.media:
                raise RecordError("IMAGE_COUNT", "the row has an image or a video, but its source says `images: none`")
            messages = [replace(message, fields=unescaped(message.fields)) for message in messages]
        return replace(response, messages=tuple(messages), arguments=response.arguments or arguments)

    # Responses that training leaves out are not checked for it.
    wanted = "all_responses" if is_scored and draft.all_responses else "responses"
    done = {wanted: tuple(finished(n, one) for n, one in enumerate(getattr(draft, wanted)))}
    if (read := draft.judgement) is not None:
        done["judgement"] = lambda: finished(0, read())
    return replace(draft, **done)


def judged(
    responses: Sequence[Response], preferences: Callable[[], tuple[Preference, ...]], names: Sequence[str] = ()
) -> Draft:
    """Return a draft with the preferences that a row states. An error in them does not keep it from being scored.

    Args:
        preferences: reads them; may raise RecordError.
    """
    draft = Draft(tuple(responses), names=tuple(names))
    try:
        return replace(draft, preferences=preferences())
    except RecordError as error:
        return replace(draft, problem=error)


def rated(responses: Sequence[Response], scores: Callable[[], Iterable[float]]) -> Draft:
    """Return a draft with a score for each response. An error in them does not keep it from being scored."""
    try:
        return Draft(tuple(responses), scores=tuple(scores()))
    except RecordError as error:
        return Draft(tuple(responses), problem=error)


def pair(chosen: Response, rejected: Response, row: dict) -> Draft:
    """Return a draft of two responses and one preference, with the row's `margin` if it has one."""

    def preference() -> tuple[Preference, ...]:
        return (Preference(0, 1, check_number(row["margin"], "margin") if "margin" in row else 0.0),)

    return judged((chosen, rejected), preference, ("chosen", "rejected"))


def to_record(
    draft: Draft, *, record_id: str, source: str, origin: str, require_preferences: bool, pairs: str = "all",
    margin: float | None = None,
) -> Record:  # fmt: skip
    """Convert a draft to a record.

    What a policy produces can be scored: empty responses, equal ones, one alone. Preferences need more.

    Args:
        require_preferences: False for scoring, whose records have every response and no preference.
        pairs: of scored responses, ``all``: a preference for each two, equal scores a tie; ``hard``: only
            the pair with the largest gap, the first best and the first worst where several are equal;
            ``ratings``: no pair, but the rating of each.
        margin: of a preference for each unit by which scores differ, or of its strength; None: no margin.

    Raises:
        RecordError: where preferences are required: the draft's own problem; EMPTY_RESPONSE; NO_PREFERENCE;
            NO_SCORES for ``hard`` and ``ratings`` without scores; IDENTICAL_RESPONSES for a preference between
            equal responses.
    """
    if not require_preferences:
        return Record(record_id, draft.all_responses or draft.responses, (), source, origin)
    if draft.problem is not None:
        raise draft.problem
    whole = draft
    if pairs != "all" and draft.scores is None:
        raise RecordError(
            "NO_SCORES", f"`pairs: {pairs}` needs scored responses, the row has none; leave `pairs` out for such rows"
        )
    if pairs == "hard":
        draft = _hardest(draft)
    preferences = _preferences(draft, pairs, margin or 0.0)
    if not preferences:
        raise RecordError(
            "NO_PREFERENCE",
            f"there is no preference between the responses (found {len(draft.responses)}); "
            "add `preferences` or scores, read the row for scoring only, or train on scores alone: pairs: ratings",
        )
    _check_not_empty(whole)
    for preference in preferences:
        winner, loser = draft.responses[preference.winner], draft.responses[preference.loser]
        if not (preference.tie or preference.is_rating) and winner == loser:
            raise RecordError(
                "IDENTICAL_RESPONSES",
                f"response {preference.winner} is preferred to response {preference.loser}, "
                "which is equal to it; remove the preference",
            )
    return Record(record_id, draft.responses, preferences, source, origin)


def _check_not_empty(draft: Draft) -> None:
    for number, response in enumerate(draft.responses):
        if not response.text.strip() and not response.messages[-1].fields:
            name = draft.names[number] if draft.names else f"responses[{number}]"
            raise RecordError("EMPTY_RESPONSE", f'"{name}" is empty; write or remove it')


def _preferences(draft: Draft, pairs: str, margin: float) -> tuple[Preference, ...]:
    if draft.scores is None:
        extra = margin * draft.strength
        return tuple(replace(p, margin=p.margin + extra) if extra and not p.tie else p for p in draft.preferences)
    if pairs == "ratings":
        return tuple(Preference(number, number, score) for number, score in enumerate(draft.scores))
    return tuple(_preference(a, b, draft.scores, margin) for a, b in combinations(range(len(draft.scores)), 2))


def _preference(a: int, b: int, scores: tuple[float, ...], margin: float) -> Preference:
    if scores[a] == scores[b]:
        return Preference(a, b, tie=True)
    winner, loser = (a, b) if scores[a] > scores[b] else (b, a)
    return Preference(winner, loser, check_number(margin * (scores[winner] - scores[loser]), "margin"))


def _hardest(draft: Draft) -> Draft:
    """Return a draft of the best and the worst response alone; of the first two if all are equally good."""
    best, worst = draft.scores.index(max(draft.scores)), draft.scores.index(min(draft.scores))
    kept = (best, worst) if best != worst else tuple(range(min(2, len(draft.scores))))
    return replace(
        draft, responses=tuple(draft.responses[i] for i in kept), scores=tuple(draft.scores[i] for i in kept)
    )
