"""ms-swift's preference rows: `messages` that end with the chosen response, and what is rejected.

Rejected is `rejected_response` (text, or the messages after the last user turn), or
`rejected_messages` (a whole conversation with its own `rejected_images`), or `rejected_images` alone
(the same conversation about other images). The older columns `query`, `response`, `history` and
`system`, and ms-swift's aliases of them, also work. ``<image>`` in the text is always the place of an
image.
"""

from fastrm.data.record import ImageRef, Response
from fastrm.data.sources.conversation import Turn, prompt_messages, read_turns, response_text, text_turn
from fastrm.data.sources.draft import Draft, answer, pair
from fastrm.data.sources.history import history_turns, with_system
from fastrm.data.sources.media import Resolve, image_refs, row_images
from fastrm.data.sources.values import bad_row, check_list
from fastrm.errors import RecordError

_MESSAGES = ("messages", "conversations", "conversation")
_QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
_RESPONSE = ("response", "answer", "output")


def matches(row: dict) -> bool:
    return any(key in row for key in ("rejected_response", "rejected_messages", "rejected_images"))


def parse(row: dict, resolve: Resolve) -> Draft:
    """See the module. Raises RecordError for a row that cannot be used."""
    turns = _chosen_turns(row, resolve)
    images = row_images(row, resolve)
    chosen = _response(turns, images, "chosen")
    rejected_images = _rejected_images(row, images, resolve)
    rejected = _response(_rejected_turns(row, turns, resolve), rejected_images, "rejected")
    return pair(chosen, rejected, row)


def _response(turns: list[Turn], images: list[ImageRef], name: str) -> Response:
    *prompt, last = turns
    text = response_text(last, name)
    return answer(prompt_messages(prompt, images, strict=True), text, name, strict=True)


def _chosen_turns(row: dict, resolve: Resolve) -> list[Turn]:
    key = next((key for key in _MESSAGES if key in row), None)
    if key is not None:
        return with_system(row, read_turns(row[key], resolve, key))
    query = next((key for key in _QUERY if key in row), "messages")
    response = next((key for key in _RESPONSE if key in row), "response")
    exchange = [
        text_turn("user", row.get(query), query),
        text_turn("assistant", row.get(response), response),
    ]
    return with_system(row, [*history_turns(row), *exchange])


def _rejected_turns(row: dict, chosen: list[Turn], resolve: Resolve) -> list[Turn]:
    if "rejected_messages" in row:
        return read_turns(row["rejected_messages"], resolve, "rejected_messages")
    value = row.get("rejected_response")
    if value is None:
        return chosen
    if isinstance(value, str):
        return [*chosen[:-1], text_turn("assistant", value, "rejected_response")]
    if not isinstance(value, list):
        raise bad_row("rejected_response", value, "text or a list of messages")
    turns = read_turns(check_list(value, "rejected_response", "messages"), resolve, "rejected_response")
    after_user = max((i for i, turn in enumerate(chosen) if turn.role == "user"), default=-1) + 1
    return [*chosen[:after_user], *turns]


def _rejected_images(row: dict, images: list[ImageRef], resolve: Resolve) -> list[ImageRef]:
    if "rejected_images" in row:
        return image_refs(row["rejected_images"], resolve, "rejected_images")
    if "rejected_messages" in row and images:
        # Copied images would be a guess, and no images a pair that is told apart by their absence.
        raise RecordError("IMAGE_COUNT", '"rejected_messages" comes without "rejected_images"; repeat the images there')
    return images
