"""The tables of docs/lab/pretrained.md that are generated from bench/results."""


from bench import ROOT
from bench.harness.pages import Part, one_after_another, table

DOCS = ROOT / "docs" / "lab" / "pretrained.md"
COMPARISON = Part(DOCS, "comparison", "bench/pretrained/run_pretrained.py --tables")
LEARNING = Part(DOCS, "learning", "bench/pretrained/picture.py --docs")
RIVALS = ("trl", "plain")
NAMES = {"trl": "TRL", "plain": "plain", "fastrm": "fastrm"}


def comparison_lines(reports: list[dict]) -> list[str]:
    """Return the tables of these reports, which stand in docs/lab/pretrained.md."""
    return one_after_another(reports, device_lines)


def device_lines(report: dict) -> list[str]:
    """Return the Markdown of one device: measured figures, and the bound by arithmetic."""
    entries = report["workloads"]
    return [
        _environment(report["device"], entries),
        "",
        *table(
            ["preferences", "pairs a step", "trainer", "s/step", "peak MiB", "tokens", "TFLOP", "held-out accuracy",
             "fastrm is faster by", "memory"],
            [cells for name, entry in entries.items() for cells in _measured(name, entry)],
        ),
        "",
        *table(
            ["preferences", "tokens of pairs", "of trees", "TRL's, padded", "needed TFLOP", "at the matmul rate",
             "fastrm above that", "TRL's tokens over the trees'", "speed over TRL"],
            [_floor(name, entry) for name, entry in entries.items()],
        ),
    ]  # fmt: skip


def _environment(device: str, entries: dict) -> str:
    first = next(iter(entries.values()))
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items() if number)
    dates = sorted(entry["date"] for entry in entries.values())
    rates = [entry["matmul_flops"] / 1e12 for entry in entries.values()]
    return (
        f"**{device}**, {first['threads']} threads, float32 ({dates[0]} to {dates[-1]}; {versions}; "
        f"{min(rates):.2f} to {max(rates):.2f} TFLOP/s in a large matrix product)"
    )


def _measured(name: str, entry: dict) -> list[list[str]]:
    rows, ours = [], entry["variants"]["fastrm"]
    for variant in (*RIVALS, "fastrm"):
        theirs = entry["variants"][variant]
        ratios = ["", ""]
        if variant in RIVALS:
            ratios = [f"{theirs['seconds'] / ours['seconds']:.2f}x", f"{theirs['peak_mib'] / ours['peak_mib']:.2f}x"]
        rows.append(
            [
                name if variant == RIVALS[0] else "", str(entry["num_pairs"]) if variant == RIVALS[0] else "",
                NAMES[variant], f"{theirs['seconds']:.2f}", f"{theirs['peak_mib']:,.0f}", f"{theirs['tokens']:,.0f}",
                f"{theirs['flops'] / 1e12:.2f}", f"{theirs['accuracy']:.4f}", *ratios,
            ]
        )  # fmt: skip
    return rows


def _floor(name: str, entry: dict) -> list[str]:
    ours, trl = entry["variants"]["fastrm"], entry["variants"]["trl"]
    floor = entry["tree_flops"] / entry["matmul_flops"]
    return [
        name, f"{entry['pairwise_tokens']:,.0f}", f"{entry['tree_tokens']:,.0f}", f"{trl['tokens']:,.0f}",
        f"{entry['tree_flops'] / 1e12:.2f}", f"{floor:.2f} s", f"{ours['seconds'] / floor:.2f}x",
        f"{trl['tokens'] / entry['tree_tokens']:.2f}x", f"{trl['seconds'] / ours['seconds']:.2f}x",
    ]  # fmt: skip
