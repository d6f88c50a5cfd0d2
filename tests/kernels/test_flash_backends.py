"""FlashAttention from torch and from the flash-attn packages, emulated on a CPU (emulated_flash.py)."""

import dataclasses
import sys

import pytest
import torch

from fastrm.errors import ConfigError
from fastrm.model.kernel_choice import pick_backend
from fastrm_kernels import TreeLayout, dispatch, preference_loss, tree_attention
from fastrm_kernels.tree_attention import flash_attn, varlen
from fastrm_kernels.tree_attention.flash_attn_versions import NOT_INSTALLED, find_version
from fastrm_kernels.tree_attention.reference import tree_attention_reference
from tests.helpers.emulated_flash import CALLS, emulate, install
from tests.helpers.support import make_image, make_model, make_record, pack_of

PACKAGES = ["flash_attn-2", "flash_attn-3", "flash_attn-4"]
TREES = {
    "pair": TreeLayout.build([40, 9, 7], [-1, 0, 0]),
    "deep": TreeLayout.build([30, 5, 8, 1, 12, 6, 20], [-1, 0, 1, 1, 0, 4, -1]),
    "windows": TreeLayout.from_lengths([16, 16, 4, 1]),
    "anchors": TreeLayout.build([30, 9, 7], [-1, 0, 0]).at_rows([38, 45]),
}


@pytest.fixture(autouse=True)
def forget_packages():
    find_version.cache_clear()
    yield
    find_version.cache_clear()


@pytest.fixture(params=["varlen", *PACKAGES])
def emulated(request, monkeypatch):
    """Name of an implementation, which runs on this CPU for the time of a test."""
    kept = emulate(monkeypatch, request.param)
    yield request.param
    if isinstance(kept, torch.library.Library):
        kept._destroy()


def _impl(emulated):
    return emulated.partition("-")[0]


def _inputs(layout, heads=4, key_heads=2, width=16):
    torch.manual_seed(0)
    shapes = ((layout.num_queries, heads), (layout.num_keys, key_heads), (layout.num_keys, key_heads))
    return [torch.randn(*shape, width, dtype=torch.float64) for shape in shapes]


def _run(attend, inputs, upstream):
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = attend(*leaves)
    return [x.double() for x in (output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype)))]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients_are_within_twice_the_eager_error(emulated, tree, scale):
    layout = TREES[tree]
    causal = tree != "windows"
    exact = [x.bfloat16().double() for x in _inputs(layout)]
    half = [x.bfloat16() for x in exact]
    upstream = torch.randn(exact[0].shape).bfloat16().double()
    truth = _run(lambda *x: tree_attention_reference(*x, layout, scale=scale, causal=causal), exact, upstream)
    errors = {}
    for impl in ("eager", _impl(emulated)):
        options = {"scale": scale, "causal": causal, "impl": impl}
        got = _run(lambda *x, options=options: tree_attention(*x, layout, **options), half, upstream)
        errors[impl] = [float((a - b).abs().max()) for a, b in zip(got, truth, strict=True)]
    assert CALLS == {"forward": 1, "backward": 1}
    for ours, eager, value in zip(errors[_impl(emulated)], errors["eager"], truth, strict=True):
        assert ours <= 2 * eager + 2**-8 * float(value.abs().max())


def test_no_queries_give_no_rows_and_zero_gradients(emulated):
    layout = TREES["pair"].at_rows([])
    inputs = [x.bfloat16() for x in _inputs(layout)]
    upstream = torch.zeros(0, 4, 16)
    output, *gradients = _run(lambda *x: tree_attention(*x, layout, impl=_impl(emulated)), inputs, upstream)
    assert output.shape == (0, 4, 16)
    assert not any(gradient.any() for gradient in gradients)


def test_a_pack_that_overflows_32_bit_offsets_is_refused(emulated):
    # As many tokens as overflow them in a 7B: 2^31 / (28 * 128).
    layout = dataclasses.replace(TREES["pair"], num_queries=600_000, num_keys=600_000)
    query, key = (torch.empty(1, heads, 128, dtype=torch.bfloat16).expand(600_000, -1, -1) for heads in (28, 4))
    with pytest.raises(ValueError, match=r"600,000 query tokens in 2 runs need 2,151,317,504 offsets"):
        tree_attention(query, key, key, layout, impl=_impl(emulated))
    assert CALLS["forward"] == 0


def test_strided_inputs_are_taken(emulated):
    layout = TREES["deep"]
    inputs = [x.bfloat16() for x in _inputs(layout)]
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    upstream = torch.randn(layout.num_queries, 4, 16)

    def attend(*tensors):
        return tree_attention(*tensors, layout, impl=_impl(emulated))

    results = [_run(attend, tensors, upstream) for tensors in (inputs, strided)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- in compiled layers -------------------------------------------------------------------------


def _packs(network, count):
    """Packs in which the longest run is sometimes the whole pack and sometimes not, with images of many sizes."""
    for number in range(count):
        images = [make_image(28 + 40 * number, 200 - 25 * number, number)]
        records = [make_record(number, num_responses=2 + number % 3, prompt_words=5 + 11 * number, images=images)]
        if number % 2:
            records += [make_record(50 + number, prompt_words=40)]
        yield pack_of(network, records)


def _step(network, pack):
    with torch.autocast("cpu", torch.bfloat16):
        rewards = network(pack)
    preference_loss(rewards, pack.edges, center=0.1).backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return gradients


def _far(found, wanted):
    """Distance of gradients, relative to their norm."""
    assert found.keys() == wanted.keys()
    squares = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return (squares / sum(float(gradient.square().sum()) for gradient in wanted.values())) ** 0.5


# All packages share one operator, so one stands for them.
@pytest.mark.parametrize(
    ("emulated", "mode"),
    [("varlen", "none"), ("flash_attn-2", "none"), ("flash_attn-2", "full")],
    indirect=["emulated"],
)
def test_packs_of_any_size_make_one_graph_for_each_kind_of_layer(emulated, mode):
    torch._dynamo.reset()
    stock, network = make_model("qwen2_5_vl"), make_model("qwen2_5_vl")
    graphs = network.compile_layers("aot_eager")
    network.use_activation_checkpointing(mode)
    network._runner.set_kernels(_impl(emulated))
    lay_out = network._runner.layout_builder(torch.bfloat16)
    for number, pack in enumerate(_packs(network, 4)):
        pack.layouts = None
        wanted = _step(stock, pack)
        before = CALLS["forward"]
        pack.layouts = lay_out(pack)
        assert _far(_step(network, pack), wanted) < 0.1
        assert CALLS["forward"] - before >= 6
        assert graphs.count == 2, f"after pack {number}"


def test_selective_checkpointing_does_not_run_attention_again(emulated):
    network = make_model("qwen2_5_vl")
    network.use_activation_checkpointing("selective")
    network._runner.set_kernels(_impl(emulated))
    pack = next(_packs(network, 1))
    pack.layouts = network._runner.layout_builder(torch.bfloat16)(pack)
    _step(network, pack)
    assert CALLS == {"forward": 6, "backward": 6}


# --- which package ------------------------------------------------------------------------------


def test_the_newest_generation_that_is_installed_and_made_for_the_device_is_taken(monkeypatch):
    names = {}
    libraries = []
    for generation in ("2", "4", "3"):
        libraries.append(install(monkeypatch, generation))
        for major in (8, 9, 10):
            found = find_version(major)
            names[generation, major] = found.name if not isinstance(found, str) else found
    libraries[-1]._destroy()
    second, third = "FlashAttention-2 of flash-attn 2.8.3", "FlashAttention-3"
    fourth = "FlashAttention-4 of flash-attn-4"
    assert names == {
        ("2", 8): second, ("2", 9): second, ("2", 10): second,
        ("4", 8): second, ("4", 9): fourth, ("4", 10): fourth,
        ("3", 8): second, ("3", 9): third, ("3", 10): fourth,
    }  # fmt: skip


def test_an_old_package_is_refused(monkeypatch):
    install(monkeypatch, "2")
    sys.modules["flash_attn"].__version__ = "2.7.4.post1"
    assert find_version(9) == "got flash-attn 2.7.4.post1, wanted 2.8 or newer"


def test_a_broken_installation_is_not_taken_for_a_missing_one(monkeypatch, tmp_path):
    for name, line in (("one", "raise ImportError('undefined symbol: _ZN3c10')"), ("two", "import flash_attn_3._C")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "flash_attn_interface.py").write_text(line)
        monkeypatch.syspath_prepend(folder)
        sys.modules.pop("flash_attn_interface", None)
        find_version.cache_clear()
        found = find_version(9)
        assert found.startswith("flash_attn_interface is installed but cannot be imported (")
        assert "_ZN3c10" in found or "flash_attn_3" in found


def test_without_the_package_the_line_to_install_it_is_named(monkeypatch):
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(varlen, "varlen_obstacle", lambda query: None)
    monkeypatch.setattr(flash_attn, "_major", lambda device: 9)
    message = r'cannot run bfloat16 on cpu: .*pip install --no-build-isolation "flash-attn>=2\.8"; use flash or'
    with pytest.raises(ConfigError, match=r"model\.attention: flash_attn " + message):
        pick_backend("flash_attn", "auto", torch.device("cpu"), torch.bfloat16, [64])
    assert find_version(9) == NOT_INSTALLED


def test_without_cuda_it_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"flash_attn cannot run float32 on cpu: got torch\.float32 on cpu, wanted"):
        pick_backend("flash_attn", "auto", torch.device("cpu"), torch.float32, [64])
    layout = TREES["pair"]
    with pytest.raises(ValueError, match=r"impl='flash_attn': got torch\.float64 on cpu, wanted float16 or bfloat16"):
        tree_attention(*_inputs(layout), layout, impl="flash_attn")


@pytest.mark.parametrize("head_dim, wanted", [(12, "a multiple of 8 up to 256"), (264, "a multiple of 8 up to 256")])
def test_head_dimensions_that_it_has_not_are_refused(monkeypatch, head_dim, wanted):
    emulate(monkeypatch, "flash_attn-2")
    with pytest.raises(ConfigError, match=f"got head dimension {head_dim}, wanted {wanted}"):
        pick_backend("flash_attn", "auto", torch.device("cpu"), torch.bfloat16, [64, head_dim])


def test_the_version_in_use_is_said(monkeypatch):
    emulate(monkeypatch, "flash_attn-2")
    backend, why = pick_backend("flash_attn", "triton", torch.device("cpu"), torch.bfloat16, [64, 80])
    assert (backend, why) == (
        "flash_attn", "FlashAttention-2 of flash-attn 2.8.3; set by model.attention in the configuration"
    )  # fmt: skip


def test_auto_takes_it_only_as_measured_and_where_it_can_run(monkeypatch):
    emulate(monkeypatch, "flash_attn-2")
    monkeypatch.setattr(dispatch, "obstacle_to_triton", lambda tensor: None)

    def chosen(*head_dims):
        return pick_backend("auto", "auto", torch.device("cpu"), torch.bfloat16, head_dims)

    assert chosen(64)[0] == "flash"
    monkeypatch.setitem(dispatch.MEASURED, ("tree_attention", "cpu", torch.bfloat16), "flash_attn")
    assert chosen(64, 80)[0] == "flash_attn"
    backend, why = chosen(64, 12)
    assert backend == "flash" and "flash-attn, the faster one in bench/results, cannot run" in why
