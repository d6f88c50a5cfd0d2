"""Counts, FLOPs and bytes of real models and real data, against Python's integers, which have no width."""

from fractions import Fraction

import numpy as np
import pytest

from fastrm.config import load_config
from fastrm.data.balance import divide, slowest_bound
from fastrm.data.batching import StepOrder, epoch_order
from fastrm.data.group import GroupSize, encode_group
from fastrm.data.prepared.select import select
from fastrm.data.prepared.stored import GROUP, SPLITS, PreparedSet, entries_of, make_index, num_records_of, store
from fastrm.data.tree import causal_pairs
from fastrm.data_config import SourceConfig
from fastrm.errors import DataError
from fastrm.train.encoder import find_backbone_config, make_data_encoder, make_tokenizer
from fastrm.train.step_cost import make_cost_model
from tests.helpers.epochs import ARCHITECTURES, IMAGE_SIZE, LONG, SHORT, LongAndShort, cost_model
from tests.helpers.prepared_sets import Made, config_of
from tests.helpers.runs import colour_rows, text_rows, tiny_config, write_rows


def ranked_rows(count: int) -> list[dict]:
    """Prompts of four ranked responses: six preferences each."""
    pairs = [[i, j] for i in range(4) for j in range(i + 1, 4)]
    texts = ["very good indeed", "rather good", "not so good", "bad"]
    return [
        {"id": f"r{n}", "prompt": f"Rank answer number {n}, please.", "responses": texts, "preferences": pairs}
        for n in range(count)
    ]


def exact_sharing(made: Made) -> tuple[int, int, Fraction]:
    """Tokens of an epoch, tokens of a pairwise trainer, and the quotient of their FLOPs, group by group."""
    architecture = find_backbone_config(made.config.model)
    cost = make_cost_model(architecture, made.config.model)
    encoder = make_data_encoder(made.config, architecture, make_tokenizer(made.config))
    tokens = unshared_tokens = shared = unshared = 0
    for record in made.train.records:
        group = encode_group(record, encoder)
        counted = GroupSize.of(group)
        tokens += counted.num_tokens
        shared += Fraction(cost.of_group(counted))
        lengths = [len(response.tokens) for response in group.responses]
        pictures = sum(Fraction(cost.of_medium(*size)) for _, *size in counted.media)
        for preference in group.preferences:
            for length in (lengths[preference.winner], lengths[preference.loser]):
                unshared_tokens += length
                unshared += cost.per_token * length + cost.per_attention_pair * causal_pairs(length) + pictures
    return tokens, unshared_tokens, unshared / shared


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_sharing_of_a_prepared_set_is_exact_at_the_widths_of_real_models(tmp_path, name):
    colour_rows(tmp_path, 12)
    write_rows(tmp_path / "text.jsonl", text_rows(8) + ranked_rows(8))
    sources = [{"path": str(tmp_path / "colours.jsonl")}, {"path": str(tmp_path / "text.jsonl"), "repeat": 2}]
    made = Made(config_of(tmp_path, *sources, model={"init": ARCHITECTURES[name]}))
    tokens, unshared_tokens, speedup = exact_sharing(made)
    sharing = made.report["sharing"]
    assert (sharing["tokens"], sharing["unshared_tokens"]) == (tokens, unshared_tokens)
    assert sharing["sharing_factor"] == unshared_tokens / tokens
    assert sharing["predicted_speedup"] == pytest.approx(float(speedup), rel=1e-12)


NUM_GROUPS = 3_000_001
# 2^37 tokens and 2^33 preferences in an epoch, of which half the groups are shown four times.
TIMES = 4


@pytest.fixture(scope="module")
def epoch(tmp_path_factory) -> LongAndShort:
    return LongAndShort(tmp_path_factory.mktemp("epoch"), NUM_GROUPS, TIMES)


@pytest.mark.parametrize("name", ["235B"])
def test_the_report_of_three_million_groups_is_exact(tmp_path, epoch, name):
    config = load_config(tiny_config(tmp_path, "train.jsonl"))
    cost = cost_model(name)
    report = epoch.report(config, cost)
    (row,) = report["sources"]
    for key, count in (
        ("epoch_tokens", "num_tokens"), ("epoch_preferences", "num_preferences"),
        ("epoch_unshared_tokens", "num_unshared_tokens"),
    ):  # fmt: skip
        assert row[key] == epoch.total(count) > 2**31
    assert row["tokens"] == epoch.num_long * LONG["num_tokens"] + epoch.num_short * SHORT["num_tokens"]
    shared, unshared = epoch.flops(cost)
    sharing = report["sharing"]
    assert (sharing["tokens"], sharing["unshared_tokens"]) == (
        epoch.total("num_tokens"), epoch.total("num_unshared_tokens"),
    )  # fmt: skip
    assert sharing["predicted_speedup"] == pytest.approx(float(unshared / shared), rel=1e-12)
    rows, columns, frames = IMAGE_SIZE
    assert report["histograms"]["image_tokens"]["edges"][-1] > 2 * rows * columns * frames


@pytest.fixture(scope="module")
def opened(epoch, tmp_path_factory) -> PreparedSet:
    """The epoch's index, written and opened as training opens it."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "index").mkdir()
    splits = {split: entries_of(epoch.chosen, epoch.counted, split) for split in SPLITS}
    index = make_index(epoch.table, epoch.counted, splits, [[1.0], []])
    for name, array in index.items():
        np.save(folder / "index" / f"{name}.npy", array)
    counts = {"fingerprint": "", "num_records": num_records_of(index, splits["train"]), "num_ties_ignored": 0}
    manifest = {"splits": {"train": counts | {"num_preferences": 0}}, "units": ["unit"]}
    return PreparedSet(folder, "train", manifest, load_config(tiny_config(folder, "train.jsonl")))


def test_an_index_of_three_million_groups_holds_what_was_counted(epoch, opened):
    assert opened.num_records == NUM_GROUPS
    assert len(opened) == TIMES * epoch.num_long + epoch.num_short
    for number, kind in ((len(opened) - 1, LONG), (len(opened) - TIMES - 1, SHORT), (0, LONG)):
        group = opened.groups[number]
        assert {name: getattr(group, name) for name in ("num_tokens", "num_attention_pairs", "num_lead_tokens")} == {
            name: kind[name] for name in ("num_tokens", "num_attention_pairs", "num_lead_tokens")
        }
        assert [image.num_tokens for image in group.media] == [64 * 128] * kind["num_images"]
        assert all(type(value) is int for value in (group.num_tokens, group.num_attention_pairs))
    assert int(opened.preference_counts.sum()) == epoch.total("num_preferences") > 2**33
    last = opened._arrays.records[NUM_GROUPS - 1]
    assert int(last["offset"]) == (NUM_GROUPS - 1) * 40_000 > 2**36


def test_the_steps_of_an_epoch_with_more_than_2_to_the_33_preferences_hold_each_group_once(epoch, opened):
    batch = 2**24
    counts = opened.preference_counts
    order = StepOrder(counts, batch, seed=2**63 - 1)
    seen, position, pairs = np.zeros(len(opened), dtype=bool), 0, 0
    for _, (after, members) in zip(range(order.steps_in_epoch(0)), order.steps_from(0), strict=False):
        assert not seen[members].any() and after == position + len(members)
        seen[members], position = True, after
        of_step = sum(counts[members].tolist())
        assert of_step >= batch or after == len(opened)
        pairs += of_step
    assert seen.all() and pairs == epoch.total("num_preferences")
    # Positions count the groups of all epochs, in Python's integers.
    assert next(order.steps_from(10**9 * len(opened)))[0] > 2**52


def test_orders_of_the_largest_seeds_and_epochs_are_permutations():
    for seed, number in ((0, 0), (2**63 - 1, 2**63), (2**63 - 1, 2**31)):
        assert np.array_equal(np.sort(epoch_order(seed, number, 1000)), np.arange(1000))


def test_a_cap_of_more_than_2_to_the_31_preferences_is_kept_to(epoch):
    cap = 2**31 + 1_499
    source = SourceConfig(path="train.jsonl", cap=cap, repeat=2.0)
    chosen = select(epoch.table, np.ones(NUM_GROUPS, dtype=bool), [source], merge=False, ties_weigh=2)
    assert set(np.unique(chosen.times).tolist()) == {0, 2}
    assert int((chosen.times > 0).sum()) == cap // 1_500
    assert int(chosen.times.sum()) * 1_500 > 2**32


def test_a_value_that_an_index_has_no_room_for_is_refused_and_not_wrapped():
    rows = np.zeros(2, dtype=GROUP)
    store(rows, "num_tokens", np.array([1, 2**32 - 1]))
    assert rows["num_tokens"].tolist() == [1, 2**32 - 1]
    with pytest.raises(DataError, match=r"room for num_tokens up to 4,294,967,295, got 4,294,967,296; divide data"):
        store(rows, "num_tokens", np.array([1, 2**32]))


@pytest.mark.parametrize("name", ["7B", "72B", "235B"])
def test_ranks_are_balanced_alike_in_flops_and_in_units_of_a_million(name):
    cost = cost_model(name)
    lengths = np.random.default_rng(0).integers(100, 32_768, 4_096).tolist()
    costs = [cost.of_group(GroupSize(n, 1, n * (n + 1) // 2)) for n in lengths]
    assert sum(costs) > 2**63 // 4 or name == "7B"
    ranks = divide(costs, 64)
    assert sorted(item for rank in ranks for item in rank) == list(range(len(costs)))
    slowest = max(sum(Fraction(costs[item]) for item in rank) for rank in ranks)
    mean = sum(map(Fraction, costs)) / 64
    assert mean <= slowest <= Fraction(1006, 1000) * mean
    assert slowest_bound(costs, 64) == pytest.approx(float(mean), rel=1e-12)
    assert divide([value // 10**6 for value in costs], 64) == ranks
