"""Our own layout: one prompt, its responses, and preferences between them by index.

``{"id", "system", "tools", "prompt" or "messages": text or messages, "images": [...], "responses": [text, ...],
"preferences": [[winner, loser, margin?], ...], "source"}``; all but `prompt`, `responses` and, for training,
`preferences` are optional. ``"scores": [number, ...]``, one for each response, may stand in place of `preferences`.
A response may also be the assistant's turn, with `tool_calls` and the like, or a list of turns that ends with one and
follows the prompt.
"""

from reprlib import repr as brief

from fastrm.data.record import Preference, Record
from fastrm.data.sources.conversation import Turn, prompt_messages, read_turn, read_turns, response_message, text_turn
from fastrm.data.sources.draft import Draft, answer, judged, rated, read_draft, to_record
from fastrm.data.sources.keys import check_unread, key_names, unread_keys
from fastrm.data.sources.layouts import messages
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, any_path, row_media
from fastrm.data.sources.values import bad_row, check_list, check_number
from fastrm.errors import RecordError

PROMPT_KEYS = ("prompt", "question", "messages", "conversations", "conversation")
KEYS = (PROMPT_KEYS, "responses", "preferences", "scores", *MEDIA_KEYS)


def matches(row: dict) -> bool:
    return "responses" in row


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    turns, media = _prompt_turns(row, resolve), row_media(row, resolve)
    prompt = prompt_messages(row, turns, media)
    responses = []
    for i, value in enumerate(check_list(row.get("responses"), "responses", "a list of texts")):
        name = f"responses[{i}]"
        *before, last = _response_turns(value, resolve, name)
        mine = prompt_messages(row, [*turns, *before], media) if before else prompt
        responses.append(answer(mine, response_message(last, name)))
    if "scores" not in row:
        return judged(responses, lambda: _preferences(row.get("preferences", []), len(responses)))
    if row.get("preferences"):
        both = RecordError("BAD_PREFERENCE", 'the row has "preferences" and "scores"; keep one of them')
        return Draft(tuple(responses), problem=both)
    return rated(responses, lambda: _scores(row["scores"], len(responses)))


def row_prompt(row: dict, resolve: Resolve) -> tuple:
    """Return the messages of a row's prompt, text or messages under one of PROMPT_KEYS, with the row's images."""
    return prompt_messages(row, _prompt_turns(row, resolve), row_media(row, resolve))


def _prompt_turns(row: dict, resolve: Resolve) -> list[Turn]:
    key = next((key for key in PROMPT_KEYS if key in row), None)
    if key is None:
        raise RecordError("BAD_ROW", '"prompt" is missing, wanted text or a list of messages')
    value = row[key]
    return read_turns(value, resolve, key) if isinstance(value, (list, tuple)) else [text_turn("user", value, key)]


def _response_turns(value: object, resolve: Resolve, name: str) -> list[Turn]:
    if isinstance(value, dict):
        return [read_response(value, resolve, name)]
    return read_turns(value, resolve, name) if isinstance(value, list) else [text_turn("assistant", value, name)]


def read_response(value: dict, resolve: Resolve, name: str) -> Turn:
    """Read a response that is a turn; its role is the assistant's if it has none."""
    role = {} if any(value.get(key) is not None for key in ("role", "from")) else {"role": "assistant"}
    return read_turn(role | value, resolve, name)


def group_record(
    group: dict, index: int, *, require_preferences: bool = False, resolve: Resolve = any_path
) -> Record:
    """Convert one group of the Python API, in this module's layout, to a record.

    Args:
        group: images are paths, bytes, data URIs or Pillow images.
        index: the group's position in the call; names it in errors and, without `id`, in the record.
        resolve: opens the paths of its images and videos; default: every file that this process can read.

    Raises:
        RecordError: the group cannot be used.
    """
    if not isinstance(group, dict):
        raise bad_row(f"groups[{index}]", group, "an object")
    group = {key: value for key, value in group.items() if value is not None}
    layout_keys, read = (
        (KEYS, parse) if "responses" in group or not messages.matches(group) else (messages.KEYS, messages.parse)
    )
    unread = unread_keys(group, layout_keys)
    check_unread(group, unread, layout_keys, is_file=False)
    if unread:
        names, wanted = ", ".join(f'"{name}"' for name in unread), ", ".join(key_names(layout_keys))
        raise RecordError("UNKNOWN_KEY", f"the group has {names}, which is not read; remove it, or use one of {wanted}")
    draft = read_draft(read, group, resolve, is_scored=not require_preferences)
    return to_record(
        draft,
        record_id=str(group.get("id", index)),
        source=str(group.get("source", "groups")),
        origin=f"groups[{index}]",
        require_preferences=require_preferences,
    )


def _scores(value: object, num_responses: int) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != num_responses:
        raise bad_row("scores", value, f"a list of {num_responses} numbers, one for each response")
    return tuple(check_number(score, f"scores[{i}]") for i, score in enumerate(value))


def _preferences(value: object, num_responses: int) -> tuple[Preference, ...]:
    if not isinstance(value, list):
        raise bad_row("preferences", value, "a list of [winner, loser] or [winner, loser, margin]")
    return tuple(_preference(item, num_responses, f"preferences[{i}]") for i, item in enumerate(value))


def _preference(value: object, num_responses: int, name: str) -> Preference:
    if not isinstance(value, (list, tuple)) or len(value) not in (2, 3):
        raise RecordError("BAD_PREFERENCE", f'"{name}" is {brief(value)}, wanted [winner, loser, margin?]')
    winner, loser = value[:2]
    for index in (winner, loser):
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_responses:
            raise RecordError("BAD_PREFERENCE", f'"{name}" has index {brief(index)}, wanted 0 to {num_responses - 1}')
    if winner == loser:
        raise RecordError("BAD_PREFERENCE", f'"{name}" prefers response {winner} to itself; name two')
    return Preference(winner, loser, check_number(value[2], f"{name}[2]") if len(value) == 3 else 0.0)
