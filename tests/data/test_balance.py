"""What groups cost, and how costs are divided over ranks: against arithmetic by hand and by enumeration."""

import itertools
import random

import numpy as np
import pytest
import torch
from transformers import AutoModel

from fastrm.config import ModelConfig
from fastrm.data.balance import CostModel, divide, slowest_bound
from fastrm.data.batching import Bundle, StepDivision, divide_step
from fastrm.data.group import GroupMedium, GroupSize, encode_group
from fastrm.data.tree import build_tree
from fastrm.forecast.flops import step_flops
from fastrm.forecast.workload import Workload
from fastrm.model.architectures import find_architecture, meta_network
from fastrm.train.step_cost import make_cost_model
from tests.helpers.support import FAMILIES, make_image, make_model, make_record, pack_of


def _size(num_tokens, image=None, num_lead_tokens=0) -> GroupSize:
    images = (GroupMedium(image, 4, 4),) if image else ()
    return GroupSize(num_tokens, 1, 0, images, num_lead_tokens)


def _loads(ranks, costs) -> list[float]:
    return [sum(costs[item] for item in rank) for rank in ranks]


def _visible_pairs(lengths, parents) -> int:
    """Keys that each token sees, one token at a time."""
    path, pairs = [], 0
    for length, parent in zip(lengths, parents, strict=True):
        before = path[parent] if parent >= 0 else 0
        pairs += sum(before + seen for seen in range(1, length + 1))
        path.append(before + length)
    return pairs


def test_attention_pairs_of_a_tree_are_those_that_its_tokens_see():
    rng = np.random.default_rng(0)
    for _ in range(200):
        trunk = rng.integers(0, 4, rng.integers(1, 40))
        sequences = [
            np.concatenate([trunk[: rng.integers(0, len(trunk) + 1)], rng.integers(0, 4, rng.integers(1, 20))])
            for _ in range(rng.integers(1, 6))
        ]
        tree = build_tree(sequences, share=bool(rng.integers(2)), min_shared=int(rng.integers(1, 8)))
        assert tree.num_attention_pairs == _visible_pairs(tree.lengths, tree.parents)


@pytest.mark.parametrize("share", [True, False])
def test_a_group_size_counts_what_its_pack_holds(share):
    network = make_model("qwen2_5_vl")
    image, other = make_image(84, 140, 1), make_image(56, 28, 2)
    for images in [(), (image,), (image, other, image)]:
        record = make_record(3, num_responses=4, images=images)
        size = GroupSize.of(encode_group(record, network.encoder), share)
        pack = pack_of(network, [record], share)
        assert (size.num_tokens, size.num_preferences) == (pack.num_tokens, pack.num_preferences)
        assert size.num_attention_pairs == _visible_pairs(pack.lengths, pack.parents)
        grids = [[rows // 2, columns // 2] for _, rows, columns in pack.media_grids]
        assert [[found.height, found.width] for found in size.media] == grids
        assert [found.key for found in size.media] == [ref.key for ref in dict.fromkeys(images)]
        assert (size.num_lead_tokens > 15) == bool(share and images)
        assert size.first_medium == (images[0].key if images else None)


def test_groups_that_begin_with_one_image_share_its_lead_in_a_pack():
    network = make_model("qwen2_5_vl")
    image = make_image(84, 140, 1)
    # The questions differ from their first character on, so that nothing behind the image is shared.
    records = [make_record(n, images=(image,), prompt=f"{n} {'cat dog ' * 9}") for n in (1, 2, 3)]
    groups = [GroupSize.of(encode_group(record, network.encoder)) for record in records]
    lead = groups[0].num_lead_tokens
    assert lead > 15 and {group.num_lead_tokens for group in groups} == {lead}
    pack = pack_of(network, records)
    shared = lead + 1  # the end-of-image token, which the lead leaves out
    assert pack.num_tokens == sum(group.num_tokens for group in groups) - 2 * shared
    pairs = sum(group.num_attention_pairs for group in groups) - 2 * (shared * (shared + 1) // 2)
    assert _visible_pairs(pack.lengths, pack.parents) == pairs


def test_cost_of_a_group_adds_text_and_images_with_windows_cut_at_the_edge():
    model = CostModel(2.0, 0.5, per_media_token=10.0, per_media_pair=0.1, per_window_pair=0.01, window=4)
    group = GroupSize(100, 1, 5050, (GroupMedium("a", 6, 9), GroupMedium("b", 4, 4)), 60)
    # 6 x 9 falls into windows of heights 4, 2 and widths 4, 4, 1.
    windows = sum((height * width) ** 2 for height in (4, 2) for width in (4, 4, 1))
    first = 10 * 54 + 0.1 * 54**2 + 0.01 * windows
    second = 10 * 16 + 0.1 * 16**2 + 0.01 * 16**2
    assert model.of_group(group) == pytest.approx(2 * 100 + 0.5 * 5050 + first + second, rel=1e-12)
    assert model.saved(group) == pytest.approx(first + 2 * 60 + 0.5 * 60 * 61 / 2, rel=1e-12)
    assert model.saved(_size(100)) == 0.0


def test_windows_are_those_of_the_stock_vision_tower():
    config = make_model("qwen2_5_vl").model.config
    tower = AutoModel.from_config(config, attn_implementation="eager").visual
    ends = []
    # Block 0 has windows: what it is given are their bounds.
    tower.blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: ends.append(kwargs["cu_seqlens"].tolist()), with_kwargs=True
    )
    model = make_cost_model(config, ModelConfig(init=FAMILIES["qwen2_5_vl"], tokenizer="unused"))
    assert model.window == 2
    counts = CostModel(0.0, per_window_pair=1.0, window=model.window)
    for height, width in itertools.product(range(1, 6), range(1, 6)):
        grid = torch.tensor([[1, 2 * height, 2 * width]])
        with torch.no_grad():
            tower(torch.zeros(4 * height * width, 3 * 2 * 14 * 14), grid_thw=grid)
        sizes = np.diff(sorted(set(ends.pop()))) // 4
        assert counts.of_medium(height, width) == (sizes**2).sum(), (height, width)


FREEZES = [[], ["vision"], ["vision", "projector"], ["language"], ["projector", "language"]]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B-Instruct", "Qwen2-VL-2B-Instruct", "Qwen3-VL-4B-Instruct"])
def test_cost_model_has_the_flops_of_the_whole_step(name, checkpointing):
    for freeze in FREEZES:
        settings = ModelConfig(path=name, freeze=freeze, activation_checkpointing=checkpointing)
        config, _ = find_architecture(settings)
        model, network = make_cost_model(config, settings), meta_network(config, settings)

        def flops(load, network=network):
            options = {"shared": True, "images_once": True, "pruned": True, "checkpointing": checkpointing == "full"}
            return {part: count.total for part, count in step_flops(network, load, **options).items()}

        # 16 x 16 tokens are whole windows; the text has as many tokens, so that only vision differs.
        seen, text, anchors = (flops(Workload(1, *parts)) for parts in [(256, 44, 30), (0, 300, 30), (0, 0, 0)])
        assert model.of_medium(16, 16) == sum(seen.values()) - sum(text.values())
        assert 360 * model.per_token == text["language"] - anchors["language"]
        layers, pairs = config.get_text_config().num_hidden_layers, Workload(1, 0, 300, 30)
        every_layer = (layers - 1) * pairs.attention_pairs(shared=True)
        attention = text["attention"] * every_layer / (every_layer + pairs.anchor_pairs)
        assert model.per_attention_pair * pairs.attention_pairs(shared=True) == pytest.approx(attention, rel=1e-12)


@pytest.mark.parametrize("pooling", ["anchor", "mean"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_cost_model_of_tiles_and_means_has_the_flops_of_the_whole_step(checkpointing, pooling):
    for freeze in FREEZES:
        settings = ModelConfig(
            path="InternVL3-1B-hf", freeze=freeze, activation_checkpointing=checkpointing, pooling=pooling
        )
        config, _ = find_architecture(settings)
        model, network = make_cost_model(config, settings), meta_network(config, settings)
        options = {"shared": True, "images_once": True, "checkpointing": checkpointing == "full"}

        def flops(*parts, network=network, options=options):
            counted = step_flops(network, Workload(1, *parts), **options, pruned=pooling == "anchor")
            return {part: count.total for part, count in counted.items()}

        # Three tiles; the text has as many tokens, so that only vision differs.
        seen, text, anchors = flops(768, 44, 30), flops(0, 812, 30), flops(0, 0, 0)
        # The cost model leaves the class token out, one row in a thousand.
        assert model.of_medium(16, 16, 3) == pytest.approx(sum(seen.values()) - sum(text.values()), rel=2.5e-3)
        assert 872 * model.per_token == text["language"] - anchors["language"]


def test_text_models_have_a_cost_too():
    settings = ModelConfig(path="Qwen2.5-VL-3B-Instruct")
    config, _ = find_architecture(settings)
    text = make_cost_model(config.get_text_config(), settings)
    both = make_cost_model(config, settings)
    assert (text.per_token, text.per_attention_pair) == (both.per_token, both.per_attention_pair)
    assert text.of_medium(16, 16) == 0 < both.of_medium(16, 16)


def _best_possible(costs, num_ranks) -> int:
    return min(
        max(sum(c for c, r in zip(costs, owner, strict=True) if r == rank) for rank in range(num_ranks))
        for owner in itertools.product(range(num_ranks), repeat=len(costs))
    )


def test_divide_is_near_the_best_division_and_never_below_the_bound():
    rng, exact = random.Random(0), 0
    for _ in range(120):
        num_ranks = rng.choice([2, 3])
        costs = [rng.randint(1, 100) for _ in range(rng.randint(1, 8))]
        best, bound = _best_possible(costs, num_ranks), slowest_bound(costs, num_ranks)
        slowest = max(_loads(divide(costs, num_ranks), costs))
        assert bound <= best <= slowest <= 1.09 * best
        exact += slowest == best
    assert exact >= 100


def test_exchanges_mend_what_longest_first_gets_wrong():
    """Graham's worst case for three ranks: longest first alone ends at 11."""
    costs = [5, 5, 4, 4, 3, 3, 3]
    assert sorted(_loads(divide(costs, 3), costs)) == [9, 9, 9]


def test_divide_gives_each_item_to_one_rank_and_counts_in_whole_numbers():
    rng = random.Random(1)
    for num_ranks in (1, 2, 7, 64):
        costs = [rng.lognormvariate(30, 1) for _ in range(rng.randint(1, 300))]
        ranks = divide(costs, num_ranks)
        assert len(ranks) == num_ranks and sorted(itertools.chain(*ranks)) == list(range(len(costs)))
        # The unit is free: FLOPs of a small and of a large model give the same division.
        assert divide([2.0**-40 * cost for cost in costs], num_ranks) == ranks
    assert divide([1.0], 3) == [[0], [], []] and divide([0.0, 0.0], 1) == [[0, 1]]


def test_slowest_rank_is_within_five_percent_of_the_mean_with_many_groups():
    rng = random.Random(2)
    for num_ranks in (8, 64):
        costs = [rng.lognormvariate(0, 0.8) for _ in range(16 * num_ranks)]
        loads = _loads(divide(costs, num_ranks), costs)
        assert max(loads) <= 1.05 * sum(loads) / num_ranks


def test_clusters_stay_together_while_that_costs_nothing():
    groups = [_size(100, image) for image in "abcdabcd"]
    model = CostModel(1.0, per_media_token=50.0)
    division = divide_step(range(8), groups, 1000, 2, model)
    found = sorted(bundle.groups for rank in division.bundles for bundle in rank)
    assert found == [(0, 4), (1, 5), (2, 6), (3, 7)]
    # 100 + 100 tokens and one image of 16 x 50.
    assert {bundle.cost for rank in division.bundles for bundle in rank} == {1000.0}


def test_a_cluster_that_would_hold_up_a_rank_is_cut():
    """Eight groups of one image on four ranks: whole, three ranks would wait for the fourth."""
    groups = [_size(100, "a") for _ in range(8)]
    division = divide_step(range(8), groups, 1000, 4, CostModel(1.0, per_media_token=1.0))
    assert [[bundle.groups for bundle in rank] for rank in division.bundles] == [[(0, 1)], [(2, 3)], [(4, 5)], [(6, 7)]]
    # An image so costly that no cut pays: a rank with all of it is the fastest way.
    dear = divide_step(range(8), groups, 1000, 4, CostModel(1.0, per_media_token=1e6))
    assert max(sum(b.cost for b in rank) for rank in dear.bundles) <= 8 * 100 + 16e6


def test_packs_of_a_rank_are_even_and_costliest_first():
    bundles = [Bundle((n,), 10, float(cost)) for n, cost in enumerate([9, 8, 7, 3, 2, 1])]
    packs = StepDivision([bundles], num_packs=3, budget=60).packs(0)
    assert packs == [(0, 5), (1, 4), (2, 3)]
    # What does not fit evenly is put where it fits.
    tight = [Bundle((0,), 50, 1.0), Bundle((1,), 30, 9.0), Bundle((2,), 30, 8.0), Bundle((3,), 10, 2.0)]
    assert StepDivision([tight], 2, 60).packs(0) == [(1, 2), (0, 3)]
    # Costly ones first, one in each pack, would leave no room for the long one.
    long = [Bundle((0,), 50, 1.0), Bundle((1,), 20, 9.0), Bundle((2,), 20, 8.0), Bundle((3,), 20, 7.0)]
    assert StepDivision([long], 3, 60).packs(0) == [(1, 3), (2,), (0,)]
    assert StepDivision([long[:1]], 3, 60).packs(0) == [(0,), (), ()]
