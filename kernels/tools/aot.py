"""Compile every kernel for its production configurations ahead of time, on a machine without a GPU.

    python kernels/tools/aot.py             compile for sm_90 and print the table of kernels/README.md
    python kernels/tools/aot.py --write     and write it there
    python kernels/tools/aot.py --check     and compare it with what is there
    python kernels/tools/aot.py --arch 80   compile for another architecture: 80 or 100

Exit status 1 if something does not compile, breaks a limit (sm_90 only: no spilled registers, shared memory
that fits, wgmma in the large matrix products), or if the table is out of date. A warm Triton cache, whose
keys cover the kernels' source, makes it quick.
"""

import argparse
import difflib
import importlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastrm_kernels.launch import Launch

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- begin: python kernels/tools/aot.py --write -->", "<!-- end -->"

# Technical specifications per compute capability, CUDA C++ Programming Guide. All three have 64 warps, 32
# CTAs and 65,536 registers per multiprocessor, the registers in four partitions.
KIB = 1024
SHARED_PER_SM = {80: 164 * KIB, 90: 228 * KIB, 100: 228 * KIB}
SHARED_PER_CTA = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}
WARPS_PER_SM, CTAS_PER_SM, PARTITIONS, REGISTERS_PER_PARTITION = 64, 32, 4, 16_384
TENSOR_MEMORY_COLUMNS = 512  # columns of a multiprocessor, sm_100 only

# Kernels that are matrix products, each with the least number of rows for which its tile is large enough for wgmma.
WGMMA_FROM_ROWS = {
    "head_fwd_kernel": 128,
    "head_bwd_kernel": 128,
    "head_bwd_input_kernel": 128,
    "head_bwd_weight_kernel": 128,
    "tree_attention_fwd_kernel": 0,
    "tree_attention_bwd_query_kernel": 0,
    "tree_attention_bwd_key_value_kernel": 0,
}
NAMED_FIELDS = ("D", "R", "K", "heads")  # fields of a label that are printed with their names


@dataclass(frozen=True)
class Binary:
    """A compiled kernel as the JIT tells kernels apart: launches with equal ones run the same machine code.

    Attributes:
        module, kernel: where the triton.jit function is found.
        signature: type of each parameter; those that are compiled in are "constexpr".
        constants: values of these, by their path, as Triton has it.
        attributes: what is known of the others, by their path: whether 16 divides them.
        num_warps, num_stages: as Triton understands them.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple, Any]
    attributes: dict[tuple, list]
    num_warps: int
    num_stages: int

    @property
    def is_bf16(self) -> bool:
        return "*bf16" in self.signature.values()


@dataclass(frozen=True)
class Compiled:
    """Figures of one binary.

    Attributes:
        registers: per thread.
        shared_bytes: per CTA.
        stack_bytes, spill_bytes: local memory of a thread, and what the spill stores in the code write.
        matrix_unit: tcgen05, wgmma, mma.sync, or "none": products run on CUDA cores, if there are any.
        ctas_per_sm: how many fit at once, by registers, shared memory and warps.
        occupancy: the share of a multiprocessor's 64 warps that these are.
    """

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    matrix_unit: str
    ctas_per_sm: int
    occupancy: float


def specialize(launch: Launch, arch: int) -> Binary:
    """Ask the JIT's own code what it compiles for a launch.

    Meta tensors have address 0 and so count as aligned, unless they are views at an offset that is not.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where nothing is compiled.
    """
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(f"{kernel.__name__}: made for Triton's interpreter; unset TRITON_INTERPRET to compile it")
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bound, specialization, _ = bind(**launch.arguments, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, None)
    return Binary(kernel.__module__, kernel.__name__, signature, constants, attributes, **options)


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile a recorded launch for sm_<arch> as the JIT would."""
    return compile_binary(specialize(launch, arch), arch)


def compile_binary(binary: Binary, arch: int) -> Compiled:
    """Compile for sm_<arch>, or take it from Triton's disk cache."""
    kernel = run_compiler(binary, arch)
    cubin, shared = kernel.asm["cubin"], kernel.metadata.shared
    usage = _cuobjdump("-res-usage", cubin)
    registers, stack = (max(map(int, re.findall(rf"{name}:(\d+)", usage))) for name in ("REG", "STACK"))
    ctas = ctas_per_sm(arch, registers, shared, binary.num_warps, getattr(kernel.metadata, "tmem_size", 0) or 0)
    return Compiled(
        registers=registers,
        shared_bytes=shared,
        stack_bytes=stack,
        # Spilled registers lie on the stack; disassembly takes a second, so not without one.
        spill_bytes=_spill_bytes(_cuobjdump("-sass", cubin)) if stack else 0,
        matrix_unit=_matrix_unit(kernel.asm["ptx"]),
        ctas_per_sm=ctas,
        occupancy=ctas * binary.num_warps / WARPS_PER_SM,
    )


def run_compiler(binary: Binary, arch: int):
    kernel = getattr(importlib.import_module(binary.module), binary.kernel)
    source = ASTSource(kernel, binary.signature, binary.constants, binary.attributes)
    options = {"num_warps": binary.num_warps, "num_stages": binary.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _spill_bytes(sass: str) -> int:
    """Return the bytes of all stores to local memory in the code: the figure that ptxas -v calls spill stores."""
    return sum(int(bits or 32) // 8 for bits in re.findall(r"\bSTL\b(?:\.[US]?(\d+))?", sass))


def _matrix_unit(ptx: str) -> str:
    instructions = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma.sync": "mma.sync"}
    return next((unit for unit, name in instructions.items() if name in ptx), "none")


def ctas_per_sm(arch: int, registers: int, shared_bytes: int, num_warps: int, tensor_memory: int = 0) -> int:
    """Return how many CTAs fit on a multiprocessor at once, by the rules of NVIDIA's occupancy calculator.

    Args:
        arch: 80, 90 or 100.
        registers: per thread; those of a warp are rounded up to 256 and lie within one partition.
        shared_bytes: per CTA; the system takes 1 KiB on top, and the sum is rounded up to 128.
        num_warps: per CTA.
        tensor_memory: columns per CTA, sm_100 only.
    """
    if shared_bytes > SHARED_PER_CTA[arch]:
        return 0
    registers_per_warp = max(1, -(-registers * 32 // 256)) * 256
    warps = min(WARPS_PER_SM, REGISTERS_PER_PARTITION // registers_per_warp * PARTITIONS)
    shared = -(-(shared_bytes + KIB) // 128) * 128
    limits = [CTAS_PER_SM, warps // num_warps, SHARED_PER_SM[arch] // shared]
    if tensor_memory:
        limits.append(TENSOR_MEMORY_COLUMNS // tensor_memory)
    return min(limits)


def distinct(launches, arch: int) -> list[tuple[list, Binary]]:
    """Return the binaries that (label, launch) pairs need, each with the labels that share it."""
    groups: dict[str, tuple[list, Binary]] = {}
    for label, launch in launches:
        binary = specialize(launch, arch)
        # The key is the repr: Triton tells True from 1.
        labels, _ = groups.setdefault(repr(binary), ([], binary))
        if label not in labels:
            labels.append(label)
    return list(groups.values())


def sample(groups) -> list[tuple[list, Binary]]:
    """Return one binary for each kernel, dtype and head dimension."""
    chosen = {}
    for labels, binary in groups:
        chosen.setdefault((binary.kernel, binary.is_bf16, labels[0].get("K")), (labels, binary))
    return list(chosen.values())


def _try_to_compile(binary: Binary, arch: int) -> tuple[Compiled | str, float]:
    """Return the figures, or an error as text, and the seconds that compiling took.

    The error is text because Triton's exceptions do not pass from one process to another.
    """
    start = time.perf_counter()
    try:
        result = compile_binary(binary, arch)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    return result, time.perf_counter() - start


def compile_all(groups, arch: int) -> list[Compiled | str]:
    """Return the figures, or an error, of each binary; compile two at a time and report each by a line on stderr."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        futures = {pool.submit(_try_to_compile, binary, arch): n for n, (_, binary) in enumerate(groups)}
        results: list[Compiled | str] = [""] * len(groups)
        for done, future in enumerate(as_completed(futures), 1):
            labels, binary = groups[futures[future]]
            results[futures[future]], seconds = future.result()
            progress = f"[{done:3}/{len(groups)}] {seconds:4.1f} s  {binary.kernel}: {describe(labels)}"
            print(progress, file=sys.stderr, flush=True)
    return results


def problems(groups, results, arch: int) -> list[str]:
    """Return what does not compile and, on sm_90, what breaks a limit."""
    found = []
    for (labels, binary), result in zip(groups, results, strict=True):
        broken = [result] if isinstance(result, str) else broken_limits(labels[0], binary, result) if arch == 90 else []
        found += [f"{binary.kernel}, {describe(labels)}: {text}" for text in broken]
    return found


def broken_limits(label, binary: Binary, compiled: Compiled) -> list[str]:
    """Return the limits of sm_90 that a binary does not keep, in words."""
    found = []
    if compiled.spill_bytes:
        found.append(f"spills {compiled.spill_bytes} bytes of registers, wanted 0; take smaller blocks or more warps")
    if compiled.shared_bytes > SHARED_PER_CTA[90]:
        shared = f"{compiled.shared_bytes:,} bytes of shared memory, limit {SHARED_PER_CTA[90]:,}"
        found.append(f"takes {shared}; take smaller blocks or fewer stages")
    if binary.is_bf16 and binary.kernel in WGMMA_FROM_ROWS:
        large = label.get("R", 0) >= WGMMA_FROM_ROWS[binary.kernel]
        if compiled.matrix_unit == "none" or (large and compiled.matrix_unit != "wgmma"):
            found.append(f"matrix unit: got {compiled.matrix_unit}, wanted wgmma{'' if large else ' or mma.sync'}")
    return found


def describe(labels, domain=None) -> str:
    """Describe labels in words; those that differ in one field only are put together.

    Args:
        domain: all values of each field; a field that has all of them is left out.
    """
    domain = domain or {}
    boxes = [{field: (value,) for field, value in label.items()} for label in labels]
    for field in list(boxes[0]):
        merged: dict[tuple, dict] = {}
        for box in boxes:
            rest = tuple((name, values) for name, values in box.items() if name != field)
            kept = merged.setdefault(rest, {**box, field: ()})
            kept[field] += tuple(value for value in box[field] if value not in kept[field])
        for box in merged.values():
            box[field] = tuple(sorted(box[field], key=domain.get(field, box[field]).index))
        boxes = list(merged.values())
    words = [
        ", ".join(_field(name, values) for name, values in box.items() if values != domain.get(name)) for box in boxes
    ]
    return "; ".join(words) or "all"


def _field(name, values) -> str:
    text = "/".join(map(str, values))
    return f"{name} {text}" if name in NAMED_FIELDS else text


def table(groups, results, arch: int) -> list[str]:
    """Return the lines of the Markdown table; binaries with the same figures share one, those that failed have none."""
    head = (
        "kernel", "configurations", "warps", "stages", "registers", "shared KB", "spill B", "stack B", "matrix unit",
        "CTAs/SM", "occupancy",
    )  # fmt: skip
    lines = [f"Compiled with Triton {triton.__version__} for sm_{arch}.", ""]
    lines += [_line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for kernel, rows in _rows(groups, results).items():
        domain: dict[str, tuple] = {}
        for label in (label for labels in rows.values() for label in labels):
            domain = {field: tuple(dict.fromkeys((*domain.get(field, ()), label[field]))) for field in label}
        for (warps, stages, figures), labels in rows.items():
            lines.append(_line((
                kernel, describe(labels, domain), warps, stages, figures.registers, f"{figures.shared_bytes / KIB:.1f}",
                figures.spill_bytes, figures.stack_bytes, figures.matrix_unit, figures.ctas_per_sm,
                f"{figures.occupancy:.1%}",
            )))  # fmt: skip
    return lines


def _rows(groups, results) -> dict[str, dict[tuple, list]]:
    """Return the table as a dict: kernel -> (warps, stages, figures) -> labels."""
    rows: dict[str, dict[tuple, list]] = {}
    for (labels, binary), result in zip(groups, results, strict=True):
        if isinstance(result, Compiled):
            figures = (binary.num_warps, binary.num_stages, result)
            rows.setdefault(binary.kernel, {}).setdefault(figures, []).extend(labels)
    return rows


def _line(cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def stored_tables() -> dict[str, list[str]]:
    """Return the tables between the markers of README.md, by their first line, which names the version of Triton."""
    text = README.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or END not in text.split(BEGIN)[1]:
        raise SystemExit(f"{README}: wanted the lines {BEGIN!r} and {END!r} once each, for the tables between them")
    tables: dict[str, list[str]] = {}
    for line in text.split(BEGIN)[1].split(END)[0].strip().splitlines():
        if line.startswith("Compiled with Triton "):
            tables[line] = []
        if tables:
            tables[next(reversed(tables))].append(line)
    return {title: "\n".join(lines).strip().splitlines() for title, lines in tables.items()}


def write_table(lines: list[str]) -> None:
    """Write a table to README.md: in place of the one of this version of Triton, or after the others."""
    tables = {**stored_tables(), lines[0]: lines}
    before, after = README.read_text(encoding="utf-8").split(BEGIN)
    text = "\n\n".join("\n".join(table) for table in tables.values())
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after.split(END, 1)[1]}", encoding="utf-8")


def compare(lines: list[str]) -> list[str]:
    """Return the differences from the stored table of this version of Triton; where there is none, print a remark."""
    tables = stored_tables()
    if lines[0] not in tables:
        made = " ".join(tables) or "There is no table."
        print(f"{README.name} says: {made} Now: {lines[0]} Figures differ among versions: only limits were checked.")
        return []
    diff = difflib.unified_diff(tables[lines[0]], lines, f"{README.name} (stored)", "compiled now", n=0, lineterm="")
    return list(diff)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python kernels/tools/aot.py", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_PER_SM), default=90)
    parser.add_argument("--sample", action="store_true", help="one binary per kernel, dtype and head dimension")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="write the table to kernels/README.md")
    action.add_argument("--check", action="store_true", help="compare the table with kernels/README.md")
    options = parser.parse_args(arguments)
    if (options.write or options.check) and (options.arch != 90 or options.sample):
        parser.error("the table in kernels/README.md is that of all binaries on sm_90; leave --arch and --sample away")
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET=1 is set: kernels are interpreted, not compiled; unset it", file=sys.stderr)
        return 2

    # Imported after the check above: under TRITON_INTERPRET the kernels that it imports cannot be compiled.
    from production import production_launches

    groups = distinct(production_launches(), options.arch)
    groups = sample(groups) if options.sample else groups
    start = time.perf_counter()
    results = compile_all(groups, options.arch)
    lines = table(groups, results, options.arch)
    print(f"{len(groups)} binaries for sm_{options.arch} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    found = problems(groups, results, options.arch)
    if options.write:
        write_table(lines)
    elif options.check:
        found += [*compare(lines)]
    else:
        print("\n".join(lines))
    print("\n".join(found or ["everything compiles" + (", all limits are kept" if options.arch == 90 else "")]))
    return 1 if found else 0


if __name__ == "__main__":
    # Run from the importable module, not from __main__, so that worker processes can unpickle its classes.
    sys.exit(importlib.import_module("aot").main())
