"""Zip and tar archives of millions of members: a compact index, and members read by position.

An archive may be in parts (``images.zip_aa``, ``images.zip_ab``): under the name ``images.zip`` it is read as the
file that they make together. Members are found by a hash of their name, 45 bytes each in memory; they are
read with positioned reads, so forked workers and threads can share an open archive.
"""

import functools
import glob
import io
import os
import posixpath
import struct
import weakref
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import accumulate
from posixpath import normpath
from typing import BinaryIO

import numpy as np

from fastrm.data.media.archive_members import (
    DEFLATED,
    LINK,
    LOCAL,
    NOT_A_FILE,
    OTHER_METHOD,
    BadArchive,
    Member,
    decode_name,
    members,
    name_hash,
)

ARCHIVE_SUFFIXES = (".zip", ".tar")
BLOCK_BYTES = 2**18  # the size of buffered reads while an archive is indexed

# A row of the index: the hash of a member's name, and the rest of `Member`.
_MEMBER = np.dtype(
    [("hash", "<u8"), ("place", "<u8"), ("num_stored", "<u8"), ("num_bytes", "<u8"), ("crc", "<u4"), ("kind", "u1")]
)
_ROW = struct.Struct("<QQQQIB")


class ArchiveError(Exception):
    """An error for a member that cannot be read; `problem` is MISSING, NOT_A_FILE or DAMAGED."""

    def __init__(self, problem: str, text: str):
        super().__init__(text)
        self.problem, self.text = problem, text


def archive_exists(path: str) -> bool:
    """Return whether there is an archive of this name, whole or in parts."""
    return bool(_parts(path))


def archive_status(path: str) -> tuple[tuple[str, int, int], ...]:
    """Return (path, modification time in ns, bytes) of each part: values that change when the archive does.

    Raises:
        FileNotFoundError: if there is no such archive.
    """
    parts = _parts(path)
    if not parts:
        os.stat(path)
    return tuple((part, status.st_mtime_ns, status.st_size) for part in parts for status in [os.stat(part)])


def read_member(path: str, member: str, check_size: Callable[[int], None]) -> bytes:
    """Read the bytes of a member.

    Args:
        check_size: called with the number of bytes before they are read; raises if they are too many.

    Raises:
        ArchiveError: it is missing, no regular file, or damaged.
        BadArchive: the archive is damaged.
        OSError: it cannot be opened.
    """
    return _open_archive(archive_status(path), path.lower().endswith(".zip")).read(member, check_size)


def folder_members(path: str, folder: str) -> list[str] | None:
    """Return the names of the regular files directly in a folder of an archive, each once, in no fixed order.

    The first call for an archive lists its folders, which reads its directory again; they are remembered.

    Returns:
        Names from the archive's root on; None if there is no such folder, or a file of this name.

    Raises:
        BadArchive: the archive is damaged.
        OSError: it cannot be opened.
    """
    return _open_archive(archive_status(path), path.lower().endswith(".zip")).folder(normpath(folder))


def open_member(path: str, member: str) -> BinaryIO:
    """Open a member of a zip archive of few members for reading from its start.

    Raises:
        OSError: there is no such archive or member, or it is damaged.
    """
    try:
        return zipfile.ZipFile(_PartsFile.buffered(archive_status(path))).open(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise OSError(f"{error}") from error


def member_names(path: str) -> Iterator[str]:
    """Yield the names of the regular files in an archive, in the order of its directory.

    Raises:
        BadArchive, OSError: it cannot be read.
    """
    with _PartsFile.buffered(archive_status(path)) as file:
        for member in members(file, path.lower().endswith(".zip")):
            if member.kind != NOT_A_FILE:
                yield normpath(member.name)


def _parts(path: str) -> list[str]:
    if os.path.exists(path):
        return [path]
    return sorted(part for part in glob.glob(glob.escape(path) + "_*") if os.path.isfile(part))


@functools.lru_cache(maxsize=32)
def _open_archive(status: tuple[tuple[str, int, int], ...], is_zip: bool) -> "_Archive":
    # The cache's key is the status, so that a replaced archive is indexed again.
    return _Archive(status, is_zip)


class _PartsFile(io.RawIOBase):
    """A seekable file over the parts of an archive."""

    def __init__(self, status: tuple[tuple[str, int, int], ...]):
        self._fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path, _, _ in status]
        self._ends = list(accumulate(size for _, _, size in status))
        self._place = 0
        weakref.finalize(self, _close_all, self._fds)

    @classmethod
    def buffered(cls, status) -> io.BufferedReader:
        return io.BufferedReader(cls(status), BLOCK_BYTES)

    @property
    def num_bytes(self) -> int:
        return self._ends[-1]

    def pread(self, size: int, place: int) -> bytes:
        """Read up to `size` bytes from a place on; fewer only at the end."""
        pieces = []
        while size > 0 and place < self.num_bytes:
            part = bisect_right(self._ends, place)
            start = self._ends[part - 1] if part else 0
            piece = os.pread(self._fds[part], min(size, self._ends[part] - place), place - start)
            if not piece:
                break
            pieces.append(piece)
            size, place = size - len(piece), place + len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.pread(len(buffer), self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.num_bytes}[whence]
        if base + offset < 0:
            raise OSError("seek before the start of the file")
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class _Archive:
    """An open archive and the index of its members."""

    def __init__(self, status: tuple[tuple[str, int, int], ...], is_zip: bool):
        self._status, self._file, self._is_zip = status, _PartsFile(status), is_zip
        rows = bytearray()
        with _PartsFile.buffered(status) as file:
            for member in members(file, is_zip):
                rows += _packed(member)
        table = np.frombuffer(rows, _MEMBER)
        # A stable sort: of several members of one name the last counts, as for unpacking tools.
        self._members = table[np.argsort(table["hash"], kind="stable")]
        self._hashes = np.ascontiguousarray(self._members["hash"])

    def read(self, name: str, check_size: Callable[[int], None]) -> bytes:
        member = self._find(name_hash(name))
        if member is not None and member["kind"] == LINK:
            member = self._find(member["place"])
        if member is None:
            raise ArchiveError("MISSING", "is not in the archive")
        if member["kind"] in (NOT_A_FILE, LINK):
            raise ArchiveError("NOT_A_FILE", "is not a regular file")
        if member["kind"] == OTHER_METHOD:
            raise ArchiveError("DAMAGED", "is neither stored nor deflated, or is encrypted; zip it again")
        num_bytes = int(member["num_bytes"])
        check_size(num_bytes)
        if self._is_zip:
            return self._read_zipped(member, name)
        return self._read_exactly(num_bytes, int(member["place"]))

    def folder(self, name: str) -> list[str] | None:
        """Return the files of a folder, see `folder_members`."""
        member = self._find(name_hash(name))
        if member is not None and member["kind"] != NOT_A_FILE:
            return None
        joined = self._folders.get(name_hash(name))
        if joined is None:
            return None if member is None else []
        files = joined.decode("utf-8", "surrogateescape").split("\0")
        return [posixpath.join(name, file) for file in dict.fromkeys(files)]

    @cached_property
    def _folders(self) -> dict[int, bytearray]:
        """The names of the files in each folder, joined by NUL, by the hash of the folder's name."""
        folders: dict[int, bytearray] = {}
        with _PartsFile.buffered(self._status) as file:
            for member in members(file, self._is_zip):
                if member.kind != NOT_A_FILE:
                    folder, name = posixpath.split(normpath(member.name))
                    names = folders.setdefault(name_hash(folder), bytearray())
                    names += b"\0" * bool(names) + name.encode("utf-8", "surrogateescape")
        return folders

    def _find(self, wanted) -> np.void | None:
        place = int(np.searchsorted(self._hashes, np.uint64(wanted), side="right")) - 1
        return self._members[place] if place >= 0 and self._hashes[place] == wanted else None

    def _read_exactly(self, num_bytes: int, place: int) -> bytes:
        data = self._file.pread(num_bytes, place)
        if len(data) != num_bytes:
            raise ArchiveError("DAMAGED", "is cut short: the archive ends inside it")
        return data

    def _read_zipped(self, member: np.void, name: str) -> bytes:
        place, num_bytes, num_stored = (int(member[key]) for key in ("place", "num_bytes", "num_stored"))
        header = self._read_exactly(LOCAL.size, place)
        signature, flags, name_bytes, extra_bytes = LOCAL.unpack(header)
        written = self._read_exactly(name_bytes, place + LOCAL.size)
        # Deflate never grows data by more than a few bytes for each 16 KiB block.
        if signature != b"PK\x03\x04" or num_stored > num_bytes + num_bytes // 1000 + 1024:
            raise ArchiveError("DAMAGED", "has no valid header in the archive; zip it again")
        if normpath(decode_name(written, flags)) != normpath(name):
            raise ArchiveError("DAMAGED", "has another name in the archive than in its directory; zip it again")
        data = self._read_exactly(num_stored, place + LOCAL.size + name_bytes + extra_bytes)
        if member["kind"] == DEFLATED:
            data = _inflate(data, num_bytes)
        if len(data) != num_bytes or zlib.crc32(data) != member["crc"]:
            raise ArchiveError("DAMAGED", "cannot be unpacked: its size or checksum is wrong; zip it again")
        return data


def _packed(member: Member) -> bytes:
    try:
        return _ROW.pack(name_hash(member.name), *member[1:])
    except struct.error as error:  # a number beyond 64 bits
        raise BadArchive(f'the place or size of "{member.name}" is in no file') from error


def _inflate(data: bytes, num_bytes: int) -> bytes:
    try:
        # One byte more than declared is enough to see that there is more.
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, num_bytes + 1)
    except zlib.error as error:
        raise ArchiveError("DAMAGED", f"cannot be unpacked: {error}; zip it again") from error
