"""Our own layout: one prompt, its responses, and preferences between them by index.

``{"id", "prompt": text or messages, "images": [...], "responses": [text, ...],
"preferences": [[winner, loser, margin?], ...], "source"}``; `id`, `images`, `source` and, for
scoring, `preferences` are optional.
"""

from reprlib import repr as brief

from fastrm.data.record import Preference, Record
from fastrm.data.sources.conversation import prompt_messages, read_turns, text_turn
from fastrm.data.sources.draft import Draft, answer, to_record
from fastrm.data.sources.keys import check_unread, key_names, unread_keys
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, any_path, no_path, row_media
from fastrm.data.sources.values import bad_row, check_list, check_number, check_text
from fastrm.errors import RecordError

KEYS = (("prompt", "question"), "responses", "preferences", *MEDIA_KEYS)


def matches(row: dict) -> bool:
    return "responses" in row


def parse(row: dict, resolve: Resolve) -> Draft:
    """See the module. Raises RecordError for a row that cannot be used."""
    prompt = row_prompt(row, resolve)
    texts = check_list(row.get("responses"), "responses", "a list of texts")
    names = [f"responses[{i}]" for i in range(len(texts))]
    responses = tuple(answer(prompt, check_text(text, name), name) for text, name in zip(texts, names, strict=True))
    return Draft(responses, _preferences(row.get("preferences", []), len(responses)))


def row_prompt(row: dict, resolve: Resolve) -> tuple:
    """The messages of a row's `prompt` (or `question`), text or messages, with the row's images."""
    key = "prompt" if "prompt" in row else "question"
    value = row.get(key)
    turns = read_turns(value, resolve, key) if isinstance(value, list) else [text_turn("user", value, key)]
    return prompt_messages(turns, row_media(row, resolve), strict=False)


def group_record(group: dict, index: int, *, allow_any_path: bool = True, require_preferences: bool = False) -> Record:
    """One group from the Python API, in this module's layout, as a record.

    Args:
        group: images are paths, bytes, data URIs or Pillow images.
        index: the group's position in the call; names it in errors and, without `id`, in the record.
        allow_any_path: local code may name any file; otherwise every path is refused.

    Raises:
        RecordError: the group cannot be used.
    """
    if not isinstance(group, dict):
        raise bad_row(f"groups[{index}]", group, "an object")
    group = {key: value for key, value in group.items() if value is not None}
    unread = unread_keys(group, KEYS)
    check_unread(group, unread, KEYS, is_file=False)
    if unread:
        names, wanted = ", ".join(f'"{name}"' for name in unread), ", ".join(key_names(KEYS))
        raise RecordError("UNKNOWN_KEY", f"the group has {names}, which is not read; remove it, or use one of {wanted}")
    draft = parse(group, any_path if allow_any_path else no_path)
    return to_record(
        draft,
        record_id=str(group.get("id", index)),
        source=str(group.get("source", "groups")),
        origin=f"groups[{index}]",
        require_preferences=require_preferences,
    )


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
