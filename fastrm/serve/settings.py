"""The settings of a server, and their defaults; needs no other package."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from fastrm.errors import ConfigError
from fastrm.limits import MediaLimits


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The settings of a server.

    Attributes:
        host, port: to listen at; port 0: a free one.
        token: that requests have to give as ``Authorization: Bearer TOKEN``; None: none.
        workers: the number of processes with the models.
        max_queue, window_ms, deterministic: of `Scheduler`.
        max_body_bytes: of a request, counted while it is read.
        max_connections: that are open at a time, as far as the process may have as many files.
        header_seconds: that the headers of a request may take to arrive.
        body_seconds: that a body may take to arrive.
        max_groups: in one request.
        max_responses: of one group.
        image_root: the folder whose images and videos requests may name by path; None: no path is opened.
        media: limits of an image's and a video's bytes and pixels.
        allow_image_urls: fetch images that requests name by http or https URL.
        image_cache_bytes: of decoded images that are kept.
        reward_cache: the number of responses whose rewards are kept.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    workers: int = 1
    max_queue: int = 1024
    window_ms: float = 3.0
    deterministic: bool = False
    max_body_bytes: int = 32 * 2**20
    max_connections: int = 4096
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    max_groups: int = 64
    max_responses: int = 1024
    image_root: Path | None = None
    allow_image_urls: bool = False
    media: MediaLimits = field(default_factory=MediaLimits)
    image_cache_bytes: int = 256 * 2**20
    reward_cache: int = 100_000

    @property
    def max_bytes_in_flight(self) -> int:
        """The bytes that the bodies of all requests without an answer may have together: eight of the largest."""
        return 8 * self.max_body_bytes


def check_installed() -> None:
    """Refuse to serve without the packages of the extra `serve`.

    Raises:
        ConfigError: naming those that are missing.
    """
    missing = [name for name in ("fastapi", "prometheus_client", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'the server needs {", ".join(missing)}; pip install "fastrm[serve]"')
