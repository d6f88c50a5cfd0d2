"""The images and videos that a request may name: bytes always, files and URLs only where the server allows them.

A data URI carries its bytes and opens nothing. A path is opened only below `image_root`, symbolic links resolved
first. A URL is fetched only with `allow_urls`, only from public addresses, and redirects are not followed. Each
medium is read as a whole here, below its limit of bytes, so that it is known by its content from here on.
"""

import functools
import http.client
import io
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from fastrm.data.media.images import read_bytes
from fastrm.data.record import ImageRef, MediaRef
from fastrm.data.sources.media import Resolve
from fastrm.errors import RecordError
from fastrm.limits import MediaLimits

_FETCH_SECONDS = 10.0  # for all URLs of a group, with the look-up of their hosts
_CHUNK = 1 << 16


# Addresses of IPv6 that stand for one of IPv4, in their last four bytes (RFC 6052).
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Return whether an address is one of the public internet, also where it stands for one of IPv4."""
    found = ipaddress.ip_address(address.partition("%")[0])
    meant = [found]
    if found.version == 6:
        meant += [inner for inner in (found.ipv4_mapped, found.sixtofour, *(found.teredo or ())) if inner is not None]
        meant += [ipaddress.ip_address(found.packed[-4:])] if found in _NAT64 else []
    return all(one.is_global and not one.is_multicast for one in meant)


class SlowMedium(Exception):
    """A URL that a group names, met by a thread that others wait for.

    Args:
        resolve: opens what the group names, and waits for the hosts of its URLs.
    """

    def __init__(self, resolve: Resolve):
        super().__init__("a URL, which takes a thread of its own")
        self.resolve = resolve


@dataclass(frozen=True)
class MediaPolicy:
    """The media that requests may name.

    Attributes:
        image_root: the folder of files; None: no path is opened.
        allow_urls: fetch http and https URLs.
        limits: of a medium's bytes.
        max_media: the number of files and URLs that one group may name.
        is_public: whether an address may be asked; the tests allow their own.
    """

    image_root: Path | None = None
    allow_urls: bool = False
    limits: MediaLimits = field(default_factory=MediaLimits)
    max_media: int = 64
    is_public: Callable[[str], bool] = is_public

    def resolver(self, *, waits: bool = False) -> Resolve:
        """Return the function that opens what one group names, for one use.

        Args:
            waits: fetch URLs; else `SlowMedium` is raised for one that may be fetched.
        """
        opened, seconds = 0, 0.0

        def resolve(place: str, kind: type[MediaRef] = ImageRef) -> MediaRef:
            nonlocal opened, seconds
            opened += 1
            if opened > self.max_media:
                raise RecordError("TOO_MANY_MEDIA", f"the group names more than {self.max_media} files or URLs")
            if self.allow_urls and not waits and _is_url(place):
                raise SlowMedium(self.resolver(waits=True))
            started = time.monotonic()
            data = self._read(place, kind, started + _FETCH_SECONDS - seconds)
            seconds += time.monotonic() - started
            return kind(data=data)

        return resolve

    def _read(self, place: str, kind: type[MediaRef], deadline: float) -> bytes:
        if _is_url(place):
            if not self.allow_urls:
                raise _refused(kind, "is a URL, which this server does not fetch (--allow-image-urls); send a data URI")
            return self._fetch(place, kind, deadline)
        if self.image_root is None:
            raise _refused(kind, "is a path, and this server opens none (--image-root); send a data URI")
        return self._read_file(place, kind)

    def _read_file(self, place: str, kind: type[MediaRef]) -> bytes:
        root = os.path.realpath(self.image_root)
        try:
            path = os.path.realpath(os.path.join(root, place))
        except (OSError, ValueError):  # a NUL, a surrogate, a circle of links
            raise _refused(kind, "is no path; correct it") from None
        if os.path.commonpath([root, path]) != root:
            raise _refused(kind, "leaves the folder of --image-root")
        try:
            return read_bytes(kind(path=path), self.limits)
        except RecordError as error:  # its text has the server's folder, which is no client's business
            raise RecordError(error.code, error.message.replace(os.path.join(root, ""), "")) from None

    def _fetch(self, url: str, kind: type[MediaRef], deadline: float) -> bytes:
        limit = self.limits.max_image_bytes if kind is ImageRef else self.limits.max_video_bytes
        try:
            connection = self._connect(url, kind, deadline)
            with connection.sock:
                parts = urlsplit(url)
                connection.request("GET", f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}")
                answer = connection.getresponse()
                if answer.status != 200:
                    text = "redirects are not followed" if 300 <= answer.status < 400 else "wanted 200"
                    raise _refused(kind, f"is a URL that answers with status {answer.status}; {text}", "FETCH")
                data = bytearray()
                while chunk := answer.read(_CHUNK):
                    data += chunk
                    if len(data) > limit:
                        raise _refused(kind, f"has more than {limit:,} bytes", "TOO_LARGE")
                return bytes(data)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _refused(kind, f"is a URL that cannot be fetched: {error}", "FETCH") from None

    def _connect(self, url: str, kind: type[MediaRef], deadline: float) -> http.client.HTTPConnection:
        """Open a connection to an address that was checked: a name that is asked again could have another."""
        parts = urlsplit(url)
        is_https = parts.scheme.lower() == "https"
        port = parts.port or (443 if is_https else 80)
        if not parts.hostname or parts.username is not None:
            raise _refused(kind, "is a URL without a host, or with a password")
        addresses = _addresses(parts.hostname, port, deadline)
        if not all(map(self.is_public, addresses)):
            raise _refused(kind, "is a URL of an address that is not public")
        sock = socket.create_connection((addresses[0], port), _left(deadline))
        if is_https:
            sock.settimeout(_left(deadline))
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=parts.hostname)
        connection = http.client.HTTPConnection(parts.hostname, port)
        connection.sock = sock
        connection.response_class = functools.partial(_TimedResponse, deadline=deadline)
        return connection


class _TimedResponse(http.client.HTTPResponse):
    """An answer that must be read by a deadline: a socket's own timeout begins again with every byte."""

    def __init__(self, sock: socket.socket, *arguments, deadline: float, **options):
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_TimedReader(sock, self.fp, deadline))


class _TimedReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, file: io.BufferedReader, deadline: float):
        # The file keeps the socket open, which http.client closes once it has the headers.
        self._sock, self._file, self._deadline = sock, file, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._sock.settimeout(_left(self._deadline))
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


def _is_url(place: str) -> bool:
    return place[:8].lower().startswith(("http://", "https://"))


def _addresses(host: str, port: int, deadline: float) -> list[str]:
    """Return the addresses of a host.

    The system's look-up has no time limit that could be set. A thread that has met the deadline is left to it.

    Raises:
        OSError: for a host without an address; TimeoutError at the deadline.
    """
    found: Future[list] = Future()

    def look_up() -> None:
        try:
            found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            found.set_exception(error)

    seconds = _left(deadline)
    threading.Thread(target=look_up, name="fastrm-look-up", daemon=True).start()
    try:
        return [address[4][0] for address in found.result(seconds)]
    except TimeoutError:
        raise TimeoutError(f"{host} is not found in time") from None


def _left(deadline: float) -> float:
    """Return the seconds until a deadline.

    Raises:
        TimeoutError: if it has passed.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("it takes too long")
    return seconds


def _refused(kind: type[MediaRef], text: str, problem: str = "PATH") -> RecordError:
    return RecordError(f"{kind.noun.upper()}_{problem}", f"the {kind.noun} {text}")
