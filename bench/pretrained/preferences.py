"""Human preferences in text, from ../shared/data, as JSON Lines of prompt, chosen and rejected.

    python bench/pretrained/preferences.py                  # runs/human/captions.jsonl, answers.jsonl and eval.jsonl

- captions: The New Yorker's caption contest (nextml/caption-contest-data, CC BY 4.0), rated by its readers. Pairs of
  captions of one contest whose mean ratings differ by three standard errors or more; the longer caption wins exactly
  half of them. The cartoon is not shown, so only what is funny without it can be learned.
- answers: PandaLM's test set (Apache 2.0). Each instruction has the answers of five models and, for pairs of them, the
  verdicts of three annotators. The majority decides; ties are left out.

Every fifth contest and every fifth instruction, in the order of the files, is held out with all its pairs.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import DATA
from fastrm.json_files import to_json

FOLDER = Path("runs/human")
HELD_OUT = 5


def caption_pairs(data: Path = DATA) -> Iterator[dict]:
    """Yield rows of the caption contest, contest by contest."""
    with (data / "caption_contest" / "pairs_even_contests_large.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            prompt = f"Write a funny caption for the cartoon of contest {row['contest']}."
            yield _row(row["id"], "captions", prompt, row["chosen"], row["rejected"])


def answer_pairs(data: Path = DATA) -> Iterator[dict]:
    """Yield rows of PandaLM's test set that have a winner."""
    for row in json.loads((data / "pandalm" / "testset-v1.json").read_text(encoding="utf-8")):
        votes = [row[f"annotator{number}"] for number in (1, 2, 3)]
        verdict = next((choice for choice in (1, 2) if votes.count(choice) >= 2), None)
        texts = row["response1"], row["response2"]
        # One field holds a boolean, and an empty answer is not a response.
        if verdict is not None and all(isinstance(text, str) and text.strip() for text in texts):
            prompt = "\n".join(part for part in (row["instruction"], row["input"]) if part)
            better, worse = texts if verdict == 1 else texts[::-1]
            yield _row(f"pandalm {row['idx']}", "answers", prompt, better, worse)


def _row(name: str, source: str, prompt: str, chosen: str, rejected: str) -> dict:
    return {"id": name, "source": source, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def split(rows: Iterator[dict]) -> tuple[list[dict], list[dict]]:
    """Split rows into (train, held out); no prompt is in both."""
    numbers: dict[str, int] = {}
    parts: tuple[list[dict], list[dict]] = [], []
    for row in rows:
        number = numbers.setdefault(row["prompt"], len(numbers))
        parts[number % HELD_OUT == HELD_OUT - 1].append(row)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help=f"default: {FOLDER}")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    (captions, held_out_captions), (answers, held_out_answers) = split(caption_pairs()), split(answer_pairs())
    files = {"captions": captions, "answers": answers, "eval": held_out_captions + held_out_answers}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")
        prompts = len({row["prompt"] for row in rows})
        print(f"{folder / name}.jsonl: {len(rows):,} pairs of {prompts} prompts")


if __name__ == "__main__":
    main()
