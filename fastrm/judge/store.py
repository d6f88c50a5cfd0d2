"""The file in which generated texts are kept: one line for each, by the key of what it depends on."""

import json
from collections.abc import Sequence
from pathlib import Path

from fastrm.errors import StorageError
from fastrm.json_files import to_json
from fastrm.judge.generations import Generation
from fastrm.judge.questions import JudgeQuestion, Written
from fastrm.storage import hold_file, sync_path, writing

_BEGIN = b'{"id": '  # of each line that `GenerationStore.add` writes


class GenerationStore:
    """A file of JSON Lines {"id", "order", "text", "key"} that grows by a line for each text; a cut one has "cut" too.

    Whatever ends the process, texts that were added stay: half of a last line is cut off when the file is opened, if
    whole lines before it show that the file is such a store. One process at a time has the file.
    """

    def __init__(self, path: Path):
        """Read the texts that are there; the file's folder is made.

        Raises:
            StorageError: for a file that cannot be read or written, that another process has, or that holds anything
                else than such lines; it stays as it is.
        """
        self.path = path
        self._texts: dict[str, tuple[str, bool]] = {}
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        try:
            hold_file(self._file, path, "wait for it, or name another file with --generations")
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        with writing(self.path):
            self._file.seek(0)
            content = self._file.read()
        *lines, last = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            self._take(line, number)
        if not last:
            return
        # What a power failure leaves: half of a line, or blocks of zeros that were never written.
        half = last.rstrip(b"\0")
        is_half = lines and (half.startswith(_BEGIN) or _BEGIN.startswith(half)) and not _is_json(half)
        if not is_half:
            self._take(last, len(lines) + 1)
        with writing(self.path):
            if is_half:
                self._file.truncate(len(content) - len(last))
            else:  # whole, but for its end
                self._file.write(b"\n")
                self._file.flush()

    def _take(self, line: bytes, number: int) -> None:
        """Keep the text of a line.

        Raises:
            StorageError: for a line that is none of a store.
        """
        try:
            row = json.loads(line)
            key, text = row["key"], row["text"]
            if not (isinstance(key, str) and isinstance(text, str)):
                raise TypeError
            self._texts[key] = text, bool(row.get("cut"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise StorageError(
                f'{self.path}:{number}: wanted a line with "key" and "text", as fastrm eval writes them; name another '
                "file with --generations"
            ) from None

    def missing(self, questions: Sequence[JudgeQuestion]) -> list[JudgeQuestion]:
        """Return the questions without an answer; of equal ones, as rows may share them, the first."""
        found: dict[str, JudgeQuestion] = {}
        for question in questions:
            if question.key not in self._texts:
                found.setdefault(question.key, question)
        return list(found.values())

    def add(self, written: Written) -> None:
        """Add the answer to a question.

        Raises:
            StorageError: if it cannot be written.
        """
        question, text, is_cut, _ = written
        row = {"id": question.id, "order": list(question.order), "text": text, "key": question.key}
        row |= {"cut": True} if is_cut else {}
        with writing(self.path):
            self._file.write((to_json(row) + "\n").encode())
            self._file.flush()
        self._texts[question.key] = text, is_cut

    def generations(self, questions: Sequence[JudgeQuestion]) -> list[Generation]:
        """Return the answers there are, in the order of the questions."""
        return [
            Generation(question.id, question.order, *self._texts[question.key])
            for question in questions
            if question.key in self._texts
        ]

    def close(self) -> None:
        """Close the file, which is on the disk then."""
        with writing(self.path):
            self._file.close()
            sync_path(self.path)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
