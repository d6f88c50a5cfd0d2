"""The members of zip and tar archives, by their directories and headers."""

import hashlib
import io
import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from posixpath import normpath
from typing import BinaryIO, NamedTuple

# The kinds of members; only stored and deflated ones can be read.
NOT_A_FILE, STORED, DEFLATED, OTHER_METHOD, LINK = range(5)


class BadArchive(Exception):
    """An error for an archive that cannot be read as a whole."""


class Member(NamedTuple):
    """A member of an archive.

    Attributes:
        place: first byte of a tar member's data or of a zip member's local header; of a LINK the target's hash.
        num_stored, num_bytes: its sizes in the archive and unpacked.
        crc: its checksum in a zip archive, else 0.
        kind: NOT_A_FILE and so on.
    """

    name: str
    place: int
    num_stored: int
    num_bytes: int
    crc: int
    kind: int


def name_hash(name: str) -> int:
    """Return 64 bits that stand for a member's name, the same for `a/b` and `./a//b`."""
    digest = hashlib.blake2b(normpath(name).encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def members(file: BinaryIO, is_zip: bool) -> Iterator[Member]:
    """Yield the members of an archive in their order.

    Raises:
        BadArchive: its directory or headers are damaged.
    """
    return _zip_members(file) if is_zip else _tar_members(file)


def _tar_members(file: BinaryIO) -> Iterator[Member]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep all of them in memory
                if member.size < 0:  # a size in base 256 may be negative
                    raise BadArchive(f'"{member.name}" has {member.size:,} bytes')
                if member.islnk():
                    yield Member(member.name, name_hash(member.linkname), 0, 0, 0, LINK)
                else:
                    # A sparse member is stored in pieces, which one place cannot name.
                    is_file = member.isreg() and not member.issparse()
                    kind = STORED if is_file else NOT_A_FILE
                    yield Member(member.name, member.offset_data, member.size, member.size, 0, kind)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # OverflowError: a size that no file has
        raise BadArchive(f"{error}") from error


# PKWARE's APPNOTE.TXT, sections 4.3.7 (local header: here without what the directory repeats), 4.3.12 (central
# directory), 4.3.14 to 4.3.16 (its ends).
LOCAL = struct.Struct("<4s2xH18xHH")
_CENTRAL = struct.Struct("<4s4x2H4x3L3H4xLL")
_END = struct.Struct("<4s4x2x2xLL2x")
_END_64 = struct.Struct("<4s36xQQ")
_LOCATOR_64 = struct.Struct("<4s4xQ4x")
_MAX_COMMENT_BYTES = 65_535
_IN_EXTRA = 0xFFFF_FFFF


def _zip_members(file: BinaryIO) -> Iterator[Member]:
    """Yield the members that a zip file's central directory lists."""
    try:
        start, num_bytes, shift = _directory(file)
        file.seek(start)
        end = start + num_bytes
        while file.tell() < end:
            yield _central_member(file, shift)
    except struct.error as error:
        raise BadArchive("its directory is cut short") from error


def _directory(file: BinaryIO) -> tuple[int, int, int]:
    """Return first byte and size of the central directory, and the number of bytes in front of the archive."""
    total = file.seek(0, io.SEEK_END)
    tail_bytes = min(total, _END.size + _MAX_COMMENT_BYTES)
    file.seek(total - tail_bytes)
    tail = file.read(tail_bytes)
    found = tail.rfind(b"PK\x05\x06")
    if found < 0:
        raise BadArchive("it has no zip directory")
    end = total - tail_bytes + found
    _, num_bytes, place = _END.unpack_from(tail, found)
    if end >= _LOCATOR_64.size:
        file.seek(end - _LOCATOR_64.size)
        signature, _ = _LOCATOR_64.unpack(file.read(_LOCATOR_64.size))
        if signature == b"PK\x06\x07":
            # The zip64 end record stands right in front of its locator, wherever the file begins.
            end -= _LOCATOR_64.size + _END_64.size
            file.seek(end)
            signature, num_bytes, place = _END_64.unpack(file.read(_END_64.size))
            if signature != b"PK\x06\x06":
                raise BadArchive("it has no zip64 directory where it says")
    start = end - num_bytes
    if start < 0 or start < place:
        raise BadArchive("its directory does not fit into it")
    return start, num_bytes, start - place


def _central_member(file: BinaryIO, shift: int) -> Member:
    signature, flags, method, crc, num_stored, num_bytes, name_bytes, extra_bytes, comment_bytes, attributes, place = (
        _CENTRAL.unpack(file.read(_CENTRAL.size))
    )
    if signature != b"PK\x01\x02":
        raise BadArchive("its directory is damaged")
    name = decode_name(file.read(name_bytes), flags)
    extra = file.read(extra_bytes)
    file.seek(comment_bytes, io.SEEK_CUR)
    if _IN_EXTRA in (num_stored, num_bytes, place):
        num_bytes, num_stored, place = _zip64_values(extra, num_bytes, num_stored, place)
    file_type = stat.S_IFMT(attributes >> 16)  # 0 when the archive was not made on Unix
    kind = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}.get(method, OTHER_METHOD)
    if name.endswith("/") or file_type not in (0, stat.S_IFREG):
        kind = NOT_A_FILE
    elif flags & 1:  # encrypted
        kind = OTHER_METHOD
    return Member(name, place + shift, num_stored, num_bytes, crc, kind)


def _zip64_values(extra: bytes, *values: int) -> Iterator[int]:
    """Yield the values; those that do not fit 32 bits come from the zip64 field (id 1) of the extra data."""
    field, place = b"", 0
    while place + 4 <= len(extra):
        tag, size = struct.unpack_from("<HH", extra, place)
        if tag == 1:
            field = extra[place + 4 : place + 4 + size]
        place += 4 + size
    for value in values:
        if value == _IN_EXTRA:
            (value,), field = struct.unpack_from("<Q", field), field[8:]
        yield value


def decode_name(name: bytes, flags: int) -> str:
    """Return a name in a zip archive by the flags beside it."""
    return name.decode("utf-8", "surrogateescape") if flags & 0x800 else name.decode("cp437")
