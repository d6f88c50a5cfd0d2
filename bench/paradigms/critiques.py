"""Human preferences in text with critiques that a rule writes, as JSON Lines of prompt, chosen, rejected and reasons.

    python bench/paradigms/critiques.py            # runs/paradigms/train.jsonl and eval.jsonl

The preferences are those of PandaLM's test set (Apache 2.0, ../shared/data/pandalm) whose texts are short; every third
instruction is held out with all its pairs. A critique says what a rule can read off a response and its instruction:
its length, and whether it copies the instruction, repeats itself or breaks off. The rule does not know which response
people preferred: it says the same of equal responses.

Such critiques teach the form of critiques, and to look at four things that go with people's choices, or against them:
the command prints how often. They cannot teach what is right, useful or well said, since the rule reads no meaning. As
each critique is a function of texts that a model sees anyway, a model that writes it first has nothing that direct
rewards could not have.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.pretrained.preferences import answer_pairs
from fastrm.json_files import to_json

FOLDER = Path("runs/paradigms")
MAX_CHARACTERS = 400  # of prompt and both responses: about a hundred tokens
HELD_OUT = 3
LENGTHS = ((5, "under 5 words"), (15, "under 15 words"), (40, "under 40 words"))


def length(response: str) -> str:
    """Return the length of a response in words, in one of four classes."""
    count = len(response.split())
    return next((name for limit, name in LENGTHS if count < limit), "40 words or more")


def copies(prompt: str, response: str) -> bool:
    """Return whether nine in ten of a response's different words stand in the prompt."""
    known, used = (set(re.findall(r"\w+", text.lower())) for text in (prompt, response))
    return len(used & known) > 0.9 * len(used)


def repeats(prompt: str, response: str) -> bool:
    """Return whether a fifth of a response's runs of three words have been there before."""
    words = response.split()
    runs = [tuple(words[place : place + 3]) for place in range(len(words) - 2)]
    return len(runs) - len(set(runs)) > 0.2 * len(runs)


def breaks_off(prompt: str, response: str) -> bool:
    """Return whether a response of five words or more ends without a mark that ends a sentence, quote or bracket."""
    return len(response.split()) >= 5 and response.rstrip()[-1] not in ".!?\"')]}…”"


FAULTS: dict[str, Callable[[str, str], bool]] = {
    "copies the instruction": copies,
    "repeats itself": repeats,
    "breaks off": breaks_off,
}


def critique(prompt: str, response: str) -> str:
    """Return what the rule says of a response."""
    found = [fault for fault, has in FAULTS.items() if has(prompt, response)]
    return f"Length: {length(response)}. Faults: {', '.join(found) or 'none'}."


def with_critiques(row: dict) -> dict:
    """Return a row of prompt, chosen and rejected with a critique of each response."""
    reasons = {f"{name}_reason": critique(row["prompt"], row[name]) for name in ("chosen", "rejected")}
    return row | reasons


def short_rows() -> tuple[list[dict], list[dict]]:
    """Return the rows to train on and those held out; no prompt is in both."""
    numbers: dict[str, int] = {}
    parts: tuple[list[dict], list[dict]] = [], []
    for row in answer_pairs():
        if sum(len(row[name]) for name in ("prompt", "chosen", "rejected")) <= MAX_CHARACTERS:
            number = numbers.setdefault(row["prompt"], len(numbers))
            parts[number % HELD_OUT == HELD_OUT - 1].append(with_critiques(row))
    return parts


def agreement(rows: list[dict], has: Callable[[str, str], bool]) -> tuple[int, int]:
    """Return of how many rows one response alone has a fault, and in how many of them it is the rejected one."""
    faults = [[has(row["prompt"], row[name]) for name in ("chosen", "rejected")] for row in rows]
    differing = [rejected for chosen, rejected in faults if chosen != rejected]
    return len(differing), sum(differing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help=f"default: {FOLDER}")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    parts = short_rows()
    for name, rows in zip(("train", "eval"), parts, strict=True):
        (folder / f"{name}.jsonl").write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows):,} pairs of {len({row['prompt'] for row in rows})} prompts")
    is_shorter = {"is under 5 words": lambda prompt, response: len(response.split()) < 5}
    for fault, has in (FAULTS | is_shorter).items():
        differing, rejected = agreement(parts[0], has)
        print(f"one response {fault}: {differing} training pairs; people rejected it in {rejected}")


if __name__ == "__main__":
    main()
