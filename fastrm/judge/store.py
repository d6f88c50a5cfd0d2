"""The file in which generated texts are kept: one line for each, by the key of what it depends on."""

import json
from collections.abc import Sequence
from pathlib import Path

from fastrm.errors import StorageError
from fastrm.json_files import to_json
from fastrm.judge.generations import Generation
from fastrm.judge.questions import JudgeQuestion, Written
from fastrm.storage import sync_path, writing


class GenerationStore:
    """A file of JSON Lines {"id", "order", "text", "key"} that grows by a line for each text; a cut one has "cut" too.

    Whatever ends the process, texts that were added stay: half of a last line is cut off when the file is opened.
    """

    def __init__(self, path: Path):
        """Read the texts that are there; the file's folder is made.

        Raises:
            StorageError: for a file that cannot be read or written, or with a line that is none of this store.
        """
        self.path = path
        self._texts: dict[str, tuple[str, bool]] = {}
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            self._file.seek(0)
            content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with writing(path):
                self._file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                key, text = row["key"], row["text"]
                if not (isinstance(key, str) and isinstance(text, str)):
                    raise TypeError
                self._texts[key] = text, bool(row.get("cut"))
            except (ValueError, TypeError, KeyError, AttributeError):
                raise StorageError(
                    f'{path}:{number}: wanted a line with "key" and "text", as fastrm eval writes them; name another '
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
