"""The workloads on a pretrained model: batches of real preferences, and held-out ones of the same kind."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from bench.pretrained.preferences import DATA, answer_pairs, caption_pairs, split
from fastrm.data.group import MAX_MERGED_RESPONSES, encode_group, join_records
from fastrm.data.packing import EncodedGroup
from fastrm.data.quarantine import Quarantine
from fastrm.data.record import Message, Preference, Record, Response
from fastrm.data.sources import read_source
from fastrm.data.template import ConversationEncoder

DEMO = DATA / "llamafactory_dpo_demo" / "dpo_en_demo.json"  # Apache 2.0
RATED = DATA / "caption_contest" / "rated_lists.jsonl"  # CC BY 4.0
MAX_TOKENS = 1024  # TRL's default max_length: longer conversations are left out, nothing is cut


@dataclass(frozen=True)
class Batches:
    """The batches that every variant trains on, and the groups that it is evaluated on.

    Attributes:
        records: of each step.
        groups: the same, tokenised.
        held_out: groups of other prompts.
    """

    records: list[list[Record]]
    groups: list[list[EncodedGroup]]
    held_out: list[EncodedGroup]

    @property
    def num_pairs(self) -> int:
        """Preferences of one step."""
        return sum(len(record.preferences) for record in self.records[0])


@dataclass(frozen=True)
class Workload:
    """Real preferences in steps of equal size.

    Attributes:
        what: for the table.
        read: records for training and held-out records, of different prompts.
        pairs_per_step: preferences of one step.
        held_out_pairs: preferences that the trained weights are evaluated on.
    """

    what: str
    read: Callable[[], tuple[Iterator[Record], Iterator[Record]]]
    pairs_per_step: int
    held_out_pairs: int

    def batches(self, encoder: ConversationEncoder, num_steps: int) -> Batches:
        """Return the first steps of the set, in its order, without conversations that are too long."""
        train, held_out = self.read()
        records = list(itertools.islice(_steps(_fitting(train, encoder), self.pairs_per_step), num_steps))
        assert len(records) == num_steps, f"{self.what}: {len(records)} steps, wanted {num_steps}"
        [evaluation] = itertools.islice(_steps(_fitting(held_out, encoder), self.held_out_pairs), 1)
        groups = [[encode_group(record, encoder) for record in step] for step in records]
        return Batches(records, groups, [encode_group(record, encoder) for record in evaluation])


def _fitting(records: Iterator[Record], encoder: ConversationEncoder) -> Iterator[Record]:
    for record in records:
        if all(len(encoder.encode(response).tokens) <= MAX_TOKENS for response in record.responses):
            yield record


def _steps(records: Iterator[Record], num_pairs: int) -> Iterator[list[Record]]:
    """Yield lists of records with this many preferences together; the rest of a step's last record is left out."""
    step, wanted = [], num_pairs
    for record in records:
        kept = replace(record, preferences=record.preferences[:wanted])
        step.append(_with_used_responses(kept))
        wanted -= len(kept.preferences)
        if wanted == 0:
            yield step
            step, wanted = [], num_pairs


def _with_used_responses(record: Record) -> Record:
    """Return a record without responses that no preference names."""
    used = sorted({number for p in record.preferences for number in (p.winner, p.loser)})
    place = {number: index for index, number in enumerate(used)}
    preferences = tuple(replace(p, winner=place[p.winner], loser=place[p.loser]) for p in record.preferences)
    return replace(record, responses=tuple(record.responses[n] for n in used), preferences=preferences)


def _demo() -> tuple[Iterator[Record], Iterator[Record]]:
    """Return LLaMA-Factory's demo: dialogues of several turns, one pair each; the last third is held out."""
    records = list(read_source(DEMO, quarantine=Quarantine(None)))
    cut = len(records) * 2 // 3
    trained = {record.prompt_key for record in records[:cut]}
    return iter(records[:cut]), iter([record for record in records[cut:] if record.prompt_key not in trained])


def _long_prompts() -> tuple[Iterator[Record], Iterator[Record]]:
    """Return the records of the demo whose dialogue has twice the characters of its longer response, or more."""
    return tuple(filter(_is_long, half) for half in _demo())


def _is_long(record: Record) -> bool:
    prompt = sum(len(message.text) for message in record.responses[0].messages[:-1])
    return prompt >= 2 * max(len(response.text) for response in record.responses)


def _answers() -> tuple[Iterator[Record], Iterator[Record]]:
    return tuple(_joined(rows) for rows in split(answer_pairs()))


def _captions() -> tuple[Iterator[Record], Iterator[Record]]:
    return tuple(_joined(rows) for rows in split(caption_pairs()))


def _joined(rows: Sequence[dict]) -> Iterator[Record]:
    """Yield neighbours of one prompt as one record, up to as many as fastrm merges by itself."""
    for prompt, same in itertools.groupby(rows, key=lambda row: row["prompt"]):
        pairs = [_record(row["id"], prompt, (row["chosen"], row["rejected"])) for row in same]
        for first in range(0, len(pairs), MAX_MERGED_RESPONSES // 2):
            yield join_records(pairs[first : first + MAX_MERGED_RESPONSES // 2])


def _rated_lists() -> tuple[Iterator[Record], Iterator[Record]]:
    """Return every second caption of a list, from best to worst, with all pairs; no equal ratings."""
    records = []
    for row in map(json.loads, RATED.read_text(encoding="utf-8").splitlines()):
        rated = row["responses"][::2]
        if len({entry["score"] for entry in rated}) == len(rated):
            records.append(_record(row["id"], row["prompt"], [entry["caption"] for entry in rated]))
    return iter(records[: len(records) // 2]), iter(records[len(records) // 2 :])


def _record(name: str, prompt: str, texts: Sequence[str]) -> Record:
    """Return a record of one prompt and its responses, each preferred to all that follow."""
    question = Message("user", (prompt,))
    responses = tuple(Response((question, Message("assistant", (text,)))) for text in texts)
    pairs = tuple(Preference(a, b) for a in range(len(texts)) for b in range(a + 1, len(texts)))
    return Record(name, responses, pairs, "pretrained", name)


WORKLOADS = {
    "dialogues": Workload("dialogues of several turns, one pair each", _demo, 2, 12),
    "long prompts": Workload("dialogues at least twice as long as their responses, one pair each", _long_prompts, 3, 6),
    "answers": Workload("instructions, answers of up to five models", _answers, 6, 64),
    "captions": Workload("short captions, pairs of one contest", _captions, 24, 160),
    "lists of 8": Workload("eight ranked captions, all 28 pairs", _rated_lists, 28, 224),
}
