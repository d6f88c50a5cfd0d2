"""The settings of a server, and their defaults; needs no other package."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The settings of a server.

    Attributes:
        host, port: to listen at; port 0: a free one.
        token: that requests have to give as ``Authorization: Bearer TOKEN``; None: none.
        max_queue, window_ms: of `Scheduler`.
        max_body_bytes: of a request, counted while it is read.
        max_groups: in one request.
        image_root: the folder whose images and videos requests may name by path; None: no path is opened.
        allow_image_urls: fetch images that requests name by http or https URL.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    max_queue: int = 1024
    window_ms: float = 3.0
    max_body_bytes: int = 32 * 2**20
    max_groups: int = 64
    image_root: Path | None = None
    allow_image_urls: bool = False
