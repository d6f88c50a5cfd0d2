"""The command `fastrm check-serving`: a model here beside what a URL answers for the same prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx

from fastrm.data.sources.layouts.groups import group_record
from fastrm.errors import ConfigError, ExactnessError, GroupError
from fastrm.evaluate.reward_model import RewardModel
from fastrm.rl.client import check_url
from fastrm.serve.check.causes import Cell, Explainer
from fastrm.serve.check.clients import APIS, Asker, Refused
from fastrm.serve.check.prompts import CheckedPrompt, checked_prompts
from fastrm.tables import Table
from fastrm.ui import Display, make_console, print_table, say

# Largest difference of rewards by dtype of the model here. Two implementations in float32 differ by 1e-6, and by 2e-4
# where another library resizes images (measured with vLLM 0.32 on a CPU); a mistake makes 1e-2 and more.
BANDS = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
# A band tells a right server from a wrong one only where the rewards spread over this many of it.
_BANDS_APART = 10


@dataclass(frozen=True)
class Comparison:
    """The rewards of a server beside those computed here.

    Attributes:
        cells: a response each, in the order of the prompts.
        refused: prompts that the server refused, with its message.
        left_out: prompts that the model here refuses, with the reason.
        band: the largest difference that is none.
    """

    cells: list[Cell]
    refused: list[tuple[CheckedPrompt, str]]
    left_out: list[tuple[CheckedPrompt, str]]
    band: float

    @property
    def worst(self) -> Cell | None:
        """The response with the largest difference."""
        return max(self.cells, key=lambda cell: cell.difference, default=None)

    @property
    def spread(self) -> float:
        """The largest of the rewards computed here less the smallest."""
        ours = [cell.ours for cell in self.cells]
        return max(ours, default=0.0) - min(ours, default=0.0)

    @property
    def can_tell(self) -> bool:
        """True if the rewards differ by so much more than the band that a server of wrong ones would be outside it."""
        return self.spread >= _BANDS_APART * self.band

    @property
    def agrees(self) -> bool:
        """True if every prompt was answered, and every reward is within a band that can tell."""
        is_within = bool(self.cells) and self.worst.difference <= self.band
        return is_within and not self.refused and self.can_tell


def check_serving(
    path: Path,
    url: str,
    api: str,
    *,
    token: str | None,
    timeout: float,
    band: float | None,
    loading: dict[str, Any],
) -> None:
    """Compare a server with a model, print a table, and name the likely cause of a difference.

    Args:
        loading: arguments of `RewardModel.from_pretrained`.

    Raises:
        ConfigError, StorageError: for a model that cannot be loaded, or options that are none.
        ServerError: if the server does not answer as its API says.
        ExactnessError: if a reward differs by more than the band, the server refuses a prompt, or the model's rewards
            spread too little for the band to tell a wrong server.
    """
    if api not in APIS:
        raise ConfigError(f"--api: got {api!r}, wanted one of {', '.join(APIS)}")
    check_url(url, "--url")
    model = RewardModel.from_pretrained(path, **loading)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout) as client, Display() as display:
        found = compare(model, client, api, band, display)
    console = make_console()
    say(console, f"{path} in this process ({model.weights}) against {url} (--api {api})")
    print_table(console, comparison_table(found))
    for prompt, reason in found.left_out:
        say(console, f"left out, since the model refuses it: one of {prompt.kind}: {reason}")
    if found.agrees:
        say(console, f"the server agrees: no reward differs by more than {found.band:g}")
        return
    for line in verdict(found, model, lambda name: RewardModel.from_pretrained(path, **loading | {"dtype": name})):
        say(console, line)
    raise ExactnessError(summary(found))


def compare(model: RewardModel, client: httpx.Client, api: str, band: float | None, display: Display) -> Comparison:
    """Ask a server and the model for the rewards of the fixed set.

    Args:
        band: None: that of the model's precision.

    Raises:
        ServerError: if the server does not answer as its API says.
    """
    encoder = model.network.encoder
    asker, prompts, update = Asker(client, api, encoder), checked_prompts(encoder), display.task("asking")
    found = Comparison([], [], [], BANDS[model.weights[:4]] if band is None else band)
    ours = model.score([prompt.group for prompt in prompts], on_error="return")
    for number, (prompt, rewards) in enumerate(zip(prompts, ours, strict=True), 1):
        if isinstance(rewards, GroupError):
            found.left_out.append((prompt, rewards.message))
            continue
        answer = asker.ask(prompt)
        if isinstance(answer, Refused):
            found.refused.append((prompt, answer.message))
            continue
        counts = [len(encoder.encode(response).tokens) for response in group_record(prompt.group, 0).responses]
        for place, (reward, served, count) in enumerate(zip(rewards, answer, counts, strict=True)):
            found.cells.append(Cell(prompt, place, reward, served.reward, (count, served.num_tokens)))
        update(number, len(prompts))
    return found


def comparison_table(found: Comparison) -> Table:
    """Return a row for each kind of prompts, and one for all."""
    table = Table("prompts", "rewards", "refused", "worst difference", "beyond the band", "preferences", "flipped")
    kinds = dict.fromkeys([cell.prompt.kind for cell in found.cells] + [prompt.kind for prompt, _ in found.refused])
    for kind in kinds:
        _add_row(table, found, kind, [cell for cell in found.cells if cell.prompt.kind == kind], [kind])
    table.add_section()
    _add_row(table, found, "all", found.cells, list(kinds))
    return table


def _add_row(table: Table, found: Comparison, name: str, cells: Sequence[Cell], kinds: Sequence[str]) -> None:
    worst = f"{max(cell.difference for cell in cells):.1e}" if cells else ""
    beyond = sum(cell.difference > found.band for cell in cells)
    num_refused = sum(prompt.kind in kinds for prompt, _ in found.refused)
    pairs, flipped = _count_flips(cells)
    table.add_row(
        name, *(f"{count:,}" for count in (len(cells), num_refused)), worst, f"{beyond:,}", f"{pairs:,}", f"{flipped:,}"
    )


def _count_flips(cells: Sequence[Cell]) -> tuple[int, int]:
    """Return the number of pairs of responses to one prompt with a preference here, and of those the server turns.

    A preference that is a tie there counts as turned.
    """
    pairs = [
        (one, other) for one, other in combinations(cells, 2) if one.prompt is other.prompt and one.ours != other.ours
    ]
    return len(pairs), sum((a.ours > b.ours) != (a.served > b.served) or a.served == b.served for a, b in pairs)


def verdict(found: Comparison, model: RewardModel, reload) -> list[str]:
    """Return sentences on the worst difference, refusals and the likely cause.

    Args:
        reload: as `Explainer`.
    """
    lines = [f"refused by the server: one of {prompt.kind}: {message}" for prompt, message in found.refused]
    worst = found.worst
    if worst is None or worst.difference <= found.band:
        return lines
    said = worst.prompt.responses[worst.place]
    lines.append(
        f"worst: {worst.served:.6g} there and {worst.ours:.6g} here, of {worst.prompt.kind}, response {said[:40]!r}"
    )
    return [*lines, f"likely cause: {Explainer(model, reload, found.band).explain(found.cells)}"]


def summary(found: Comparison) -> str:
    """Return how far a server is from the model, in one line."""
    beyond = sum(cell.difference > found.band for cell in found.cells)
    _, flipped = _count_flips(found.cells)
    parts = [f"{beyond} of {len(found.cells)} rewards differ by more than {found.band:g}, {flipped} preferences flip"]
    parts += [f"{len(found.refused)} prompts are refused"] if found.refused else []
    if not found.can_tell and not beyond:
        advice = f"; give --band {found.spread / _BANDS_APART:.2g} or less" if found.spread else ""
        parts.append(
            f"cannot tell: the model's rewards spread over {found.spread:.2g} only, so a wrong server may be within "
            f"{found.band:g} too{advice}"
        )
    return "; ".join(parts)
