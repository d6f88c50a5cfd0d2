"""The requests of ``POST /v1/rewards``, made from groups, and its answers, read back.

A body is ``{"groups": [{"messages", "images": [data URI | URL], "responses": [text]}], "model"?}``; the answer is
``{"rewards": [[number] | {"error": {"code", "message"}}], "usage"}``, in the order of the groups.
"""

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fastrm.data.media.images import read_bytes
from fastrm.data.record import ImageRef
from fastrm.errors import DataError, GroupError, RecordError
from fastrm.limits import MediaLimits
from fastrm.rl.samples import ImageReader, read_prompt

MAX_BYTES = 24 * 2**20  # of one request; the server refuses 32 MiB before it has read them
_KINDS = {b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}  # by how the bytes begin; all others are sent as PNG

Result = list[float] | GroupError


@dataclass
class Request:
    """One request, and what came of it.

    Attributes:
        model: its name at the server; None: the first there.
        numbers: of the groups in the call.
        counts: the number of responses of each.
        results: for each group, when it is answered.
    """

    model: str | None = None
    numbers: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        model = b"" if self.model is None else b'"model":' + json.dumps(self.model).encode() + b","
        return b"{" + model + b'"groups":[' + b",".join(self.parts) + b"]}"


def make_requests(
    groups: Sequence[dict], max_groups: int, model: str | None = None
) -> Iterator[Request | tuple[int, GroupError]]:
    """Yield requests for all groups in order, each within both limits, and the groups that cannot be sent.

    Raises:
        DataError: if the groups are no list of objects.
    """
    if isinstance(groups, (str, bytes, Mapping)):
        raise DataError(f"groups: got {type(groups).__name__}, wanted a list of groups: score([group])")
    request, size, reader = Request(model), 0, ImageReader()
    for number, group in enumerate(groups):
        try:
            part, count = _encode(group, reader)
        except RecordError as error:
            name = group.get("id") if isinstance(group, Mapping) else None
            yield number, GroupError(number, name and str(name), error.code, error.message)
            continue
        if request.parts and (len(request.parts) == max_groups or size + len(part) > MAX_BYTES):
            yield request
            request, size = Request(model), 0
        request.numbers.append(number)
        request.counts.append(count)
        request.parts.append(part)
        size += len(part)
    if request.parts:
        yield request


def _encode(group: Mapping, reader: ImageReader) -> tuple[bytes, int]:
    """Return a group as JSON, with its images in it, and the number of its responses.

    Raises:
        RecordError: for what is no group, an image that cannot be read, or more bytes than a request may have.
    """
    responses = group.get("responses") if isinstance(group, Mapping) else None
    if not isinstance(responses, (list, tuple)) or not responses:
        raise RecordError("BAD_ROW", 'a group needs "responses", a list of texts that is not empty')
    key = "messages" if group.get("messages") is not None else "prompt"
    if group.get(key) is None:
        raise RecordError("BAD_ROW", 'a group needs "prompt" or "messages"')
    given = group.get("images")
    given = given if given is None or isinstance(given, (list, tuple)) else [given]
    _, messages, images = read_prompt(group[key], given, reader)
    sent = {name: value for name, value in group.items() if value is not None and name not in ("prompt", "images")}
    sent |= {"messages": messages, "responses": list(responses)}
    if images:
        sent["images"] = [image_url(image) for image in images]
    try:
        part = json.dumps(sent).encode()
    except (TypeError, ValueError) as error:
        raise RecordError("BAD_ROW", f"the group holds what JSON cannot: {error}") from error
    if len(part) > MAX_BYTES:
        raise RecordError("TOO_LARGE", f"the group has {len(part):,} bytes as JSON, limit {MAX_BYTES:,}; shrink images")
    return part, len(responses)


def image_url(image: bytes | str) -> str:
    """Return a URL itself, and an image's bytes or file as a data URI."""
    if isinstance(image, str):
        if image[:8].lower().startswith(("http://", "https://")):
            return image
        image = read_bytes(ImageRef(path=image), MediaLimits())
    kind = next((kind for head, kind in _KINDS.items() if image.startswith(head)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def read_answer(request: Request, answer: object) -> list[Result]:
    """Return the rewards of a request's groups, or why one has none.

    Raises:
        ValueError: saying what is wrong, if these are no rewards of that request.
    """
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list):
        raise ValueError('no list under "rewards"')
    if len(rewards) != len(request.counts):
        raise ValueError(f"rewards of {len(rewards)} groups, wanted {len(request.counts)}")
    results: list[Result] = []
    for values, count, number in zip(rewards, request.counts, request.numbers, strict=True):
        error = values.get("error") if isinstance(values, dict) else None
        if isinstance(error, dict):
            results.append(GroupError(number, None, str(error.get("code")), str(error.get("message"))))
            continue
        if not isinstance(values, list) or len(values) != count:
            raise ValueError(f"{len(values) if isinstance(values, list) else values!r} rewards, wanted {count}")
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values):
            raise ValueError(f"{values!r:.80}, which are no finite numbers")
        results.append([float(value) for value in values])
    return results
