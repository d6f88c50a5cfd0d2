"""The compact AdamW update: its 8-bit code against torchao's, and its Triton kernel against the eager specification."""

import pytest
import torch

from fastrm_kernels.compact_adamw import BLOCK, MomentCode, compact_adamw
from fastrm_kernels.compact_adamw.reference import FIRST_BITS, LAST_CELL, nearest_codes
from fastrm_kernels.launch import record_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# kept, new1, new2, rate, correction, eps, factor of the gradient
COEFFICIENTS = [1.0 - 1e-3, 0.1, 0.05, 1e-2, 1.3, 1e-8, 0.37]
TINY = torch.finfo(torch.float32).tiny


def torchao_map(signed):
    quant_utils = pytest.importorskip("torchao.optim.quant_utils", reason="the 8-bit code is torchao's")
    return torch.tensor(quant_utils.create_dynamic_map(signed=signed))


@pytest.fixture(scope="module", params=[True, False], ids=["signed", "unsigned"])
def values(request):
    return torchao_map(request.param)


@pytest.fixture(scope="module")
def codes():
    return [MomentCode.from_values(torchao_map(signed)).to(torch.device(DEVICE)) for signed in (True, False)]


def numbers_around(values):
    """Every value, every middle between two, their neighbours, both zeros, and numbers of all sizes."""
    middles = (values[1:] + values[:-1]) / 2
    exact = torch.cat([values, middles, torch.tensor([0.0, -0.0, 1.0, -1.0, TINY, -TINY, 1e-40, 1.5])])
    beside = [torch.nextafter(exact, torch.full_like(exact, end)) for end in (-9.0, 9.0)]
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-9, 1, (200_000,), generator=generator)
    found = torch.cat([exact, *beside, torch.randn(200_000, generator=generator) * sizes]).clamp(-2, 2)
    return found if values[0] < 0 else found.abs()


def test_codes_are_those_of_torchao(values):
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    numbers = numbers_around(values)
    found = nearest_codes(numbers, values)
    assert torch.equal(found, quantize_8bit_with_qmap(numbers, values)) and len(found.unique()) == 256


def look_up(numbers, code):
    """As the kernel does: a cell by the upper bits, one comparison with the lower ones."""
    bits = numbers.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    cell = ((magnitude >> 16) - FIRST_BITS).clamp(0, LAST_CELL) + torch.where(bits < 0, LAST_CELL + 1, 0)
    entry = code.cells.flatten()[cell]
    return (torch.where((magnitude & 0xFFFF) >= ((entry >> 16) & 0xFFFF), entry >> 8, entry) & 0xFF).to(torch.uint8)


def test_the_table_finds_the_code_that_a_search_finds(values):
    numbers = numbers_around(values)
    assert torch.equal(look_up(numbers, MomentCode.from_values(values)), nearest_codes(numbers, values))


def test_values_that_are_too_close_for_a_table_are_refused():
    with pytest.raises(ValueError, match="values: two of them are too close together"):
        MomentCode.from_values(torch.linspace(0.5, 0.51, 256))


def draw(num_rows, states, dtype, codes, seed=0):
    """Arguments of an update with moments of earlier steps, of very different sizes from row to row."""
    generator = torch.Generator().manual_seed(seed)
    width = BLOCK if states == "8bit" else 1

    def random(*shape):
        return torch.randn(shape, generator=generator)

    sizes = 10.0 ** torch.randint(-12, 3, (num_rows, 1), generator=generator)
    gradient = random(num_rows, width) * sizes
    first, second = 0.3 * random(num_rows, width) * sizes, (random(num_rows, width) * sizes).square()
    noise = torch.randint(-(2**15), 2**15, (num_rows, width), generator=generator).to(torch.int16)
    moments = []
    for moment, code in zip((first, second), codes, strict=True):
        if states == "fp32":
            moments.append((moment.to(DEVICE),))
            continue
        scale = moment.abs().amax(1, keepdim=True)
        stored = nearest_codes(moment / scale.clamp(min=TINY), code.values.cpu())
        moments.append((stored.to(DEVICE), scale.to(DEVICE), code))
    weight = random(num_rows, width).to(dtype).to(DEVICE)
    noise = noise.to(DEVICE) if dtype is torch.bfloat16 else None
    return [weight, gradient.to(DEVICE), *moments, noise, torch.tensor(COEFFICIENTS, device=DEVICE)]


def copied(arguments):
    """Copies of all that an update changes."""
    weight, gradient, *moments, noise, coefficients = arguments
    moments = [tuple(part if isinstance(part, MomentCode) else part.clone() for part in moment) for moment in moments]
    return [weight.clone(), gradient, *moments, noise, coefficients]


def updated(arguments, impl):
    """(weight, parts of the first moment, of the second) after one update."""
    mine = copied(arguments)
    compact_adamw(*mine, impl=impl)
    weight, _, first, second, *_ = mine
    return weight, first[: 2 if len(first) == 3 else 1], second[: 2 if len(second) == 3 else 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("states, num_rows", [("8bit", 1), ("8bit", 37), ("fp32", 1), ("fp32", 4097)])
def test_the_kernel_is_the_specification(states, num_rows, dtype, codes):
    """To one rounding of float32 in the moments, of the update in the weight; codes and bfloat16 weights are
    elsewhere the same, and at most the neighbour."""
    arguments = draw(num_rows, states, dtype, codes)
    weight, *moments = updated(arguments, "eager")
    ours, *our_moments = updated(arguments, "triton")
    assert torch.isfinite(ours).all() and not torch.equal(ours, arguments[0])
    for found, wanted in zip(our_moments, moments, strict=True):
        if states == "8bit":
            assert (found[0].int() - wanted[0].int()).abs().max() <= 1
            assert (found[0] != wanted[0]).double().mean() <= 1e-3
            assert ((found[1] - wanted[1]).abs() <= 2**-22 * wanted[1]).all()
        else:
            # Of the larger of the two that are added, which may nearly cancel.
            size = torch.maximum(wanted[0].abs(), arguments[1].abs().square().maximum(arguments[1].abs()))
            assert ((found[0] - wanted[0]).abs() <= 2**-21 * size).all()
    if dtype is torch.bfloat16:
        assert ((ours.float() - weight.float()).abs() <= 2**-7 * weight.float().abs() + 2**-20).all()
        assert (ours != weight).double().mean() <= 1e-3
    else:
        assert ((ours - weight).abs() <= 2**-21 * weight.abs() + 1e-7).all()


def test_a_row_of_zeros_stays_zero_and_finite(codes):
    arguments = draw(16, "8bit", torch.float32, codes)
    arguments[1].zero_()
    for codes_of, scale, _ in arguments[2:4]:
        codes_of.zero_()
        scale.zero_()
    weight, first, second = updated(arguments, "triton")
    assert torch.equal(weight, arguments[0] * COEFFICIENTS[0])
    assert not first[1].any() and not second[1].any()


@pytest.mark.parametrize("states", ["8bit", "fp32"])
def test_nothing_outside_is_written(states, codes):
    """Rows in the middle of larger tensors; of float32 moments a number that fills no block."""
    arguments = draw(20, states, torch.bfloat16, codes)
    before = copied(arguments)
    inner = slice(3, 17)
    weight, gradient, first, second, noise, coefficients = arguments
    parts = [tuple(part if isinstance(part, MomentCode) else part[inner] for part in m) for m in (first, second)]
    compact_adamw(weight[inner], gradient[inner], *parts, noise[inner], coefficients, impl="triton")
    for rows in (slice(0, 3), slice(17, 20)):
        assert torch.equal(weight[rows], before[0][rows])
        for found, wanted in zip((first, second), before[2:4], strict=True):
            for one, other in zip(found, wanted, strict=True):
                assert isinstance(one, MomentCode) or torch.equal(one[rows], other[rows])
    assert not torch.equal(weight[inner], before[0][inner])


def test_an_update_is_one_launch(codes):
    arguments = draw(20, "8bit", torch.bfloat16, codes)
    with record_launches() as launches:
        compact_adamw(*arguments, impl="triton")
    assert [(launch.kernel.__name__, launch.grid) for launch in launches] == [("compact_adamw_kernel", (20,))]


def test_repeats_are_bitwise_the_same(codes):
    arguments = draw(20, "8bit", torch.bfloat16, codes)
    one, other = updated(arguments, "triton"), updated(arguments, "triton")
    assert torch.equal(one[0], other[0])
    for moments in zip(one[1:], other[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


@pytest.mark.parametrize(
    "place, change, message",
    [
        (0, lambda x: x.half(), r"weight: got \(4, 256\) torch.float16, wanted \(n, 256\) float32 or bfloat16"),
        (1, lambda x: x[:3], r"gradient: got \(3, 256\) torch.float32, .*wanted \(4, 256\) torch.float32, contiguous"),
        (1, lambda x: x.double(), "gradient: got .* torch.float64"),
        (3, lambda x: x[:1], r"weight: got .*|exp_avg, exp_avg_sq: wanted both"),
        (4, lambda x: None, "noise: wanted for a bfloat16 weight and for no other, got a weight in torch.bfloat16"),
        (5, lambda x: x[:6], r"coefficients: got \(6,\)"),
    ],
)
def test_what_does_not_fit_is_named(place, change, message, codes):
    arguments = draw(4, "8bit", torch.bfloat16, codes)
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=message):
        compact_adamw(*arguments, impl="eager")
