"""Ahead-of-time compilation: no GPU, but a compiler, so everything that compiles runs in a process of its own
without TRITON_INTERPRET. This file is also the program of those processes: `python test_aot.py <function>`.
"""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import aot
from fastrm_kernels.launch import Launch

MATRIX_KERNEL = "tree_attention_fwd_kernel"


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, stride, scale, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a = tl.load(a_ptr + rows * stride + columns)
    b = tl.load(b_ptr + rows * stride + columns)
    tl.store(out_ptr + rows * stride + columns, tl.dot(a, b) * scale)


@triton.jit
def spilling_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    # The sum needs all values before the first is stored: with one warp, 512 for each thread of 255 registers.
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr + tl.arange(0, SIZE), x / tl.sum(x, 0))


def product_launch(stride=64, scale=1.0, offset=0):
    a, b = (torch.empty(64 * 64 + offset, dtype=torch.bfloat16, device="meta")[offset:] for _ in range(2))
    out = torch.empty(64 * 64, device="meta")
    arguments = {"a_ptr": a, "b_ptr": b, "out_ptr": out, "stride": stride, "scale": scale, "BLOCK": 64}
    return Launch(product_kernel, (1,), arguments, num_warps=4, num_stages=2)


# Run in processes of their own


def spilling_launch():
    x, out = (torch.empty(16_384, device="meta") for _ in range(2))
    return Launch(spilling_kernel, (1,), {"x_ptr": x, "out_ptr": out, "SIZE": 16_384}, num_warps=1, num_stages=1)


def figures():
    launches = {"product": (product_launch(), 90), "old": (product_launch(), 80), "spilling": (spilling_launch(), 90)}
    return {name: vars(aot.compile_launch(*launch)) for name, launch in launches.items()}


def run_of_a_spilling_kernel():
    """(exit status, standard output) of the command, with one kernel that cannot pass."""
    import production

    production.production_launches = lambda: [({"inputs": "fp32"}, spilling_launch())]
    with redirect_stdout(io.StringIO()) as output:
        status = aot.main([])
    return status, output.getvalue()


def specializations():
    """What is known of each argument of the product, for strides and offsets that differ."""
    cases = {
        "plain": product_launch(),
        "odd stride": product_launch(stride=65),
        "unit stride": product_launch(stride=1),
        "wide stride": product_launch(stride=2**31),
        "integer scale": product_launch(scale=3),
        "odd offset": product_launch(offset=1),
        "aligned offset": product_launch(offset=8),
        "no pointer": Launch(product_kernel, (1,), {**product_launch().arguments, "out_ptr": None}, 4, 2),
    }
    found = {}
    for name, launch in cases.items():
        binary = aot.specialize(launch, 90)
        aligned = [list(binary.signature)[path[0]] for path, facts in binary.attributes.items() if facts]
        found[name] = {"signature": binary.signature, "aligned": aligned}
    return found


class StandIn:
    """As much of a driver as the JIT asks for before it launches."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


def differences_from_jit():
    """Run the JIT itself on every production launch, stopped before it compiles: it must ask for the same."""
    from production import production_launches

    asked = []
    triton.runtime.driver.set_active(StandIn())
    triton.knobs.runtime.jit_cache_hook = lambda *, compile, **_: asked.append(compile) or True
    launches = [launch for _, launch in production_launches()]
    different = []
    for launch in launches:
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **options)
        wanted, got = asked[-1], aot.specialize(launch, 90)
        pairs = {
            "signature": (wanted["signature"], got.signature),
            "constants": (wanted["constants"], got.constants),
            "attributes": (wanted["configs"][0], got.attributes),
            "warps": (wanted["num_warps"], got.num_warps),
            "stages": (wanted["num_stages"], got.num_stages),
        }
        different += [f"{got.kernel}: {name}: {a} {b}" for name, (a, b) in pairs.items() if repr(a) != repr(b)]
    return {"launches": len(launches), "asked": len(asked), "different": different}


def hashes():
    """Triton's hash of all that goes into a binary: compiled by the JIT, and by us."""
    triton.runtime.driver.set_active(StandIn())
    launch = product_launch()
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    by_jit = launch.kernel.run(grid=(1,), warmup=True, **launch.arguments, **options)
    return [by_jit.hash, aot.run_compiler(aot.specialize(launch, 90), 90).hash]


# Tests


def start(*command, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**inherited, "PYTHONPATH": str(Path(aot.__file__).parent), **environment}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def call(function):
    """The result of a function above in a process that compiles."""
    done = start(__file__, function)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_cli(*arguments):
    done = start(aot.__file__, *arguments)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    return done


def test_table_is_up_to_date_and_limits_are_kept():
    assert "all limits are kept" in run_cli("--check").stdout


@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures_compile(arch):
    assert "everything compiles" in run_cli("--arch", str(arch), "--sample").stdout


def test_specialization_is_the_jits_own_at_every_production_launch():
    found = call("differences_from_jit")
    assert found["different"] == []
    assert found["asked"] == found["launches"] > 100


def test_binary_has_the_hash_that_the_jit_gives_it():
    by_jit, ours = call("hashes")
    assert by_jit == ours


def test_specialization_follows_values_and_alignment():
    found = call("specializations")
    pointers = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32"}
    plain = {**pointers, "stride": "i32", "scale": "fp32", "BLOCK": "constexpr"}
    assert found["plain"] == {"signature": plain, "aligned": [*pointers, "stride"]}
    assert found["odd stride"] == {"signature": plain, "aligned": [*pointers]}
    assert found["unit stride"]["signature"] == {**plain, "stride": "constexpr"}
    assert found["wide stride"]["signature"] == {**plain, "stride": "i64"}
    assert found["integer scale"]["signature"] == {**plain, "scale": "i32"}
    assert found["odd offset"]["aligned"] == ["out_ptr", "stride"]
    assert found["aligned offset"] == found["plain"]
    assert found["no pointer"]["signature"] == {**plain, "out_ptr": "constexpr"}


def test_figures_show_spills_and_the_matrix_unit():
    found = call("figures")
    product, spilling = found["product"], found["spilling"]
    assert (product["matrix_unit"], found["old"]["matrix_unit"]) == ("wgmma", "mma.sync")
    assert product["spill_bytes"] == product["stack_bytes"] == 0
    assert 0 < product["shared_bytes"] < 64 * 1024
    assert spilling["matrix_unit"] == "none"
    # Of 512 values, those that are not in registers are on the stack, 4 bytes each.
    assert spilling["spill_bytes"] >= 4 * (512 - spilling["registers"])
    assert spilling["stack_bytes"] >= 4 * (512 - spilling["registers"])


def test_command_fails_on_a_kernel_that_spills():
    status, output = call("run_of_a_spilling_kernel")
    assert status == 1
    assert "spilling_kernel, fp32: spills" in output
    assert "wanted 0; take smaller blocks or more warps" in output


def test_cli_refuses_the_interpreter():
    done = start(aot.__file__, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr == "TRITON_INTERPRET=1 is set: kernels are interpreted, not compiled; unset it\n"


def test_spill_bytes_counts_stores_to_local_memory_by_width():
    sass = """
        /*0340*/                   STL [R1+0x14], R59 ;
        /*0350*/              @!P0 STL.64 [R1+0x8], R56 ;
        /*0360*/                   STL.128 [R1+0x20], R60 ;
        /*0370*/                   LDL.LU.64 R56, [R1+0x8] ;
        /*0380*/                   STG.E.128 desc[UR8][R2.64], R4 ;
        /*0390*/                   STS [R5], R6 ;
    """
    assert aot._spill_bytes(sass) == 4 + 8 + 16


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "ctas"),
    [
        # CUDA C++ Best Practices Guide, "Calculating Occupancy": 37 registers give 12 blocks of 128 threads, 75%
        # of 2,048 threads, but only four of 320 threads, 63%; and up to 32 registers do not limit at all.
        (80, 37, 0, 4, 12),
        (80, 37, 0, 10, 4),
        (80, 32, 0, 8, 8),
        # Programming guide: 255 registers, the most that a thread can have, leave 8 warps.
        (90, 255, 0, 8, 1),
        (90, 255, 0, 4, 2),
        (90, 168, 0, 4, 3),
        # Tuning guides: a block may have 163 KB of 164 on sm_80 and 227 KB of 228 on sm_90, 1 KB is the system's.
        (80, 32, 163 * 1024, 4, 1),
        (80, 32, 163 * 1024 + 1, 4, 0),
        (90, 32, 227 * 1024, 4, 1),
        (90, 32, 227 * 1024 + 1, 4, 0),
        (90, 32, 113 * 1024, 4, 2),
        (90, 32, 113 * 1024 + 1, 4, 1),
        (100, 32, 227 * 1024, 4, 1),
        # 32 blocks at most, however small.
        (90, 16, 0, 1, 32),
    ],
)
def test_ctas_per_sm_agrees_with_published_figures(arch, registers, shared, warps, ctas):
    assert aot.ctas_per_sm(arch, registers, shared, warps) == ctas


def test_tensor_memory_limits_ctas():
    assert [aot.ctas_per_sm(100, 32, 0, 4, columns) for columns in (0, 128, 512)] == [16, 4, 1]


def binary(kernel=MATRIX_KERNEL, pointer="*bf16"):
    return aot.Binary("module", kernel, {"a_ptr": pointer}, {}, {}, 8, 2)


def compiled(**changes):
    good = {
        "registers": 168, "shared_bytes": 98_304, "stack_bytes": 0, "spill_bytes": 0, "matrix_unit": "wgmma",
        "ctas_per_sm": 1, "occupancy": 0.125,
    }  # fmt: skip
    return aot.Compiled(**{**good, **changes})


ATTENTION, HEAD = {"K": 128, "inputs": "bf16"}, {"D": 3584, "R": 8, "inputs": "bf16"}


@pytest.mark.parametrize(
    ("label", "kernel", "changes", "message"),
    [
        (ATTENTION, MATRIX_KERNEL, {}, None),
        (ATTENTION, MATRIX_KERNEL, {"spill_bytes": 8}, "spills 8 bytes of registers, wanted 0; take smaller blocks"),
        (ATTENTION, MATRIX_KERNEL, {"shared_bytes": 232_449}, "takes 232,449 bytes of shared memory, limit 232,448"),
        (ATTENTION, MATRIX_KERNEL, {"matrix_unit": "mma.sync"}, "matrix unit: got mma.sync, wanted wgmma"),
        (HEAD, "head_fwd_kernel", {"matrix_unit": "mma.sync"}, None),
        (HEAD, "head_fwd_kernel", {"matrix_unit": "none"}, "matrix unit: got none, wanted wgmma or mma.sync"),
        ({**HEAD, "R": 256}, "head_fwd_kernel", {"matrix_unit": "mma.sync"}, "matrix unit: got mma.sync, wanted wgmma"),
        (HEAD, "head_finish_kernel", {"matrix_unit": "none"}, None),
    ],
)
def test_broken_limits_are_named(label, kernel, changes, message):
    found = aot.broken_limits(label, binary(kernel), compiled(**changes))
    assert [text[: len(message)] for text in found] == [message] if message else found == []


def test_float32_products_need_no_matrix_unit():
    assert aot.broken_limits(HEAD, binary("head_fwd_kernel", "*fp32"), compiled(matrix_unit="none")) == []


def test_a_binary_that_does_not_compile_is_a_problem_everywhere():
    groups, results = [([ATTENTION], binary())], ["PTXASError: no"]
    for arch in (80, 90):
        assert aot.problems(groups, results, arch) == [f"{MATRIX_KERNEL}, K 128, bf16: PTXASError: no"]
    assert len(aot.table(groups, results, 90)) == 4, "no line for it, only the head"


def test_labels_are_put_together_without_claiming_more():
    labels = [{"D": d, "R": r, "dtype": t} for d, r, t in ((1, 8, "bf16"), (2, 8, "bf16"), (1, 9, "fp32"))]
    assert aot.describe(labels) == "D 1/2, R 8, bf16; D 1, R 9, fp32"
    domain = {"D": (1, 2), "R": (8, 9), "dtype": ("bf16", "fp32")}
    assert aot.describe(labels, domain) == "R 8, bf16; D 1, R 9, fp32"
    product = [{"D": d, "R": r, "dtype": t} for d in (2, 1) for r in (8, 9) for t in domain["dtype"]]
    assert aot.describe(product, domain) == "all"


@pytest.fixture
def readme(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{aot.BEGIN}\nold\n{aot.END}\nafter\n")
    monkeypatch.setattr(aot, "README", path)
    return path


def lines_of(**changes):
    return aot.table([([ATTENTION], binary())], [compiled(**changes)], 90)


def test_check_shows_what_changed(readme):
    aot.write_table(lines_of())
    assert readme.read_text().startswith(f"before\n{aot.BEGIN}\n")
    assert readme.read_text().endswith(f"{aot.END}\nafter\n")
    assert aot.compare(lines_of()) == []
    shown = aot.compare(lines_of(registers=169))
    assert [line[0] for line in shown[3:]] == ["-", "+"]
    assert "| 168 |" in shown[3] and "| 169 |" in shown[4]


def test_each_version_of_triton_has_a_table_of_its_own(readme, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "9.8")
    aot.write_table(lines_of())
    monkeypatch.setattr(triton, "__version__", "9.9")
    for registers in (170, 169):
        aot.write_table(lines_of(registers=registers))
    assert [title.split()[3] for title in aot.stored_tables()] == ["9.8", "9.9"]
    assert aot.compare(lines_of(registers=169)) == []
    assert len(aot.compare(lines_of())) > 3
    monkeypatch.setattr(triton, "__version__", "9.8")
    assert aot.compare(lines_of()) == []


def test_check_under_another_triton_says_that_figures_were_not_compared(readme, monkeypatch, capsys):
    aot.write_table(lines_of())
    monkeypatch.setattr(triton, "__version__", "9.9")
    assert aot.compare(lines_of(registers=169)) == []
    assert "Triton 9.9 for sm_90. Figures differ among versions: only limits were checked." in capsys.readouterr().out


def test_a_readme_without_markers_is_an_error(readme):
    readme.write_text("nothing\n")
    with pytest.raises(SystemExit, match=r"README\.md: wanted the lines .* once each"):
        aot.stored_tables()


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
