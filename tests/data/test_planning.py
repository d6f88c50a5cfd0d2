"""Trees from tokens, order, steps and packs: exact, and complete by enumeration."""

import random
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from fastrm.data.balance import CostModel
from fastrm.data.batching import PackPlan, StepOrder, epoch_order, plan_packs, plan_steps
from fastrm.data.group import GroupMedium, GroupSize, encode_group
from fastrm.data.loader import PackBuilder
from fastrm.data.record import Message, Record, Response
from fastrm.data.tree import build_tree
from tests.helpers.support import make_image, make_model, make_record, pack_of


def _paths(tree, sequences):
    """Every sequence, put together again from its segment's path."""
    found = []
    for segment, offset in tree.ends:
        chain, node = [], segment
        while node >= 0:
            chain.insert(0, node)
            node = tree.parents[node]
        tokens = np.concatenate([sequences[s][a:b] for s, a, b in (tree.spans[n] for n in chain)])
        cut = len(tokens) - (tree.lengths[segment] - 1 - offset)
        found.append(tokens[:cut])
    return found


def _random_sequences(rng):
    trunk = [rng.randrange(5) for _ in range(rng.randint(0, 60))]
    sequences = []
    for _ in range(rng.randint(1, 12)):
        base = rng.choice([trunk, *[s.tolist() for s in sequences]]) if sequences else trunk
        keep = rng.randint(0, len(base))
        sequences.append(np.array(base[:keep] + [rng.randrange(5) for _ in range(rng.randint(0, 40))] or [0]))
    return sequences


@pytest.mark.parametrize("min_shared", [1, 4, 16])
def test_every_sequence_is_a_path_of_its_tree(min_shared):
    rng = random.Random(min_shared)
    for _ in range(300):
        sequences = _random_sequences(rng)
        tree = build_tree(sequences, min_shared=min_shared)
        assert all(np.array_equal(a, b) for a, b in zip(_paths(tree, sequences), sequences, strict=True))
        assert all(-1 <= parent < number for number, parent in enumerate(tree.parents))
        assert sum(tree.lengths) <= sum(map(len, sequences))
        for number, (_, start, stop) in enumerate(tree.spans):
            if number in tree.parents:
                assert stop - start >= min_shared


def test_sharing_is_complete_when_every_cut_is_allowed():
    """With min_shared 1 the tree is a trie: as many tokens as there are distinct prefixes."""
    rng = random.Random(7)
    for _ in range(200):
        sequences = _random_sequences(rng)
        prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
        assert sum(build_tree(sequences, min_shared=1).lengths) == len(prefixes)


def test_a_response_that_begins_another_ends_inside_it():
    long, short = np.arange(50), np.arange(30)
    tree = build_tree([long, short, short])
    assert tree.spans == [(0, 0, 30), (0, 30, 50)]
    assert tree.ends == [(1, 19), (0, 29), (0, 29)]


def test_a_shared_run_too_short_for_all_is_still_shared_by_those_who_go_further():
    common = [1, 2, 3]
    deep = common + list(range(10, 60))
    tree = build_tree([np.array([*common, 9]), np.array([*deep, 7]), np.array([*deep, 8])])
    assert tree.lengths == [4, 53, 1, 1] and tree.parents == [-1, -1, 1, 1]


def test_not_sharing_gives_one_root_each():
    tree = build_tree([np.arange(20), np.arange(20)], share=False)
    assert tree.parents == [-1, -1] and tree.lengths == [20, 20] and tree.ends == [(0, 19), (1, 19)]


def test_images_share_only_when_their_content_is_the_same():
    """Also inside one group, where nothing but the tokens' content keys keeps two images apart."""
    network = make_model("qwen2_5_vl")
    one, same, other = make_image(56, 56, 1), make_image(56, 56, 1), make_image(56, 56, 2)
    answer = Message("assistant", ("yes",))
    sizes = {}
    for name, pair in {"same": (one, same), "other": (one, other)}.items():
        responses = tuple(Response((Message("user", (image, "Describe it.")), answer)) for image in pair)
        pack = pack_of(network, [Record("images", responses, (), "test", "test:1")])
        sizes[name] = (len(pack.media_grids), pack.num_tokens)
    assert sizes["same"][0] == 1 and sizes["other"][0] == 2
    assert sizes["same"][1] < sizes["other"][1]


def test_order_is_pinned():
    """Golden values: another order would make old runs impossible to resume."""
    assert epoch_order(0, 0, 10).tolist() == [2, 5, 8, 9, 1, 4, 6, 0, 3, 7]
    assert epoch_order(7, 3, 10).tolist() == [4, 8, 7, 6, 9, 2, 5, 0, 1, 3]


def test_order_is_a_permutation_and_differs_by_seed_and_epoch():
    seen = set()
    for seed in range(5):
        for epoch in range(5):
            order = epoch_order(seed, epoch, 257)
            assert sorted(order) == list(range(257))
            seen.add(tuple(order))
    assert len(seen) == 25


def test_every_group_once_per_epoch_and_resume_at_every_step():
    rng = random.Random(0)
    for count in [*range(1, 40), 257]:
        sizes = [rng.choice([1, 1, 1, 6, 15]) for _ in range(count)]
        order = StepOrder(sizes, batch_pairs=8, seed=count)
        steps = [step for step, _ in zip(order.steps_from(0), range(3 * count), strict=False)]
        for epoch in range(2):
            inside = [groups for after, groups in steps if epoch * count < after <= (epoch + 1) * count]
            assert sorted(np.concatenate(inside)) == list(range(count))
            assert len(inside) == order.steps_in_epoch(epoch)
            for groups in inside[:-1]:
                total = sum(sizes[g] for g in groups)
                assert total >= 8 and total - sizes[groups[-1]] < 8
        for number, (after, _) in enumerate(steps[:-1]):
            position, groups = next(StepOrder(sizes, 8, count).steps_from(after))
            assert (position, groups.tolist()) == (steps[number + 1][0], steps[number + 1][1].tolist())


def test_plain_pairs_make_batches_of_exactly_the_wanted_size():
    order = StepOrder([1] * 1000, batch_pairs=128, seed=0)
    assert [len(groups) for _, (_, groups) in zip(range(8), order.steps_from(0), strict=False)] == [128] * 7 + [104]


def test_a_position_inside_a_step_is_refused():
    with pytest.raises(ValueError, match="no step starts at position 3"):
        next(StepOrder([1] * 100, 10, 0).steps_from(3))


def test_a_pack_is_never_longer_than_its_groups_were_counted():
    """Also when the responses of one group have different images, and groups share theirs."""
    network = make_model("qwen2_5_vl")
    rng = np.random.default_rng(0)
    images = [make_image(56, 56, n) for n in range(3)]
    for seed in range(20):
        records = []
        for number in range(int(rng.integers(1, 4))):
            record = make_record(100 * seed + number, num_responses=3, prompt="same " * 30)
            answers = [response.messages[-1] for response in record.responses]
            prompts = [Message("user", ("same " * 30, images[rng.integers(3)])) for _ in answers]
            pairs = zip(prompts, answers, strict=True)
            records.append(replace(record, responses=tuple(Response((prompt, answer)) for prompt, answer in pairs)))
        counted = [sum(encode_group(record, network.encoder).tree().lengths) for record in records]
        assert pack_of(network, records).num_tokens <= sum(counted)


def _group(num_tokens, image=None) -> GroupSize:
    return GroupSize(num_tokens, 1, media=(GroupMedium(image, 1, 1),) if image else ())


def test_packs_hold_every_group_once_within_the_budget():
    rng = random.Random(0)
    for _ in range(300):
        count = rng.randint(1, 60)
        sizes = [rng.randint(1, 100) for _ in range(count)]
        packs = plan_packs(range(count), [_group(size, rng.choice([None, "a", "b"])) for size in sizes], budget=120)
        assert sorted(g for pack in packs for g in pack) == list(range(count))
        assert all(sum(sizes[g] for g in pack) <= 120 for pack in packs)
        assert len(packs) <= 11 / 9 * sum(sizes) / 60 + 2  # a full pack is more than half full


def test_groups_with_the_same_image_share_a_pack_where_they_fit():
    packs = plan_packs(range(6), [_group(10, image) for image in ["a", "b"] * 3], budget=30)
    assert sorted(map(sorted, packs)) == [[0, 2, 4], [1, 3, 5]]


COST = CostModel(1.0, 1e-3, per_media_token=3.0, per_media_pair=0.01, per_window_pair=0.02, window=4)
BUDGET = 500


def _sizes(rng, count) -> list[GroupSize]:
    """Groups of every size that fits, some with many preferences, some of one image."""
    groups = []
    for _ in range(count):
        num_tokens = min(BUDGET, int(rng.lognormvariate(4, 1)) + 1)
        image = GroupMedium(rng.choice("abcdefgh"), rng.randint(1, 9), rng.randint(1, 9))
        images = (image,) if num_tokens > 90 and rng.random() < 0.5 else ()
        pairs = rng.randint(0, num_tokens**2 // 2)
        groups.append(GroupSize(num_tokens, rng.choice([1, 1, 6]), pairs, images, 20 * len(images)))
    return groups


def _steps(plans, count) -> list[list[PackPlan]]:
    """The packs of the first `count` steps."""
    steps = [[]]
    while len(steps) <= count:
        steps[-1].append(next(plans))
        if steps[-1][-1].is_last:
            steps.append([])
    return steps[:-1]


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 50])
def test_ranks_divide_every_step_completely_into_as_many_packs_each(num_ranks):
    for seed in range(25):
        rng = random.Random(seed)
        groups = _sizes(rng, rng.randint(1, 120))
        order = StepOrder([group.num_preferences for group in groups], rng.randint(1, 100), seed)
        cost = rng.choice([COST, None])
        alone = _steps(plan_steps(groups, order, 0, BUDGET), 4)
        ranks = [
            _steps(plan_steps(groups, order, 0, BUDGET, rank=rank, num_ranks=num_ranks, cost=cost), 4)
            for rank in range(num_ranks)
        ]
        for wanted, found in zip(alone, zip(*ranks, strict=True), strict=True):
            members = sorted(group for pack in wanted for group in pack.groups)
            assert sorted(group for packs in found for pack in packs for group in pack.groups) == members
            assert {pack.position for packs in found for pack in packs} == {wanted[0].position}
            assert len({len(packs) for packs in found}) == 1
            for packs in found:
                assert [pack.is_last for pack in packs] == [False] * (len(packs) - 1) + [True]
                assert all(sum(groups[g].num_tokens for g in pack.groups) <= BUDGET for pack in packs)
            # Nobody waits for a pack that none of them has.
            assert all(any(packs[slot].groups for packs in found) for slot in range(len(found[0])))


def test_plans_resume_at_every_step_on_every_rank():
    groups = _sizes(random.Random(3), 90)
    order = StepOrder([group.num_preferences for group in groups], 20, 3)
    for rank in range(3):
        options = {"rank": rank, "num_ranks": 3, "cost": COST}
        steps = _steps(plan_steps(groups, order, 0, BUDGET, **options), 12)
        for number, step in enumerate(steps[:-1]):
            resumed = plan_steps(groups, order, step[-1].position, BUDGET, **options)
            assert list(islice(resumed, len(steps[number + 1]))) == steps[number + 1]


def test_plan_of_one_rank_is_pinned():
    """Golden values, from before ranks were planned for: old runs resume to the bit."""
    sizes = [30, 70, 20, 90, 45, 60, 10, 80]
    images = [None, "a", "b", "a", None, "b", "b", None]
    groups = [_group(size, image) for size, image in zip(sizes, images, strict=True)]
    plans = list(islice(plan_steps(groups, StepOrder([1] * 8, 5, 0), 0, 120), 8))
    assert plans[:4] == [
        PackPlan((2, 5, 6), 5, False),
        PackPlan((1, 4), 5, True),
        PackPlan((3, 0), 8, False),
        PackPlan((7,), 8, True),
    ]
    assert [plan.groups for plan in plans[4:]] == [(3, 0), (7,), (1,), (5,)]


def test_a_rank_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="rank 2 of 2: wanted 0 to 1"):
        next(plan_steps([], StepOrder([1], 1, 0), 0, 10, rank=2, num_ranks=2))


@pytest.mark.parametrize("num_groups", [1, 3])
def test_a_rank_without_groups_has_an_empty_plan_and_no_pack(num_groups):
    groups = [_group(10)] * num_groups
    order = StepOrder([1] * num_groups, num_groups, 0)
    plans = [next(plan_steps(groups, order, 0, 100, rank=rank, num_ranks=4)) for rank in range(4)]
    assert sorted(map(len, (plan.groups for plan in plans))) == [0] * (4 - num_groups) + [1] * num_groups
    assert all(plan.is_last for plan in plans)
    empty = next(plan for plan in plans if not plan.groups)
    loaded = PackBuilder([], make_model("qwen2").encoder, share=True)[empty]
    assert (loaded.plan, loaded.pack, loaded.refused) == (empty, None, [])


def test_packs_of_all_ranks_are_alike_in_turn():
    """Where ranks wait for one another at every pack, that costs little more than once a step."""
    rng = random.Random(5)
    groups = [_group(rng.randint(5, 60)) for _ in range(400)]
    order = StepOrder([1] * 400, 400, 0)
    ranks = [_steps(plan_steps(groups, order, 0, BUDGET, rank=rank, num_ranks=8), 1)[0] for rank in range(8)]
    costs = np.array([[sum(groups[g].num_tokens for g in pack.groups) for pack in packs] for packs in ranks])
    assert costs.shape == (8, 4)
    assert costs.max(0).sum() <= 1.03 * costs.sum() / 8
