"""Steps without data: what a meter notes, that a few layers tell of all, and what the passes take and show."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import UnsupportedOperatorException

from fastrm.errors import ConfigError
from fastrm.forecast import fake_step, stand_ins
from fastrm.forecast.full_pack import PackShape
from fastrm.forecast.lifetimes import Life, Meter, Moment, enough, fullest, repeated
from tests.helpers import memory_runs


class TestMeter:
    """Storages of 100 float32 numbers, and a weight that was there before."""

    def run(self, compute, **bodies):
        weight = torch.ones(10, 10, requires_grad=True)
        meter = Meter({weight: "head"}, bodies)
        with meter:
            compute(weight, meter)
        return meter.lives()

    def test_a_storage_lives_until_nothing_needs_it(self):
        def compute(weight, meter):
            first = weight.detach() + 1
            view = first.view(-1)
            second = view * 2  # two are alive
            del first, view
            third = second + second  # and two again
            del second, third

        lives = self.run(compute)
        assert [life.num_bytes for life in lives] == [400, 400, 400]
        assert fullest(lives, 0, True).total == 800
        assert all(life.died is not None for life in lives)

    def test_kept_for_the_backward_pass_and_not(self):
        def compute(weight, meter):
            total = (weight * 2).exp().sum()  # exp keeps its result, the product is let go
            meter.begin(None, backward=True)
            total.backward()

        lives = self.run(compute)
        product, exponential = lives[:2]
        assert not product.died.backward and exponential.died.backward
        found = fullest(lives, 0, True)
        assert (found.when, found.activations) == ("backward, head", 400 + 4)

    def test_a_gradient_stays_or_is_added_to_another(self):
        def compute(weight, meter):
            weight.register_post_accumulate_grad_hook(meter.take)
            total = (weight * 2).sum()
            meter.begin(None, backward=True)
            total.backward()
            for _ in range(3):
                torch.zeros(10)

        lives = self.run(compute)
        (gradient,) = (life for life in lives if life.taken is not None)
        assert gradient.died is None and gradient.num_bytes == 400
        assert fullest(lives, 0, True).total > fullest(lives, 0, False).total - 400 >= 0

    def test_a_copy_of_a_weight_is_told_from_other_values(self):
        def compute(weight, meter):
            copy = weight.detach().to(torch.bfloat16)
            other = (weight.detach() + 1).to(torch.bfloat16)
            del copy, other

        assert [life.is_copy for life in self.run(compute)] == [True, False, False]


class TestRepeated:
    def test_as_few_layers_as_there_are_surroundings(self):
        assert enough([]) == []
        assert enough([0]) == [0]
        assert len(enough([0] * 28)) == 5  # two at each end, and one of the others
        assert enough([0, 1, 2, 3]) == [0, 1, 2, 3]
        windows = ([0] * 7 + [1]) * 4
        assert len(enough(windows)) < 16 and sum(windows[number] for number in enough(windows)) == 2

    @pytest.mark.parametrize("seed", range(20))
    def test_every_layer_has_one_like_it_among_them(self, seed):
        generator = torch.Generator().manual_seed(seed)
        kinds = torch.randint(0, 2, (24,), generator=generator).tolist()
        kept = enough(kinds)

        def around(some):
            padded = [None, None, *some, None, None]
            return {tuple(padded[n : n + 5]) for n in range(len(some))}

        assert around([kinds[number] for number in kept]) == around(kinds)

    def test_a_layers_storages_are_those_of_all_like_it(self):
        """Layers keep 10 until their backward passes; what the first of 9 keeps is 1, and a table lives to the end."""
        kinds = [0] * 9
        kept = enough(kinds)
        lives = [Life(5, "", False, Moment(False, None, 1))]
        for number in kept:
            size = 10 if number else 1
            lives.append(Life(size, "", False, Moment(False, number, 1), Moment(True, number, 2)))
        whole = repeated(lives, kinds, kept)
        assert sorted(life.born.layer for life in whole[1:]) == list(range(9))
        assert all(life.born.layer == life.died.layer for life in whole[1:])
        assert fullest(whole, 9, True).total == 5 + 1 + 8 * 10

    def test_what_the_end_lets_go_lives_to_the_end(self):
        kinds = [0] * 9
        kept = enough(kinds)
        lives = [Life(10, "", False, Moment(False, number, 1), Moment(False, kept[-1], 9)) for number in kept]
        assert {life.died for life in repeated(lives, kinds, kept)} == {Moment(False, 8, 9)}


TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8}
# Windows and whole images in no even order.
VISION = {
    "depth": 11, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "window_size": 56,
    "fullatt_block_indexes": [3, 7, 10],
}  # fmt: skip
TILES = {
    "num_hidden_layers": 7, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "image_size": [56, 56], "attention_bias": True,
}  # fmt: skip
CASES = {
    "text": ({"text": TEXT}, None),
    "windows": ({"text": TEXT, "vision": VISION}, (1, 16, 12)),
    "tiles": ({"text": TEXT, "tiles": TILES}, (3, 4, 4)),
}
FROZEN = {
    "text": [[], ["language"]],
    "windows": [[], ["vision"], ["vision", "projector"], ["language"]],
    "tiles": [[], ["vision"]],
}


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("name", "freeze"), [(name, freeze) for name, ways in FROZEN.items() for freeze in ways],
    ids=lambda value: "+".join(value) if isinstance(value, list) else value,
)  # fmt: skip
def test_a_few_layers_tell_to_the_byte_what_all_take(name, freeze, mode):
    sizes, grid = CASES[name]
    image = 0 if grid is None else math.prod(grid) // 4
    shape = PackShape.of_groups([(image + 30, (20, 25)), (image + 10, (9, 9))], grid, merge=2, share=True)
    for dtype, attention, pooling in (
        ("bf16", "triton", "anchor"), ("fp32", "eager", "anchor"), ("bf16", "varlen", "mean"),
    ):  # fmt: skip
        case = {**sizes, "freeze": freeze, "mode": mode, "dtype": dtype, "pooling": pooling}
        few, whole = (memory_runs.fake_steps(case, whole=whole) for whole in (False, True))
        for stay in (True, False):
            how = {"alone": True, "gradients_stay": stay}
            config = memory_runs.settings_of(case)
            assert few.fullest(config, shape, attention, **how) == whole.fullest(config, shape, attention, **how)


MEDIUM = {"text": {**TEXT, "hidden_size": 256, "intermediate_size": 768}, "dtype": "bf16"}


def kept(steps, config, attention, alone=True):
    """Bytes that the backward pass finds, the pack's own tensors left out."""
    shape = PackShape.of_groups([(100, (30, 30))] * 3, None, 1, share=True)
    lives, _ = steps.lives(config, shape, attention, alone)
    return [life for life in lives if life.part and not life.born.backward and (not life.died or life.died.backward)]


@pytest.mark.parametrize(
    ("freeze", "until_backward"), [(["vision", "projector", "language"], False), (["language"], True)]
)
def test_a_frozen_matrix_is_copied_where_it_is_not_stored_so(freeze, until_backward):
    """The copy is kept where gradients pass through the frozen layer, to what is trained before it."""
    case = {**MEDIUM, "freeze": freeze, "vision": VISION}
    steps = memory_runs.fake_steps(case)
    shape = PackShape.of_groups([(148, (30, 30))], (1, 16, 12), 2, share=True)
    copies = {}
    for weights in ("fp32", "auto"):
        config = memory_runs.settings_of({**case, "weights": weights})
        elsewhere = config.model.model_copy(update={"path": "somebody/else"})  # files taken to be of bfloat16
        config = config.model_copy(update={"model": elsewhere})
        lives, _ = steps.lives(config, shape, "varlen", True)
        in_language = [life for life in lives if life.is_copy and life.part == "language model"]
        copies[weights] = [life for life in in_language if life.num_bytes > 10_000]  # of matrices
    assert copies["fp32"] and not copies["auto"]
    assert {life.died.backward for life in copies["fp32"]} == {until_backward}


def test_layers_in_fp8_copy_no_matrix_for_the_whole_pass():
    pytest.importorskip("torchao")
    case = {**MEDIUM, "text": {**TEXT, "hidden_size": 1024, "intermediate_size": 2048}}
    steps = memory_runs.fake_steps(case)
    config = memory_runs.settings_of(case)
    fp8 = config.model_copy(update={"precision": config.precision.model_copy(update={"fp8": "rowwise"})})
    shape = PackShape.of_groups([(32, (24, 24))], None, 1, share=True)
    by_recipe = []
    for settings in (config, fp8):
        found = steps.fullest(settings, shape, "varlen", alone=True, gradients_stay=False)
        by_recipe.append(found.copies)
    assert by_recipe[1] < 0.5 * by_recipe[0]


def test_ligers_functions_keep_what_liger_keeps():
    """Of the norm its input and a number a row, of the gate its inputs; the stock operations keep more."""
    states, weight = torch.randn(6, 8, requires_grad=True), nn.RMSNorm(8)
    gate, up = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        stand_ins._norm(weight, states)
        assert saved == [(6, 8), (8,), (6,)]
        saved.clear()
        stand_ins._gate(nn.SiLU(), gate, up)
        assert saved == [(6, 8), (6, 8)]
    config = memory_runs.settings_of(MEDIUM)
    steps = memory_runs.fake_steps(MEDIUM)
    stock, liger = (
        sum(life.num_bytes for life in kept(steps, config.model_copy(update={"kernels": kernels}), "triton"))
        for kernels in ("auto", "triton")
    )
    assert liger < 0.85 * stock


def test_sizes_that_do_not_fit_one_another_are_a_configuration_error():
    """Heads of width 1, whose rotary embedding has width 2."""
    case = {"text": {**TEXT, "num_attention_heads": 64, "num_key_value_heads": 64}}
    shape = PackShape.of_groups([(30, (9, 9))], None, 1, share=True)
    with pytest.raises(ConfigError, match=r"model\.init: a step of this model fails: "):
        memory_runs.fake_steps(case).lives(memory_runs.settings_of(case), shape, "eager", alone=True)


def test_an_operator_that_fake_tensors_do_not_know_is_no_fault_of_the_model(monkeypatch):
    def unknown(*_):
        raise UnsupportedOperatorException(torch.ops.aten.add.Tensor)

    monkeypatch.setattr(fake_step, "_kinds", unknown)
    shape = PackShape.of_groups([(30, (9, 9))], None, 1, share=True)
    with pytest.raises(UnsupportedOperatorException):
        memory_runs.fake_steps(MEDIUM).lives(memory_runs.settings_of(MEDIUM), shape, "eager", alone=True)
