"""Work lists of the tree attention kernels: against the definition of what is visible, and their efficiency."""

import random
import re
from pathlib import Path

import torch

from fastrm_kernels import TreeLayout
from fastrm_kernels.tree_attention.reference import visible
from fastrm_kernels.tree_attention.tiles import Blocks, pick_blocks, work_lists
from kernel_cases.trees import SMALL, random_tree, shuffled_tree

README = Path(__file__).parents[1] / "fastrm_kernels" / "tree_attention" / "README.md"  # no part of the wheel


def seen_by_steps(listed, num_rows, num_others):
    """How often the steps of a tile list join each (row, other row), and which of them need no mask."""
    count = torch.zeros(num_rows, num_others, dtype=torch.int32)
    unmasked = torch.zeros(num_rows, num_others, dtype=torch.bool)
    for start, end, begin, masked, last in listed.tiles.tolist():
        for step in range(begin, last):
            a, b = listed.steps[step].tolist()
            count[start:end, a:b] += 1
            if step < masked:
                unmasked[start:end, a:b] = True
    return count, unmasked


def layouts(rng):
    for case in range(120):
        lengths, parents = shuffled_tree(rng) if case % 3 == 0 else random_tree(rng, max_segments=14)
        layout = TreeLayout.build(lengths, parents)
        if case % 4 == 3 and layout.num_keys:
            layout = layout.at_rows([rng.randrange(layout.num_keys) for _ in range(rng.randint(1, 9))])
        yield layout, True
        yield TreeLayout.from_lengths(lengths), False


def test_work_lists_join_every_visible_pair_once():
    rng = random.Random(0)
    for layout, causal in layouts(rng):
        blocks = Blocks(
            rng.choice([4, 16, 128]), rng.choice([4, 16]), rng.choice([4, 16, 64]), rng.choice([4, 32]), *[0] * 5
        )
        work = work_lists(layout, blocks, causal)
        truth = visible(layout, causal)
        (low, high), rank = work.key_bounds.unbind(1), work.query_rank
        assert torch.equal((low <= rank[:, None]) & (rank[:, None] < high), truth)
        for listed, shown, rows, step in (
            (work.query_tiles, truth, blocks.query_tile, blocks.key_step),
            (work.key_tiles, truth.T, blocks.key_tile, blocks.query_step),
        ):
            count, unmasked = seen_by_steps(listed, *shown.shape)
            assert (count <= 1).all()
            assert (count[shown] == 1).all(), (layout.lengths, layout.parents)
            assert shown[unmasked].all(), (layout.lengths, layout.parents)
            bounds = sorted(tuple(tile[:2]) for tile in listed.tiles.tolist())
            assert [row for a, b in bounds for row in range(a, b)] == list(range(shown.shape[0]))
            assert all(0 < b - a <= rows for a, b in bounds)
            sizes = [last - begin for _, _, begin, _, last in listed.tiles.tolist()]
            assert sizes == sorted(sizes, reverse=True)
            for _, _, begin, masked, _ in listed.tiles.tolist():
                # Steps without a mask read whole blocks.
                assert all(b - a == step for a, b in listed.steps[begin:masked].tolist())


def num_steps(layout, causal=True):
    return len(work_lists(layout, Blocks(128, 64, 128, 64, 8, 8, 3, 2, 2), causal).query_tiles.steps)


def test_short_responses_share_tiles_against_their_prefix():
    # 1280 prefix rows are ten tiles of 2, 4, .. 20 steps. 16 responses of 40 tokens are five tiles of 20
    # prefix steps and at most 3 of their own, where a tile for each would take 16 * 21.
    prefix = num_steps(TreeLayout.from_lengths([1280]))
    assert prefix == 110
    assert num_steps(TreeLayout.build([1280] + [40] * 16, [-1] + [0] * 16)) <= prefix + 5 * 23


def test_a_tile_does_not_straddle_two_trees_for_nothing():
    alone = num_steps(TreeLayout.from_lengths([1280]))
    assert num_steps(TreeLayout.from_lengths([100, 1280, 1280])) <= 2 * alone + 2 + 20


def test_small_windows_share_tiles():
    work = work_lists(TreeLayout.from_lengths([64] * 10), Blocks(128, 64, 128, 64, 8, 8, 3, 2, 2), False)
    assert len(work.query_tiles.tiles) == 5


def test_work_lists_are_built_once_and_move_with_the_layout():
    layout = TreeLayout.build([30, 10], [-1, 0])
    first = work_lists(layout, SMALL, True)
    assert work_lists(layout, SMALL, True) is first
    moved = layout.to("meta")
    assert work_lists(moved, SMALL, True).query_tiles.steps.device.type == "meta"
    assert [x.shape for x in work_lists(moved, SMALL, True).tensors()] == [x.shape for x in first.tensors()]
    for x in first.tensors():
        assert x.is_contiguous() and x.data_ptr() % 16 == 0


def test_the_heads_of_a_group_are_divided_where_one_prefix_is_long():
    blocks = pick_blocks(torch.bfloat16, 128, False)
    even = work_lists(TreeLayout.from_lengths([256] * 64), blocks, True).key_tiles
    long = work_lists(TreeLayout.build([300] + [300] * 16, [-1] + [0] * 16), blocks, True).key_tiles
    assert even.parts_wanted(4, 7) == 1
    assert long.parts_wanted(4, 7) == 7
    # By hand: the longest of 790 steps in all is 160, so 960 for six heads. With 32 key heads a multiprocessor's
    # share is 790 * 32 * 6 / 132 = 1149, of which 0.7 are 804: two parts of 480. With 16 it is 402: three of 320.
    assert (len(long.steps), long.longest) == (790, 160)
    assert [long.parts_wanted(heads, 6) for heads in (32, 16, 2)] == [2, 3, 6]


def test_the_readmes_table_of_efficiency_is_true():
    """Visible pairs over products done, in the query tiles of packs of about 16,000 tokens."""
    text = README.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) / (\d+) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 6
    blocks = pick_blocks(torch.bfloat16, 128, False)
    for prefix, response, cells in ((int(p), int(r), cells.split(" | ")) for p, r, cells in rows):
        for number, cell in zip((2, 4, 8, 16), cells, strict=True):
            trees = max(1, 16384 // (prefix + number * response))
            parents = [
                root if n else -1 for root in range(0, trees * (number + 1), number + 1) for n in range(number + 1)
            ]
            layout = TreeLayout.build(([prefix] + [response] * number) * trees, parents)
            visible_pairs = prefix * (prefix + 1) // 2 + number * (prefix * response + response * (response + 1) // 2)
            done = len(work_lists(layout, blocks, True).query_tiles.steps) * blocks.query_tile * blocks.key_step
            assert f"{visible_pairs * trees / done:.2f}" == cell, (prefix, response, number)
