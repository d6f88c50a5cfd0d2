"""The keys of a row that are read, and the treatment of all others.

A layout declares the keys that it reads as `KEYS`; an entry that is a tuple names alternatives, of which the first
that a row has is read. Keys on METADATA may stand beside them and say nothing to the model. Every other key is
unread, and one of three things:

- It holds an image, a video or audio, by its bytes or by the name of a file: the row is refused (UNREAD_MEDIA),
  since the model would judge it blind. It is accepted where the row's media are read and it names one of them again.
- It is a misspelling of a key that the layout reads, another word for one that changes the prompt, or a text that
  other layouts put into the prompt: the row is refused (UNKNOWN_KEY).
- Anything else is counted and reported once for its file (key_tally.py).
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from reprlib import Repr

from PIL import Image

from fastrm.data.sources.media import MEDIA_KEYS, file_kind, media_kind
from fastrm.errors import RecordError

Keys = tuple[str | tuple[str, ...], ...]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys of any row that say what it is called and where it comes from.
_NAMES = _words("""
    id ID _id idx index uid uuid guid row_id sample_id question_id prompt_id image_id video_id conversation_id post_id
    contest contest_id source data_source dataset dataset_name ds_name origin_dataset origin_split split subset
    subset_name
""")
# Keys of any row that describe it and belong to no model's input.
_TOLD = _words("""
    meta metadata category task domain topic language lang license licence timestamp tstamp created_at date annotator
    annotator_id judge model models model_a model_b model_id model_name chosen_model rejected_model chosen_score
    rejected_score score_chosen score_rejected chosen_rating rejected_rating chosen_reason rejected_reason num_turns
""")
METADATA = _NAMES | _TOLD
# Among them the scores by which some sets chose: (of the chosen response, of the rejected one).
PAIR_SCORES = (
    ("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating"),
)  # fmt: skip
# Keys of any row that the chat template is given besides the messages (conversation.py).
RENDERED_KEYS = ("system", "history", "tools", "documents", "chat_template_kwargs")
# Keys of a turn that no template renders: settings of trainers, and notes of arenas and logs.
TURN_NOTES = METADATA | _words("""
    loss loss_scale loss_weight weight train num_tokens country hashed_ip header redacted state toxic turn_identifier
""")
# Keys of a turn that are known. The template is given them, and decides whether they are rendered or refused.
_TURN_KEYS = (
    _words("role content from value name tool_calls tool_call_id reasoning_content reasoning thinking function_call")
    | TURN_NOTES
)
_TEXT_KEYS = _words("type text value")  # keys of a part of the content that is text
_PART_KEYS = _TEXT_KEYS | _words("image image_url video video_url path url bytes detail")
# A rated response's text is under the first of these keys that it has.
RATED_TEXTS = ("text", "caption", "response", "completion", "content", "answer", "output")
# Other words for the keys of the layouts, by which the nearest key is found.
_OTHER_WORDS = {
    "system": "system_prompt system_message system_instruction sys_prompt",
    "tools": "functions tool_definitions available_tools",
    "images": """img imgs pic picture pictures photo photos image_path image_paths image_file image_files image_url
        image_urls img_path img_paths""",
    "videos": "video_path video_paths video_file video_url clip clips",
    "prompt": "query instruction input user_prompt user",
    "chosen": "better preferred accepted winner_response positive",
    "rejected": "worse dispreferred loser_response negative",
    "responses": "candidates answers outputs completions choices",
    "scores": "rewards ratings",
}
SYNONYMS = {word: key for key, words in _OTHER_WORDS.items() for word in words.split()}
# Keys whose synonyms are refused, because the model would read another prompt.
_CHANGE_THE_PROMPT = ("system", "tools", "images", "videos")
# Keys of a text that a question is asked about: trainers write it in front of the question, or behind it.
_BESIDE_THE_PROMPT = _words("context passage input")
# Keys of texts that are the prompt or a part of it; of lists of turns all but a last answer are.
_PROMPT_TEXTS = _words("prompt question instruction query message input") | frozenset(RENDERED_KEYS)
_ANSWERING = ("assistant", "gpt", "bot", "model")  # roles of a last turn that is an answer
_MAX_ITEMS = 1000  # the most items of a list or object that are searched for media
_MAX_DEPTH = 6
_NOT_PLAIN = frozenset("[]{},:#&*!|>'\"%@` ")  # characters for which YAML needs quotes around a key
brief = Repr()  # of values in messages
brief.maxstring = brief.maxother = 40


@functools.cache
def key_names(keys: Keys) -> tuple[str, ...]:
    """Return all names that a layout reads, with alternatives and RENDERED_KEYS."""
    own = [name for entry in keys for name in ((entry,) if isinstance(entry, str) else entry)]
    return (*own, *(name for name in RENDERED_KEYS if name not in own))


@functools.lru_cache(maxsize=4096)  # nearly all rows of a file have the same keys
def _split(names: tuple, keys: Keys) -> tuple[tuple[str, ...], tuple]:
    """Split the names of a row's keys into those that are read, and those that are neither read nor metadata."""
    read = {
        entry if isinstance(entry, str) else next((name for name in entry if name in names), None) for entry in keys
    }
    read.update(RENDERED_KEYS)
    return (
        tuple(name for name in names if name in read),
        tuple(name for name in names if name not in read and name not in METADATA),
    )


def read_keys(row: dict, keys: Keys) -> tuple[str, ...]:
    """Return the keys of a row that its layout reads, in the order of the row."""
    return _split(tuple(row), keys)[0]


def unread_keys(row: dict, keys: Keys, ignore: Sequence[str] = ()) -> dict[str, object]:
    """Return the keys of a row that its layout does not read and that are not metadata, with their values.

    Keys inside of turns, parts and rated responses are named like ``messages[].name``, each once.

    Args:
        keys: `KEYS` of the row's layout.
        ignore: names to leave out, nested ones as they are named here.
    """
    read, others = _split(tuple(row), keys)
    unread = {str(key): row[key] for key in others}
    for key in read:
        if isinstance(row[key], (list, tuple, dict)):
            for name, inner in _nested(key, row[key]):
                unread.setdefault(name, inner)
    return {name: value for name, value in unread.items() if name not in ignore} if ignore else unread


def without_nested(row: dict, ignore: Sequence[str]) -> dict:
    """Return the row without the ignored keys of its turns, which are named as `unread_keys` names them."""
    for name in ignore:
        key, _, inner = name.partition("[].") if "[]." in name else name.partition(".")
        value = row.get(key)
        if inner and isinstance(value, dict):
            row = {**row, key: {k: v for k, v in value.items() if k != inner}}
        elif inner and isinstance(value, (list, tuple)):
            left = [{k: v for k, v in i.items() if k != inner} if isinstance(i, dict) else i for i in value]
            row = {**row, key: left}
    return row


def check_unread(row: dict, unread: dict[str, object], keys: Keys, *, is_file: bool = True) -> None:
    """Refuse a row whose unread keys would change what the model reads.

    Args:
        is_file: errors name the settings of a data source; otherwise they are for a caller in Python.

    Raises:
        RecordError: UNREAD_MEDIA or UNKNOWN_KEY.
    """
    read_media = None
    for name, value in unread.items():
        if found := next(_media(value), None):
            read_media = _media_names(row, keys) if read_media is None else read_media
            if os.path.basename(found[1]) not in read_media:
                raise _unread_media(name, found, is_file)
    for name in row.keys() & _TOLD:
        if (found := next(_media(row[name]), None)) and not _holds_media(row, keys):
            raise _unread_media(name, found, is_file)
    for name, value in unread.items():
        # An alternative of a key that is read is no misspelling.
        near = misspelt(name, key_names(keys)) if name not in key_names(keys) else None
        near = near or _changes_the_prompt(row, name, value, keys)
        if near is not None:
            remedy = _remedy(name, near, is_file)
            raise RecordError("UNKNOWN_KEY", f'the key "{name}" is not read; did you mean "{near}"? {remedy}')
        if is_file and name in _BESIDE_THE_PROMPT and not _stands_in_the_prompt(row, name, value, keys):
            raise RecordError(
                "UNKNOWN_KEY",
                f'the key "{name}" holds a text that the prompt may be about, and is not read; write it into the '
                f"prompt, or leave it out with `{ignore_setting([name])}`",
            )


def _changes_the_prompt(row: dict, name: str, value: object, keys: Keys) -> str | None:
    """Return the key that an unread key is a synonym of, if without it the model would read another prompt."""
    meant = SYNONYMS.get(name)
    if meant == "prompt":
        # Whole conversations hold the prompt in `chosen` and `rejected`; texts would have it as a part of the answers.
        names = _alternatives(meant, keys)
        is_missing = bool(names) and not any(name in row for name in names)
        return meant if is_missing and value and not isinstance(row.get("chosen"), list) else None
    if meant not in _CHANGE_THE_PROMPT or not value:
        return None
    if meant in MEDIA_KEYS and (not isinstance(value, (str, list, tuple, dict)) or any(map(row.get, MEDIA_KEYS))):
        return None  # a number is no medium; beside media that are read the key may name them again
    return meant


def _stands_in_the_prompt(row: dict, name: str, value: object, keys: Keys) -> bool:
    """Return whether what a key holds is a part of the prompt that is read, or belongs to no prompt beside it."""
    if name in SYNONYMS and not any(key in row for key in _alternatives(SYNONYMS[name], keys)):
        return True  # of whole conversations it is the prompt once more
    read = [text for key in read_keys(row, keys) for text in _prompt_texts(key, row[key])]
    return all(any(text.strip() in other for other in read) for text in _texts(value))


def _prompt_texts(key: str, value: object) -> Iterator[str]:
    """Yield the texts of the prompt that a key which is read holds; an answer that quotes a text does not show it."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(turn, dict) for turn in value):
        roles = [turn.get("role", turn.get("from")) for turn in value]
        if all(roles):
            yield from _texts(value[:-1] if roles[-1] in _ANSWERING else value)
            return
    if key in _PROMPT_TEXTS:
        yield from _texts(value)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _alternatives(name: str, keys: Keys) -> tuple[str, ...]:
    """Return the alternatives of a key, itself among them; none if the layout does not read it."""
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in keys)
    return next((entry for entry in entries if name in entry), ())


@functools.lru_cache(maxsize=4096)
def misspelt(name: str, known: tuple[str, ...]) -> str | None:
    """Return the known key that a name misspells: one letter more, less, other or swapped, or other capitals."""
    same = [key for key in known if _plain(key) == _plain(name)]
    return next(iter(same + [key for key in known if _is_one_edit(name.lower(), key)]), None)


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the other key that a name most likely stands for, by spelling or meaning; None if none is near."""
    others = tuple(key for key in known if key != name)
    return misspelt(name, others) or (SYNONYMS.get(name) if SYNONYMS.get(name) in others else None)


def _remedy(name: str, near: str, is_file: bool) -> str:
    if "[]." in name or not is_file:
        return "Rename it, or remove it"
    return f"Rename it, map it with `columns: {{{near}: {name}}}`, or leave it out with `{ignore_setting([name])}`"


def _unread_media(name: str, found: tuple[str, str], is_file: bool) -> RecordError:
    kind, example = found
    near = "videos" if kind == "video" else "images"
    article = "an" if kind == "image" else "a"
    what = "audio, which no model here reads" if kind == "audio" else f"{article} {kind}, and is not read"
    shown = f" ({brief.repr(example)})" if example else ""
    return RecordError(
        "UNREAD_MEDIA", f'"{name}" holds {what}{shown}; the key is "{near}". {_remedy(name, near, is_file)}'
    )


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def _is_one_edit(a: str, b: str) -> bool:
    """Return whether two names of four letters or more differ by one letter, or by two swapped letters."""
    if min(len(a), len(b)) < 4 or abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    swapped = rest_a[:2] == rest_b[1::-1] and rest_a[2:] == rest_b[2:]
    return swapped or rest_a[1:] == rest_b[1:] or rest_a[1:] == rest_b or rest_a == rest_b[1:]


def _nested(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield the unread keys inside of a turn, a list of turns, or a list of rated responses."""
    for item in _turns(value):
        path = name if item is value else f"{name}[]"
        yield from _other(path, item, _TURN_KEYS)
        for key in ("content", "value"):
            if isinstance(item.get(key), (list, tuple)):
                for part in item[key]:
                    if isinstance(part, dict):
                        known = _TEXT_KEYS if part.get("type") == "text" else _PART_KEYS
                        yield from _other(f"{path}.{key}[]", part, known)
    if name == "responses" and isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, dict) and not is_turn(item):
                texts = {next((key for key in RATED_TEXTS if item.get(key) is not None), "text")}
                yield from _other("responses[]", item, texts | {"role", "score"})


def _turns(value: object) -> list[dict]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in items if is_turn(item)]


def is_turn(item: object) -> bool:
    """Return whether a value is a turn. Its role may be missing beside a tool call."""
    return isinstance(item, dict) and any(key in item for key in ("role", "from", "tool_calls"))


def _other(path: str, item: dict, known: frozenset[str] | set[str]) -> Iterator[tuple[str, object]]:
    for key, value in item.items():
        if value is None or key in known:
            continue
        # A part's `source` may be its image, as some APIs write it.
        if key not in METADATA or (not isinstance(value, str) and next(_media(value), None)):
            yield f"{path}.{key}", value


def _media(value: object, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield (kind, name or "") of the images, videos and audio inside of a value."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, Image.Image):
        yield "image", ""
    elif isinstance(value, str):
        if kind := file_kind(value):
            yield kind, value
        elif kind := media_kind(value):
            yield kind, ""
    elif isinstance(value, (bytes, bytearray)):
        if kind := media_kind(value):
            yield kind, ""
    elif isinstance(value, (dict, list, tuple)) and depth < _MAX_DEPTH:
        for item in islice(value.values() if isinstance(value, dict) else value, _MAX_ITEMS):
            yield from _media(item, depth + 1)


def _media_names(row: dict, keys: Keys) -> set[str]:
    """Return the names, without folders, of the files that the row's media name."""
    return {os.path.basename(name) for _, name in _media(_places_of_media(row, keys)) if name}


def _holds_media(row: dict, keys: Keys) -> bool:
    return next(_media(_places_of_media(row, keys)), None) is not None


def _places_of_media(row: dict, keys: Keys) -> list:
    """Return the values of a row that its media are read from: its media columns and its turns' parts."""
    read = read_keys(row, keys)
    turns = [turn for name in read for turn in _turns(row[name])]
    contents = [turn.get(key) for turn in turns for key in ("content", "value")]
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    return [
        *(row[name] for name in (*MEDIA_KEYS, "img_path") if name in read),
        *(
            [value for key, value in part.items() if key in _PART_KEYS]
            for part in parts
            if isinstance(part, dict) and part.get("type") != "text"
        ),
    ]


def ignore_setting(names: Iterable[str]) -> str:
    """Return the line of YAML by which a data source ignores these keys."""
    return f"ignore: [{', '.join(json.dumps(name) if set(name) & _NOT_PLAIN else name for name in names)}]"
