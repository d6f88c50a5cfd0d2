"""The layouts that rows come in, and the detection of a row's layout.

A layout is a module with `KEYS`, the keys that it reads (see keys.py), `matches(row)`, which looks at keys and
kinds only, and `parse(row, resolve)`, which returns a `Draft` or raises `RecordError`. A layout whose records span
consecutive rows also has `continues(previous, row)` and `join(rows)`, which makes one row for `parse` of several. A row
comes in, and a draft of its record goes out. Open `povid.py` first, which is short.
"""

from collections.abc import Iterable
from types import ModuleType

from fastrm.data.sources.keys import key_names, nearest
from fastrm.data.sources.layouts import (
    arena,
    completions,
    flat,
    groups,
    helpsteer,
    ixc,
    json_text,
    judge,
    labelled,
    llamafactory,
    messages,
    mmpr,
    povid,
    rated,
    swift,
    thinking,
    trl,
)
from fastrm.errors import RecordError

# In the order of detection: the first layout that matches a row reads it.
LAYOUTS = {
    "llamafactory": llamafactory,
    "swift": swift,
    "povid": povid,
    "completions": completions,
    "ixc": ixc,
    "arena": arena,
    "judge": judge,
    "thinking": thinking,
    "rated": rated,
    "groups": groups,
    "labelled": labelled,
    "helpsteer": helpsteer,
    "mmpr": mmpr,
    "flat": flat,
    "trl": trl,
    "messages": messages,
    "json_text": json_text,
}
# Layouts whose records may span several rows.
JOINING = tuple(layout for layout in LAYOUTS.values() if hasattr(layout, "continues"))
# Keys under which trainers of policies keep the one response of a row.
_ONE_RESPONSE = ("response", "completion", "output", "answer")
# All keys that some layout reads: an unknown key may be meant for one of them.
ALL_KEYS = tuple(dict.fromkeys(key for layout in LAYOUTS.values() for key in key_names(layout.KEYS)))
FORMATS = ("auto", *LAYOUTS, "digits")


def keys_read_by(layouts: Iterable[str]) -> list[str]:
    """Return the keys that any of these layouts reads."""
    return list(dict.fromkeys(key for name in layouts for key in key_names(getattr(LAYOUTS.get(name), "KEYS", ()))))


def detect(row: dict) -> ModuleType:
    """Detect the layout of a row by its keys.

    Raises:
        RecordError: BAD_ROW if it is none of the known ones.
    """
    for layout in LAYOUTS.values():
        if layout.matches(row):
            return layout
    keys = ", ".join(f'"{key}"' for key in list(row)[:12]) or "none"
    one = next((key for key in _ONE_RESPONSE if isinstance(row.get(key), str)), None)
    near = {key: nearest(key, ALL_KEYS) for key in map(str, row) if key not in ALL_KEYS and key != one}
    meant = ", ".join(f'"{name}" for "{key}"' for key, name in near.items() if name)
    wanted = "wanted prompt with chosen and rejected, or, also for scoring, with a list of responses"
    if one is not None:
        wanted = f'one response stands in a list: "responses": [the text of "{one}"], for scoring; training needs two'
    hint = f"did you mean {meant}?" if meant else wanted
    raise RecordError("BAD_ROW", f"no known layout has the keys {keys}; {hint}")
