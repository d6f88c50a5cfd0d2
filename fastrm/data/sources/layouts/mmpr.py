"""MMPR: flat rows whose question stands under its images.

InternVL's own loader puts ``<image>`` and a newline in front of a question that names no image [A]; in a
row of several images we do so once for each [ours].
"""

from fastrm.data.sources.draft import Draft
from fastrm.data.sources.layouts import flat
from fastrm.data.sources.media import MEDIA_KEYS, Resolve, image_refs
from fastrm.data.sources.values import check_text

KEYS = ("question", "chosen", "rejected", "margin", *MEDIA_KEYS)


def matches(row: dict) -> bool:
    return False  # its keys are those of `flat`: only the set's name tells them apart


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    question = check_text(row.get("question"), "question")
    num_images = len(image_refs(row.get("image"), resolve, "image"))
    if "<image>" not in question:
        question = "<image>\n" * num_images + question
    return flat.parse({**row, "question": question}, resolve)
