"""Archives: in parts, larger than 4 GiB by their headers, with millions of members, damaged or hostile."""

import io
import itertools
import os
import random
import struct
import tarfile
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastrm.data.media import archives
from fastrm.data.media.archive_members import BadArchive
from fastrm.data.media.archives import (
    ArchiveError,
    archive_exists,
    archive_status,
    folder_members,
    member_names,
    open_member,
    read_member,
)

CONTENTS = {"a.png": b"red" * 50, "x/b.png": bytes(range(256)) * 9, "x/empty": b"", "ü.png": b"umlaut"}


def any_size(num_bytes):
    pass


def make_zip(path, contents=CONTENTS, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return str(path)


def make_tar(path, contents=CONTENTS):
    with tarfile.open(path, "w") as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def split(path, size):
    with open(path, "rb") as file:
        whole = file.read()
    os.unlink(path)
    for number, start in enumerate(range(0, len(whole), size)):
        with open(f"{path}_{number:05d}", "wb") as part:
            part.write(whole[start : start + size])
    return path


def check_contents(path, contents=CONTENTS):
    assert {name: read_member(path, name, any_size) for name in contents} == contents


def problem_of(path, name, check_size=any_size):
    with pytest.raises(ArchiveError) as caught:
        read_member(path, name, check_size)
    return caught.value.problem


FAR = 100 * 2**30  # beyond what 32 bits hold, also in units of tar's blocks and of 4 KiB pages


def far_zip(path):
    """A zip with members in front of and behind a hole of 100 GiB."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("near.png", b"near")
        archive.start_dir = FAR  # where the next member goes
        archive.writestr("x/far.png", b"far away")


def far_tar(path, format):
    """A tar whose first member is a hole of 100 GiB."""
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w", format=format) as archive:
        hole = tarfile.TarInfo("hole.bin")
        hole.size = FAR
        archive.addfile(hole)
        file.seek(FAR, io.SEEK_CUR)
        archive.offset += FAR
        for name, data in (("x/far.png", b"far away"), ("near.png", b"near")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def split_sparse(path, count):
    """Divide a file into parts of equal size, of which only what lies outside the hole is written."""
    size = path.stat().st_size
    with open(path, "rb") as whole:
        pieces = [(0, whole.read(4096))]
        whole.seek(FAR)
        pieces.append((FAR, whole.read()))
    path.unlink()
    for number, (start, stop) in enumerate(itertools.pairwise(size * n // count for n in range(count + 1))):
        with open(f"{path}_a{number}", "wb") as part:
            part.truncate(stop - start)
            for place, data in pieces:
                if start <= place < stop:
                    assert place + len(data) <= stop
                    part.seek(place - start)
                    part.write(data)


@pytest.mark.parametrize("kind", ["zip", "gnu.tar", "pax.tar"])
@pytest.mark.parametrize("parts", [1, 3])
def test_members_behind_100_gib_are_found_and_read(tmp_path, kind, parts):
    path = tmp_path / f"images.{kind}"
    if kind == "zip":
        far_zip(path)
    else:
        far_tar(path, tarfile.GNU_FORMAT if kind == "gnu.tar" else tarfile.PAX_FORMAT)
    assert path.stat().st_size > FAR and path.stat().st_blocks * 512 < 2**20
    if parts > 1:
        split_sparse(path, parts)
    read = {name: read_member(str(path), name, any_size) for name in ("near.png", "x/far.png")}
    assert read == {"near.png": b"near", "x/far.png": b"far away"}
    assert folder_members(str(path), "x") == ["x/far.png"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_size_of_a_member_of_100_gib_is_known_before_it_is_read(tmp_path, format):
    far_tar(tmp_path / "images.tar", format)

    def refuse(size):
        raise ValueError(f"{size} bytes")

    with pytest.raises(ValueError, match=f"^{FAR} bytes$"):
        read_member(str(tmp_path / "images.tar"), "hole.bin", refuse)


@pytest.mark.parametrize("make, suffix", [(make_zip, "zip"), (make_tar, "tar")])
@pytest.mark.parametrize("part_bytes", [None, 7, 100, 10**6])
def test_members_are_read_from_whole_archives_and_parts(tmp_path, make, suffix, part_bytes):
    path = make(tmp_path / f"images.{suffix}")
    if part_bytes:
        split(path, part_bytes)
    assert archive_exists(path)
    check_contents(path)
    assert sorted(member_names(path)) == sorted(CONTENTS)
    assert read_member(path, "./x//b.png", any_size) == CONTENTS["x/b.png"]
    assert problem_of(path, "absent.png") == "MISSING"


@pytest.mark.parametrize("make, suffix", [(make_zip, "zip"), (make_tar, "tar")])
def test_folder_members_are_the_files_directly_in_a_folder(tmp_path, make, suffix):
    path = make(tmp_path / f"a.{suffix}", {"v/2": b"", "./v//1": b"", "v/w/3": b"", "va/4": b"", "v/2\u00fc": b""})
    assert sorted(folder_members(path, "v/")) == ["v/1", "v/2", "v/2\u00fc"]
    assert all(read_member(path, name, any_size) == b"" for name in folder_members(path, "v"))
    assert folder_members(path, "./v/w") == ["v/w/3"]
    assert folder_members(path, "v/2") is folder_members(path, "absent") is None


def test_folder_entry_without_files_is_an_empty_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("v/", b"")
    assert folder_members(str(tmp_path / "a.zip"), "v") == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_folder_members_are_listed_once_for_all_folders(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("v/1", "v/1", "w/1"):
            archive.writestr(name, b"")
    path, listings = str(tmp_path / "a.zip"), []
    members = archives.members
    read_member(path, "v/1", any_size)
    monkeypatch.setattr(archives, "members", lambda *args: listings.append(args) or members(*args))
    assert folder_members(path, "v") == ["v/1"] and folder_members(path, "w") == ["w/1"]
    assert len(listings) == 1


def test_stored_members_are_read(tmp_path):
    check_contents(make_zip(tmp_path / "a.zip", compression=zipfile.ZIP_STORED))


def test_zip64_headers_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    path = make_zip(tmp_path / "a.zip")
    with open(path, "rb") as file:
        assert b"PK\x06\x06" in file.read()  # zip64 end of the directory
    check_contents(path)
    split(path, 50)
    check_contents(path)


def test_zip_behind_other_data_is_read(tmp_path):
    path = make_zip(tmp_path / "a.zip")
    with open(path, "rb") as file:
        whole = file.read()
    with open(path, "wb") as file:
        file.write(b"#!program\n" * 10 + whole)
    check_contents(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_last_member_of_a_name_counts(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for text in ("first", "last"):
            archive.writestr("a.png", text)
    assert read_member(str(tmp_path / "a.zip"), "a.png", any_size) == b"last"


def test_size_is_checked_before_reading(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"bomb": b"\0" * 10**7})
    sizes = []

    def refuse(num_bytes):
        sizes.append(num_bytes)
        raise MemoryError

    with pytest.raises(MemoryError):
        read_member(path, "bomb", refuse)
    assert sizes == [10**7]


def test_replaced_archive_is_indexed_anew(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a": b"1"})
    assert read_member(path, "a", any_size) == b"1"
    os.unlink(path)
    make_zip(tmp_path / "a.zip", {"a": b"two"})
    assert read_member(path, "a", any_size) == b"two"


def test_status_changes_with_any_part(tmp_path):
    path = split(make_zip(tmp_path / "a.zip"), 100)
    before = archive_status(path)
    assert len(before) > 2
    os.utime(before[1][0], ns=(1, 1))
    assert archive_status(path) != before
    with pytest.raises(FileNotFoundError):
        archive_status(str(tmp_path / "absent.zip"))


def test_every_flipped_byte_is_harmless_or_refused(tmp_path):
    """Each byte of a small zip and a small tar, flipped: the right content, or a refusal."""
    outcomes = set()
    for make, name in ((make_zip, "a.zip"), (make_tar, "a.tar")):
        make(tmp_path / name, {"a": b"red" * 9, "b/c": b"blue" * 9})
        whole = (tmp_path / name).read_bytes()
        places = range(len(whole)) if len(whole) < 1000 else random.Random(0).sample(range(len(whole)), 400)
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 0xFF
            path = tmp_path / f"{place}-{name}"
            path.write_bytes(damaged)
            try:
                content = read_member(str(path), "a", any_size)
            except (ArchiveError, BadArchive) as error:
                outcomes.add(type(error))
            else:
                # Tar has no checksum of contents.
                assert content == b"red" * 9 or name == "a.tar"
                outcomes.add(bytes)
            path.unlink()
    assert outcomes == {bytes, ArchiveError, BadArchive}


@pytest.mark.parametrize("size", [0, 1, 21, 22, 60])
def test_truncated_zip_is_refused(tmp_path, size):
    path = make_zip(tmp_path / "a.zip")
    with open(path, "rb+") as file:
        file.truncate(size)
    with pytest.raises(BadArchive):
        read_member(path, "a.png", any_size)


def test_encrypted_member_is_refused(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a": b"x"})
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    assert problem_of(path, "a") == "DAMAGED"


def test_index_of_many_members_is_small(tmp_path):
    count = 20_000
    path = make_zip(tmp_path / "a.zip", {f"images/folder/{i}.png": b"" for i in range(count)})
    tracemalloc.start()
    try:
        assert read_member(path, "images/folder/777.png", any_size) == b""
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 64 * count and peak < 256 * count  # bytes; the names alone are 25 each


def test_threads_and_forked_processes_share_an_open_archive(tmp_path):
    contents = {str(i): os.urandom(5000) for i in range(50)}
    path = make_zip(tmp_path / "a.zip", contents)
    check_contents(path, contents)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check_contents(path, contents)
            status = 0
        finally:
            os.write(writer, bytes([status]))
            os._exit(status)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: check_contents(path, contents), range(8)))
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"\0"


def test_member_is_opened_as_a_seekable_file(tmp_path):
    path = split(make_zip(tmp_path / "a.zip", {"rows.jsonl": b"1\n2\n3\n"}), 10)
    with open_member(path, "rows.jsonl") as file:
        assert file.readline() == b"1\n"
        file.seek(4)
        assert file.read() == b"3\n"
    for archive, member in ((path, "absent"), (str(tmp_path / "absent.zip"), "a")):
        with pytest.raises(OSError):
            open_member(archive, member)


@pytest.mark.parametrize(
    "size", [b"\x80" + b"\xff" * 11, b"\x80\0\0\0\x80" + b"\0" * 7, b"\xff" * 10 + b"\xfe\0"],
    ids=["2^88 - 1", "2^63", "-512"],
)  # fmt: skip
def test_tar_member_of_an_impossible_size_is_a_bad_archive(tmp_path, size):
    path = make_tar(tmp_path / "a.tar", {"a.png": b"12345"})
    with open(path, "r+b") as file:
        header = bytearray(file.read(512))
        header[124:136] = size  # a number in base 256
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        file.seek(0)
        file.write(header)
    with pytest.raises(BadArchive):
        read_member(path, "a.png", any_size)
    with pytest.raises(BadArchive):
        list(member_names(path))


def test_zip_member_behind_the_end_of_all_files_is_a_bad_archive(tmp_path):
    with open(make_zip(tmp_path / "a.zip", {"a.png": b"12345"}), "rb") as file:
        whole = file.read()
    directory, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)  # the zip64 field: the member's place
    entry = bytearray(whole[directory:end])
    entry[30:32], entry[42:46] = struct.pack("<H", len(extra)), b"\xff" * 4
    ends = bytearray(whole[end:])
    ends[12:16] = struct.pack("<L", len(entry) + len(extra))
    # Data in front shifts the place beyond 64 bits.
    (tmp_path / "b.zip").write_bytes(b"#" * 10 + whole[:directory] + entry + extra + ends)
    with pytest.raises(BadArchive, match=r'the place or size of "a\.png" is in no file'):
        read_member(str(tmp_path / "b.zip"), "a.png", any_size)
