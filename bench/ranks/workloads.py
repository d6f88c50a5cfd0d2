"""Groups of real lengths for the simulation of rank balance, from the data in ../shared/data.

Texts are tokenised with a byte-level BPE of 32,000 entries trained on them: Qwen's own vocabulary is
not there without a hub. Images count with the recipe's limit of pixels.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from bench import DATA, ROOT
from bench.training.test_trl_trainer import chat_records, instruction_records
from fastrm.config import Config, load_config
from fastrm.data.batching import StepOrder
from fastrm.data.group import (
    MAX_MERGED_RESPONSES,
    GroupSize,
    check_length,
    encode_group,
    join_records,
    resolve_preferences,
)
from fastrm.data.media.format import FormatSettings
from fastrm.data.media.images import image_size
from fastrm.data.quarantine import Quarantine
from fastrm.data.record import ImageRef, Message, Preference, Record, Response
from fastrm.data.sources import read_source
from fastrm.data.template import ConversationEncoder
from fastrm.data.tokenizer import train_tokenizer
from fastrm.errors import RecordError
from fastrm.limits import MediaLimits
from fastrm.model.architectures import find_architecture
from fastrm.model.export import make_encoder

VOCABULARY = 32_000
# The recipe's mixture in thousands of pairs, as the paper states it, and what stands in for each set here.
# Similar lengths are assumed: the sets themselves, and figures of their lengths, are not here.
MIXTURE = (
    (2000, "MMPR v1.2", "mathv_pairs"),
    (83, "RLAIF-V", "vl_rewardbench"),
    (106, "R1-Reward, its half of MM-RLHF", "mm_reward_bench"),
    (94, "R1-Reward, the rest", "vl_rewardbench"),
    (569, "Tulu-3-IF, OLMo-2, Ultra-Hard, others (text)", "llamafactory_dpo_demo"),
)
PLAIN = ("quickstart_mix", "mathv_pairs", "caption_contest", "nlvr", "pandalm", "llamafactory_dpo_demo")


@dataclass(frozen=True)
class Pool:
    """Groups to draw steps from; `shares` is each source's share of groups, or None to take all in turn."""

    name: str
    sources: list[list[GroupSize]]
    shares: list[float] | None = None

    def draw(self, pairs_per_step: int, num_steps: int) -> tuple[list[GroupSize], StepOrder]:
        """Draw groups for `num_steps` steps, and return them with the order that cuts them into steps."""
        wanted = pairs_per_step * (num_steps + 1)
        groups = list(self._mixed(wanted) if self.shares else self._copies(wanted))
        return groups, StepOrder([group.num_preferences for group in groups], pairs_per_step, seed=0)

    def _mixed(self, num_pairs: int) -> Iterator[GroupSize]:
        """Yield groups at random from sources drawn by their shares; each with images of its own."""
        rng, drawn = np.random.default_rng(0), 0
        while drawn < num_pairs:
            source = self.sources[rng.choice(len(self.sources), p=self.shares)]
            group = source[rng.integers(len(source))]
            yield _with_own_images(group, drawn)
            drawn += group.num_preferences

    def _copies(self, num_pairs: int) -> Iterator[GroupSize]:
        """Yield all groups as often as needed; those of one image share it within a copy only."""
        groups = [group for source in self.sources for group in source]
        per_copy = sum(group.num_preferences for group in groups)
        for copy in range(-(-num_pairs // per_copy)):
            for group in groups:
                yield _with_own_images(group, copy)


def _with_own_images(group: GroupSize, number: int) -> GroupSize:
    return replace(group, media=tuple(image._replace(key=f"{image.key} {number}") for image in group.media))


def make_pools(config: Config) -> list[Pool]:
    """Return two pools: the shared data as it is, and the recipe's mixture with stand-ins."""
    files = sorted((DATA / "owleval" / "cases").iterdir())
    photos = [image_size(ImageRef(path=str(file)), MediaLimits()) for file in files]
    records = {
        "quickstart_mix": _read("quickstart_mix/train.jsonl"),
        "mathv_pairs": _read("mathv_pairs/pairs_even.jsonl"),
        "caption_contest": _read("caption_contest/pairs_even_contests.jsonl"),
        "nlvr": _read("nlvr/pairs_dev_balanced.jsonl"),
        "pandalm": instruction_records(),
        "llamafactory_dpo_demo": chat_records(),
        "vl_rewardbench": list(_vl_rewardbench(photos)),
        "mm_reward_bench": list(_mm_reward_bench(photos)),
    }
    conversations = (r.messages for found in records.values() for record in found for r in record.responses)
    tokenizer = train_tokenizer(conversations, VOCABULARY)
    architecture, _ = find_architecture(config.model)
    settings = FormatSettings(min_pixels=config.data.min_pixels, max_pixels=config.data.max_pixels)
    encoder = make_encoder(architecture, tokenizer, None, config.model.anchor, MediaLimits(), settings)
    groups = {name: _groups(found, encoder, config) for name, found in records.items()}
    shares = np.array([pairs for pairs, _, _ in MIXTURE]) / sum(pairs for pairs, _, _ in MIXTURE)
    return [
        Pool("shared data", [groups[name] for name in PLAIN]),
        Pool("recipe's mixture", [groups[name] for _, _, name in MIXTURE], shares.tolist()),
    ]


def _groups(records: list[Record], encoder: ConversationEncoder, config: Config) -> list[GroupSize]:
    """Return groups of one prompt, merged as a prepared set merges them; unusable ones are left out."""
    prompts: dict[tuple, list[Record]] = {}
    for record in records:
        prompts.setdefault(record.prompt_key, []).append(record)
    groups = []
    for parts in prompts.values():
        most = MAX_MERGED_RESPONSES // max(len(part.responses) for part in parts) or 1
        for first in range(0, len(parts), most):
            record, _ = resolve_preferences(join_records(parts[first : first + most]), config)
            try:
                group = encode_group(record, encoder)
                counted = GroupSize.of(group, config.data.share_prefixes)
                check_length(counted.num_tokens, config)
            except RecordError:
                continue
            if record.preferences:
                groups.append(counted)
    return groups


def recipe_config() -> Config:
    return load_config(ROOT / "configs" / "full.yaml")


def _read(path: str) -> list[Record]:
    return list(read_source(DATA / path, quarantine=Quarantine(None)))


def _rows(name: str) -> Iterator[dict]:
    for line in (DATA / "reward_benches" / name).read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def _vl_rewardbench(photos: list[tuple[int, int]]) -> Iterator[Record]:
    for number, row in enumerate(_rows("vl_rewardbench.jsonl")):
        yield _seen(number, row["query"], row["response"], photos)


def _mm_reward_bench(photos: list[tuple[int, int]]) -> Iterator[Record]:
    for number, row in enumerate(row for row in _rows("mm_reward_bench.jsonl") if row.get("image")):
        yield _seen(number, row["prompt"], (row["chosen"], row["rejected"]), photos)


def _seen(number: int, question: str, answers: Sequence[str], photos: list[tuple[int, int]]) -> Record:
    """Return a pair whose image is absent: a blank one replaces it, as large as a photograph of OwlEval."""
    buffer = io.BytesIO()
    Image.new("L", photos[number % len(photos)]).save(buffer, "PNG")
    # Bytes behind a PNG's end are not read. They keep rows with one question from becoming one group.
    turn = Message("user", (ImageRef(data=buffer.getvalue() + str(number).encode()), question))
    responses = tuple(Response((turn, Message("assistant", (answer,)))) for answer in answers)
    return Record(f"{number}", responses, (Preference(0, 1),), "bench", f"bench:{number}")
