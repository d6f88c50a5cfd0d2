"""The tables of a GPU day in Markdown: the stages, the findings, and the decisions. Needs no torch."""

from collections.abc import Callable

from bench.gpu.results import (
    MODEL,
    attention_share,
    kernel_report,
    one_result,
    planned_memory,
    red_gates,
    training_report,
    variants,
)
from bench.gpu.runner import DONE
from bench.harness.pages import aligned_table
from bench.kernels.results import ATTENTION, is_goal_device, ratio
from bench.kernels.tables import report_lines as kernel_lines
from bench.training.results import ALTERNATIVES, FASTRM, FP8, PAIRS, goal_lines
from bench.training.tables import report_lines as training_lines

# Below this share of a step, attention is left as it is: a perfect one would gain less than half of it.
ATTENTION_MATTERS = 0.08
# A program of the update is worth a change if it saves this share of a step.
UPDATE_MATTERS = 0.03


def day_lines(record: dict) -> list[str]:
    """Return all tables of a day."""
    lines = ["# GPU day", "", *_heading(record), "", "## Stages", "", *_stages(record)]
    for title, part in (
        ("What follows", _decisions(record)), ("Tests", _tests(record)), ("Steps", _training(record)),
        ("Memory against the plan", _memory(record)), ("The 8-bit update alone", _update(record)),
        ("The loss of what critics and judges write", _turns(record)), ("Kernels", _kernels(record)),
    ):  # fmt: skip
        if part:
            lines += ["", f"## {title}", "", *part]
    return lines


def _heading(record: dict) -> list[str]:
    lines = []
    if record["rehearsal"]:
        lines.append("**A rehearsal: tiny models and emulated operators. No figure here says anything about a GPU.**")
    lines.append(f"{record['date']}; {record['seconds']:.0f} of {record['limit']:.0f} seconds.")
    if facts := one_result(record, "facts.json"):
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
        copy = facts["copy_bytes_per_second"]
        lines.append(
            f"{facts['device']}, {facts['cores']} cores; {versions}; {facts['matmul_flops'] / 1e12:,.1f} TFLOP/s in "
            f"large bf16 products" + (f", {copy / 1e9:,.0f} GB/s in large copies." if copy else ".")
        )
    return lines


def _stages(record: dict) -> list[str]:
    rows = [(s["name"], s["question"], s["status"], f"{s['seconds']:.0f} of {s['limit']:.0f}")
            for s in record["stages"]]  # fmt: skip
    lines = aligned_table(("stage", "question", "how it ended", "seconds"), rows)
    for stage in record["stages"]:
        last = stage.get("tail", "").strip().splitlines()[-3:]
        if stage["status"] != DONE and last:
            lines += ["", f"Last words of {stage['name']}:", "", *(f"    {line[:160]}" for line in last)]
    return lines


def _tests(record: dict) -> list[str]:
    tests = one_result(record, "tests.json")
    if tests is None:
        return []
    counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "errors", "skipped"))
    lines = [counts + ("." if tests["finished"] else "; not finished.")]
    for failure in tests["failures"]:
        last = failure["text"].strip().splitlines()[-1:] or [""]
        lines.append(f"- {failure['test']}: {last[0][:160]}")
    return lines


def _training(record: dict) -> list[str]:
    report = training_report(record)
    if report is None:
        return []
    lines = [*goal_lines([report]), ""] if is_goal_device(report["device"]) else []
    # Charts are not drawn here.
    lines += [line for line in training_lines(report) if not line.startswith("![")]
    profile = variants(report).get(FASTRM, {}).get("profile")
    if profile:
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in profile["shares"].items())
        phases = ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in profile["phases"].items())
        lines += ["", f"Where fastrm's time goes ({MODEL}, {PAIRS}): {shares}. Phases: {phases}."]
    return lines


def _memory(record: dict) -> list[str]:
    rows = [(workload, name, f"{planned:,.0f}", f"{measured:,.0f}", f"{measured / planned:.3f}")
            for workload, name, planned, measured in planned_memory(training_report(record))]  # fmt: skip
    columns = ("workload", "variant", "planned MiB", "peak MiB", "measured / planned")
    lines = aligned_table(columns, rows) if rows else []
    if found := one_result(record, "memory.json"):
        rows = [_size_row(size) for size in found["sizes"]]
        lines += ["", f"The largest packs that the plan puts into {found['usable_mib']:,.0f} MiB:", ""] if lines else []
        lines += aligned_table(("recomputing", "tokens", "planned MiB", "peak MiB", "fits"), rows)
    return lines


def _size_row(size: dict) -> tuple[str, ...]:
    peak, fits = size.get("peak_mib"), {True: "yes", False: "**no**", None: size.get("failed") or "unfinished"}
    tokens, planned = (f"{size[name]:,.0f}" if name in size else "-" for name in ("tokens", "planned_mib"))
    return size["checkpointing"], tokens, planned, "-" if peak is None else f"{peak:,.0f}", fits[size["fits"]]


def _update(record: dict) -> list[str]:
    found = one_result(record, "update.json")
    if found is None:
        return []
    floor, rows = found["floor_seconds"], _programs(found, lambda program: f"{program['first']:.1f}")
    lines = [f"{found['model']}: {found['elements']:,} elements" + (f", floor {floor:.4f} s." if floor else ".")]
    return [*lines, "", *aligned_table(("program", "s/update", "of the floor", "first, compiled, s"), rows)]


def _turns(record: dict) -> list[str]:
    found = one_result(record, "turn_loss.json")
    if found is None:
        return []
    rows = _programs(found, lambda program: f"{program['peak_mib']:,.0f}" if "peak_mib" in program else "-")
    shape = f"{found['rows']:,} rows of {found['width']:,}, vocabulary {found['vocabulary']:,}"
    lines = [f"{found['model']}: {shape}, floor {found['floor_seconds']:.4f} s."]
    return [*lines, "", *aligned_table(("program", "s", "of the floor", "peak MiB"), rows)]


def _programs(found: dict, last: Callable[[dict], str]) -> list[tuple[str, ...]]:
    """Return a row for each program that was timed alone: its name, seconds, share of the floor, and `last` of it."""
    floor, rows = found["floor_seconds"], []
    for name, program in found["programs"].items():
        if program["failed"]:
            rows.append((name, program["failed"], "-", "-"))
        else:
            over = f"{program['median'] / floor:.2f}x" if floor else "-"
            rows.append((name, f"{program['median']:.4f}", over, last(program)))
    return rows


def _kernels(record: dict) -> list[str]:
    report = kernel_report(record)
    return kernel_lines(report) if report else []


def _decisions(record: dict) -> list[str]:
    """Return the decisions by the rules of bench/README.md."""
    found = [f"Wrong: {red}. No figure counts until this is understood." for red in red_gates(record)]
    report = training_report(record)
    share = attention_share(record)
    if share is not None:
        verdict = "leave its kernels as they are" if share < ATTENTION_MATTERS else "its kernels are worth work"
        found.append(f"Attention takes {share:.1%} of the profiled step (rule: {ATTENTION_MATTERS:.0%}): {verdict}.")
    kernels = kernel_report(record)
    if kernels and (part := kernels["operations"].get(ATTENTION)):
        ratios = {e["name"]: r for e in part["entries"] if (r := ratio(e, "triton", "varlen"))}
        if ratios:
            found.append("triton over varlen: " + ", ".join(f"{n} {r:.2f}x" for n, r in ratios.items()) + ".")
    main, others = variants(report), variants(report, kind=ALTERNATIVES)
    bf16 = (others.get(FASTRM) or main.get(FASTRM) or {}).get("seconds", {}).get("median")
    recipes = {"rowwise": others.get(FP8) or main.get(FP8), "tensorwise": others.get("fastrm FP8 tensorwise")}
    gains = {name: bf16 / v["seconds"]["median"] for name, v in recipes.items() if v and bf16}
    if gains:
        best = max(gains, key=gains.get)
        shown = ", ".join(f"{name} {gain:.2f}x" for name, gain in gains.items())
        verdict = f"take {best}" if gains[best] > 1.02 else "FP8 gains nothing here"
        found.append(f"FP8 over bf16: {shown}: {verdict}.")
    found += _update_decision(record, bf16) + _turns_decision(record)
    return [f"- {line}" for line in found]


def _update_decision(record: dict, step_seconds: float | None) -> list[str]:
    update = one_result(record, "update.json")
    done = {name: p["median"] for name, p in update["programs"].items() if not p["failed"]} if update else {}
    ours = done.get("as fastrm has it")
    if ours is None or step_seconds is None:
        return []
    best = min(done, key=done.get)
    saved = (ours - done[best]) / step_seconds
    verdict = f"change to '{best}'" if saved >= UPDATE_MATTERS else "leave it"
    return [
        f"The update takes {ours / step_seconds:.0%} of a step; '{best}' would save {saved:.1%} of it (rule: "
        f"{UPDATE_MATTERS:.0%}): {verdict}."
    ]


def _turns_decision(record: dict) -> list[str]:
    turns = one_result(record, "turn_loss.json")
    done = {name: p["median"] for name, p in turns["programs"].items() if not p["failed"]} if turns else {}
    if len(done) < 2:
        return []
    best, other = sorted(done, key=done.get)
    return [
        f"The loss of what critics write: {best} is {done[other] / done[best]:.2f} times as fast as {other} (rule: "
        f"`auto` takes the faster one)."
    ]
