"""Rewards of prepared groups, record files and plain dicts; all by the same packs.

A group that cannot be scored is refused by itself, with a code and a message, and no other group is affected. A
reward that is not a finite number is such a refusal: nothing writes it, averages it or compares it.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch

from fastrm.data.batching import PackPlan, plan_once
from fastrm.data.group import GroupSize, check_distinct, encode_within
from fastrm.data.loader import LoadedPack, PackBuilder, RefusedGroup, load_packs
from fastrm.data.packing import EncodedGroup, Pack
from fastrm.data.record import Record
from fastrm.data.sources import KeyTally, RefusedRow, source_files, unread_lines
from fastrm.data.sources.in_memory import Rows, RowsLike
from fastrm.data.sources.layouts import LAYOUTS, messages
from fastrm.data.sources.layouts.groups import group_record
from fastrm.data.sources.values import describe
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ConfigError, DataError, GroupError, RecordError, option
from fastrm.evaluate.merging import PromptGroup
from fastrm.model.network import RewardNetwork
from fastrm.model.text import longest_path, path_limit_key

# The number of records that are read and scored at a time.
CHUNK = 512
NON_FINITE = "NON_FINITE_REWARD"
ON_ERROR = ("raise", "return")

Forward = Callable[[Pack | None], torch.Tensor | None]
ScoreRecords = Callable[[Sequence[Record]], list[list[float] | RecordError]]


def run_packs(
    forward: Forward,
    builder: PackBuilder,
    groups: Sequence[GroupSize],
    budget: int,
    num_workers: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    *,
    pin_memory: bool = False,
) -> Iterator[tuple[LoadedPack, torch.Tensor | None]]:
    """Run every group once, without gradients; yield its pack with rewards (R,) on the CPU, None if all were refused.

    Groups with a reward that is not finite are among the refused of their pack, and their rewards are not to be used.

    Of several ranks each does its part of the packs. They are the same packs as on one, and every rank
    calls `forward` equally often: with None where it has no pack.
    """
    plans = plan_once(groups, budget)
    plans += [PackPlan((), len(groups), False)] * (-len(plans) % num_ranks)
    packs = load_packs(builder, plans[rank::num_ranks], num_workers, pin_memory=pin_memory)
    with torch.no_grad(), closing(packs):
        for loaded in packs:
            if loaded.pack is not None:
                rewards = forward(loaded.pack).float().cpu()
                yield _without_non_finite(loaded, rewards), rewards
                continue
            if num_ranks > 1:
                forward(None)
            yield loaded, None


def _without_non_finite(loaded: LoadedPack, rewards: torch.Tensor) -> LoadedPack:
    """Return the pack with all groups refused whose rewards (..., R) are not finite."""
    if rewards.isfinite().all():
        return loaded
    found = [
        RefusedGroup(group, NON_FINITE, _describe(values))
        for group, place in zip(loaded.packed, loaded.pack.groups, strict=True)
        if not (values := rewards[..., place.responses]).isfinite().all()
    ]
    return replace(loaded, refused=[*loaded.refused, *found])


def _describe(values: torch.Tensor) -> str:
    value = float(values[~values.isfinite()][0])
    return (
        f"a reward is {value}, which is no finite number: either a weight of the model is none, or a value is too "
        "large for its precision; look at the weights, or score in float32 (dtype fp32)"
    )


def refuse_non_finite(name: str, error: RecordError | RefusedGroup) -> None:
    """Refuse a model's figures if a reward is not finite: those of other groups would be misleading.

    Args:
        name: of the group.
        error: why it was refused; other reasons pass.

    Raises:
        DataError: naming the group.
    """
    if error.code == NON_FINITE:
        raise DataError(f"{name}: {error.message} ({error.code})")


def score_records(
    network: RewardNetwork,
    records: Sequence[Record],
    tokens_per_pack: int,
    num_workers: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[float] | RecordError]:
    """Return the rewards of each record's responses, or why it could not be scored, in order."""
    results = score_with_each([network], records, tokens_per_pack, num_workers, progress)
    return [result if isinstance(result, RecordError) else result[0] for result in results]


def score_with_each(
    networks: Sequence[RewardNetwork],
    records: Sequence[Record],
    tokens_per_pack: int,
    num_workers: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[list[float]] | RecordError]:
    """Return the rewards by every network on the same packs: (M, R) for each record, in order.

    Args:
        networks: M on one device, whose encoders read records alike; the first one's is used.
        progress: called with the number of records done, after each pack.

    Returns:
        for each record, a list of rewards for each network, or why it could not be scored.
    """
    results: list[list[list[float]] | RecordError | None] = [None] * len(records)
    # A file may have been replaced since the last call.
    encoder = networks[0].encoder.looking_anew()
    ready: list[Ready] = []
    for number, record in enumerate(records):
        try:
            ready.append(make_ready(number, record, encoder, networks, tokens_per_pack))
        except RecordError as error:
            results[number] = error
    done = len(records) - len(ready)
    groups, encoded = [one.counted for one in ready], [one.group for one in ready]
    for pack in score_encoded(networks, encoded, groups, encoder, tokens_per_pack, num_workers):
        for place, result in pack:
            one = ready[place]
            results[one.number] = result if isinstance(result, RecordError) else result[:, one.places].tolist()
        done += len(pack)
        progress(done)
    return results


def score_encoded(
    networks: Sequence[RewardNetwork],
    encoded: Sequence[EncodedGroup],
    groups: Sequence[GroupSize],
    encoder: ConversationEncoder,
    tokens_per_pack: int,
    num_workers: int = 0,
) -> Iterator[list[tuple[int, torch.Tensor | RecordError]]]:
    """Run tokenised groups through every network; yield the results of each pack when it ends.

    Args:
        networks: M on one device, whose encoders read records alike.
        encoded: N groups whose responses are distinct.
        groups: their sizes.
        encoder: decodes their images.

    Yields:
        for each group of the pack its place in `encoded`, and rewards (M, R) on the CPU or why it has none.

    Raises:
        ExactnessError: as `RewardModel.score`.
    """
    lay_out, device = networks[0].lay_out, networks[0].device
    for network in networks:
        if network.first_use is not None:
            network.first_use(groups, encoded.__getitem__)
    builder = PackBuilder(encoded, encoder, share=True, encoded=encoded, lay_out=lay_out)

    def forward(pack: Pack) -> torch.Tensor:
        pack = pack.to(device)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # each thread has its own
            found = [network.normalized(network(_laid_out(pack, network, lay_out))) for network in networks]
            return torch.stack(found)  # (M, R)

    for loaded, rewards in run_packs(
        forward, builder, groups, tokens_per_pack, num_workers, pin_memory=device.type != "cpu"
    ):
        placed = loaded.pack.groups if loaded.pack is not None else ()
        found = {number: rewards[:, one.responses] for number, one in zip(loaded.packed, placed, strict=True)}
        found |= {refusal.group: RecordError(refusal.code, refusal.message) for refusal in loaded.refused}
        yield list(found.items())


class Ready(NamedTuple):
    """A record that can be packed.

    Attributes:
        group: its distinct responses: equal ones get equal rewards.
        places: of each of its responses among those.
    """

    number: int
    group: EncodedGroup
    counted: GroupSize
    places: list[int]


def make_ready(
    number: int, record: Record, encoder: ConversationEncoder, networks: Sequence[RewardNetwork], tokens_per_pack: int
) -> Ready:
    """Tokenise a record and refuse it if the networks cannot take it.

    Raises:
        RecordError: as `encode_within` and, for a record with preferences, `check_distinct`; TOO_LONG.
    """
    merged = PromptGroup()
    merged.add(0, record)
    places = merged.places[0]
    distinct = replace(record, responses=tuple(merged.responses.values()), preferences=())
    group = encode_within(distinct, encoder, tokens_per_pack)
    check_distinct(replace(group, responses=tuple(group.responses[n] for n in places), preferences=record.preferences))
    longest = max(len(response.tokens) for response in group.responses)
    for config in (network.model.config for network in networks):
        limit = longest_path(config)
        if limit is None or longest <= limit:
            continue
        raise RecordError(
            "TOO_LONG",
            f"a response has {longest:,} tokens with its prompt; with its {path_limit_key(config)} the model is exact "
            f"up to {limit:,}; shorten it",
        )
    counted = GroupSize.of(group)
    if counted.num_tokens > tokens_per_pack:
        limit = f"limit {tokens_per_pack:,}; raise {option('tokens_per_pack')}"
        raise RecordError("TOO_LONG", f"the group has {counted.num_tokens:,} tokens, {limit}")
    return Ready(number, group, counted, places)


def _laid_out(pack: Pack, network: RewardNetwork, lay_out) -> Pack:
    """Return the pack with this network's layouts, if the first network makes others."""
    return pack if network.lay_out == lay_out else replace(pack, layouts=network.lay_out(pack))


def score_table(score: ScoreRecords, rows: RowsLike, on_error: str = "raise") -> list[list[float] | GroupError]:
    """Return the rewards of the rows of a DataFrame or a Dataset, which are read as those of a file.

    Keys that are not read are named in one warning.

    Raises:
        GroupError, ConfigError: as `score_dicts`.
    """
    _check_on_error(on_error)
    keys, results = KeyTally(), []
    file = source_files(Rows(rows))[0].requiring(False)
    items = file.read(keys=keys)
    while chunk := list(islice(items, CHUNK)):
        scored = iter(score([item for item in chunk if isinstance(item, Record)]))
        for item in chunk:
            result = next(scored) if isinstance(item, Record) else RecordError(item.code, item.message)
            if isinstance(result, RecordError):
                name = item.id if isinstance(item, Record) else item.record_id
                result = GroupError(len(results), name, result.code, result.message)
                if on_error == "raise":
                    raise result
            results.append(result)
    for line in unread_lines({file.path: keys}):
        warnings.warn(line, stacklevel=3)
    return results


def _check_on_error(on_error: str) -> None:
    if on_error not in ON_ERROR:
        raise ConfigError(f"on_error: got {on_error!r}, wanted one of {', '.join(ON_ERROR)}")


def score_dicts(
    score: ScoreRecords, groups: Sequence[Mapping], on_error: str = "raise"
) -> list[list[float] | GroupError]:
    """Return the rewards of groups as the Python API takes them.

    Args:
        score: of records, in order.
        on_error: raise, or return: an error stands in the place of the group's rewards.

    Raises:
        GroupError: for the first group that cannot be scored.
        ConfigError: for another `on_error`.
    """
    _check_on_error(on_error)
    if isinstance(groups, (dict, str, bytes)) or not isinstance(groups, Iterable):
        raise DataError(f"groups: got {describe(groups)}, wanted a list of groups: score([group])")
    groups = list(groups)
    results: list[list[float] | GroupError] = []
    records = []
    for number, group in enumerate(groups):
        try:
            records.append(_read_group(group, number))
            results.append([])
        except RecordError as error:
            results.append(group_error(number, group, error))
            if on_error == "raise":
                raise results[-1] from None
    scored = iter(score(records))
    for number, group in enumerate(groups):
        if isinstance(results[number], GroupError):
            continue
        result = next(scored)
        results[number] = group_error(number, group, result) if isinstance(result, RecordError) else result
    if on_error == "raise":
        for result in results:
            if isinstance(result, GroupError):
                raise result
    return results


def _read_group(group: object, number: int) -> Record:
    """Read a group of the Python API, or a row in another layout that data files have."""
    is_own = not isinstance(group, dict) or "responses" in group or messages.matches(group)
    if is_own or not any(layout.matches(group) for layout in LAYOUTS.values()):
        return group_record(group, number, require_preferences=False)
    (item,) = source_files(Rows([group]))[0].requiring(False).read()
    if isinstance(item, RefusedRow):
        raise RecordError(item.code, item.message)
    return item


def group_error(index: int, group: object, error: RecordError) -> GroupError:
    """Return the reason why a group of a call has no rewards, with its place in the call and its `id`."""
    name = group.get("id") if isinstance(group, dict) else None
    return GroupError(index, None if name is None else str(name), error.code, error.message)
