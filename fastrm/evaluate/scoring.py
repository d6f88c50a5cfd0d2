"""Rewards for prepared groups, record files and plain dicts; all through the same packs."""

from collections.abc import Callable, Iterator, Sequence

import torch

from fastrm.data.loader import LoadedPack, PackBuilder, load_packs
from fastrm.data.packing import Pack
from fastrm.data.plan import PackPlan, plan_once
from fastrm.data.prepare import PreparedGroup, encode_group
from fastrm.data.record import Record
from fastrm.data.sources.groups import group_record
from fastrm.errors import DataError, RecordError
from fastrm.model.network import RewardNetwork

Forward = Callable[[Pack | None], torch.Tensor | None]


def run_packs(
    forward: Forward,
    builder: PackBuilder,
    groups: Sequence[PreparedGroup],
    budget: int,
    num_workers: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    *,
    pin_memory: bool = False,
) -> Iterator[tuple[LoadedPack, torch.Tensor | None]]:
    """Every group once, without gradients, with rewards (R,) on the CPU; None if all were refused.

    Of several ranks each does its part of the packs. They are the same packs as on one, and every rank
    calls `forward` equally often: with None where it has no pack.
    """
    plans = plan_once(groups, budget)
    plans += [PackPlan((), len(groups), False)] * (-len(plans) % num_ranks)
    with torch.no_grad():
        for loaded in load_packs(builder, plans[rank::num_ranks], num_workers, pin_memory=pin_memory):
            if loaded.pack is not None:
                yield loaded, forward(loaded.pack).float().cpu()
                continue
            if num_ranks > 1:
                forward(None)
            yield loaded, None


def score_records(
    network: RewardNetwork, records: Sequence[Record], tokens_per_pack: int, num_workers: int = 0
) -> list[list[float] | RecordError]:
    """Rewards of each record's responses, or why it could not be scored, in order."""
    results: list[list[float] | RecordError | None] = [None] * len(records)
    groups, encoded, numbers = [], [], []
    network.encoder.forget_images()  # a file may have been replaced since the last call
    for number, record in enumerate(records):
        try:
            group = encode_group(record, network.encoder)
            prepared = PreparedGroup.of(record, (), group)
            if prepared.num_tokens > tokens_per_pack:
                raise RecordError(
                    "TOO_LONG",
                    f"the group has {prepared.num_tokens:,} tokens, limit {tokens_per_pack:,}; raise --tokens-per-pack",
                )
            groups.append(prepared)
            encoded.append(group)
            numbers.append(number)
        except RecordError as error:
            results[number] = error
    builder = PackBuilder(
        [group.record for group in groups], network.encoder, share=True, encoded=encoded, finish=network.planner
    )

    def forward(pack: Pack) -> torch.Tensor:
        return network(pack.to(network.device))

    pin = network.device.type != "cpu"
    for loaded, rewards in run_packs(forward, builder, groups, tokens_per_pack, num_workers, pin_memory=pin):
        problems = {r.group: RecordError(r.code, r.message) for r in loaded.refused}
        placed = iter(loaded.pack.groups if loaded.pack is not None else ())
        for group in loaded.plan.groups:
            results[numbers[group]] = problems.get(group) or rewards[next(placed).responses].tolist()
    return results


def score_groups(
    network: RewardNetwork, groups: Sequence[dict], tokens_per_pack: int, num_workers: int = 0
) -> list[list[float]]:
    """See `RewardModel.score`."""
    records = []
    for number, group in enumerate(groups):
        try:
            records.append(group_record(group, number, allow_any_path=True, require_preferences=False))
        except RecordError as error:
            raise DataError(f"group {number}: {error.message} ({error.code})") from None
    results = score_records(network, records, tokens_per_pack, num_workers)
    for number, result in enumerate(results):
        if isinstance(result, RecordError):
            raise DataError(f"group {number}: {result.message} ({result.code})")
    return results
