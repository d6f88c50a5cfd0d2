"""Rewards for prepared groups, record files and plain dicts; all through the same packs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace

import torch

from fastrm.data.group import PreparedGroup, encode_group
from fastrm.data.loader import LoadedPack, PackBuilder, load_packs
from fastrm.data.packing import Pack
from fastrm.data.plan import PackPlan, plan_once
from fastrm.data.record import Record
from fastrm.data.sources.groups import group_record
from fastrm.data.sources.values import describe
from fastrm.errors import DataError, RecordError, option
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
    packs = load_packs(builder, plans[rank::num_ranks], num_workers, pin_memory=pin_memory)
    with torch.no_grad(), closing(packs):
        for loaded in packs:
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
    results = score_with_each([network], records, tokens_per_pack, num_workers)
    return [result if isinstance(result, RecordError) else result[0] for result in results]


def score_with_each(
    networks: Sequence[RewardNetwork],
    records: Sequence[Record],
    tokens_per_pack: int,
    num_workers: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[list[float]] | RecordError]:
    """Rewards by every network, which all run on the same packs: (M, R) for each record, in order.

    Args:
        networks: M on one device, whose encoders read records alike; the first one's is used.
        progress: called with the number of records done, after each pack.

    Returns:
        for each record, a list of rewards for each network, or why it could not be scored.
    """
    results: list[list[list[float]] | RecordError | None] = [None] * len(records)
    groups, encoded, numbers = [], [], []
    # A file may have been replaced since the last call.
    encoder = networks[0].encoder.looking_anew()
    planner, device = networks[0].planner, networks[0].device
    for number, record in enumerate(records):
        try:
            group = encode_group(record, encoder)
            prepared = PreparedGroup.of(group)
            if prepared.num_tokens > tokens_per_pack:
                limit = f"limit {tokens_per_pack:,}; raise {option('tokens_per_pack')}"
                raise RecordError("TOO_LONG", f"the group has {prepared.num_tokens:,} tokens, {limit}")
            groups.append(prepared)
            encoded.append(group)
            numbers.append(number)
        except RecordError as error:
            results[number] = error
    for network in networks:
        if network.first_use is not None:
            network.first_use(groups, encoded.__getitem__)
    builder = PackBuilder([records[number] for number in numbers], encoder, share=True, encoded=encoded, finish=planner)

    def forward(pack: Pack) -> torch.Tensor:
        pack = pack.to(device)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # threads have their own
            return torch.stack([network(_as_planned(pack, network, planner)) for network in networks])  # (M, R)

    done = len(records) - len(groups)
    for loaded, rewards in run_packs(
        forward, builder, groups, tokens_per_pack, num_workers, pin_memory=device.type != "cpu"
    ):
        problems = {r.group: RecordError(r.code, r.message) for r in loaded.refused}
        placed = iter(loaded.pack.groups if loaded.pack is not None else ())
        for group in loaded.plan.groups:
            results[numbers[group]] = problems.get(group) or rewards[:, next(placed).responses].tolist()
        done += len(loaded.plan.groups)
        progress(done)
    return results


def _as_planned(pack: Pack, network: RewardNetwork, planner) -> Pack:
    """The pack with the layouts that this network wants, if the first one's planner makes others."""
    return pack if network.planner == planner else replace(pack, prepared=network.planner(pack))


def score_groups(
    network: RewardNetwork, groups: Sequence[dict], tokens_per_pack: int, num_workers: int = 0
) -> list[list[float]]:
    """See `RewardModel.score`."""
    return score_dicts(lambda records: score_records(network, records, tokens_per_pack, num_workers), groups)


def score_dicts(
    score: Callable[[Sequence[Record]], list[list[float] | RecordError]], groups: Sequence[dict]
) -> list[list[float]]:
    """Rewards of groups as the Python API takes them.

    Args:
        score: of records, in order.

    Raises:
        DataError: for a group that cannot be scored, naming it and the reason.
    """
    if isinstance(groups, (dict, str, bytes)) or not isinstance(groups, Iterable):
        raise DataError(f"groups: got {describe(groups)}, wanted a list of groups: score([group])")
    records = []
    for number, group in enumerate(groups):
        try:
            records.append(group_record(group, number, allow_any_path=True, require_preferences=False))
        except RecordError as error:
            raise DataError(f"group {number}: {error.message} ({error.code})") from None
    results = score(records)
    for number, result in enumerate(results):
        if isinstance(result, RecordError):
            raise DataError(f"group {number}: {result.message} ({result.code})")
    return results
