"""The answers in a gpu_day.json, question by question. A day that was cut short has fewer answers, not wrong ones."""

from bench.kernels.results import ATTENTION, HEAD
from bench.training.results import FASTRM, MAIN, PAIRS, completed, entries_of, key

MODEL = "7B"


def stage_results(record: dict, suffix: str) -> list[dict]:
    """Return the JSON files of all stages whose names end with `suffix`, in the order of the stages."""
    return [
        content
        for stage in record["stages"]
        for name, content in stage.get("results", {}).items()
        if name.endswith(suffix) and isinstance(content, dict)
    ]


def one_result(record: dict, name: str) -> dict | None:
    """Return the JSON file of that name; None if no stage wrote it."""
    found = stage_results(record, name)
    return found[-1] if found else None


def kernel_report(record: dict) -> dict | None:
    """Return the kernel benchmarks of the day as one report: for each operation the full run, else the quick one."""
    found = [(content, False) for content in stage_results(record, "-kernels.json")]
    found += [(content, True) for content in stage_results(record, "-kernels-quick.json")]
    operations: dict[str, dict] = {}
    for content, quick in found:
        for op in (HEAD, ATTENTION):
            part = content["operations"].get(op)
            if part and part["entries"] and op not in operations:
                operations[op] = {**part, "quick": quick}
    return {"device": found[0][0]["device"], "operations": operations} if operations else None


def training_report(record: dict) -> dict | None:
    """Return the training-step benchmarks of all stages as one report."""
    report: dict | None = None
    for content in stage_results(record, "-training.json"):
        report = report or {"device": content["device"], "runs": {}, "entries": []}
        for model, run in content["runs"].items():
            before = report["runs"].get(model, {"left_out": []})
            report["runs"][model] = {**run, "left_out": [*before["left_out"], *run["left_out"]]}
        for entry in content["entries"]:
            places = {key(old): place for place, old in enumerate(report["entries"])}
            place = places.get(key(entry))
            if place is None:
                report["entries"].append(entry)
            else:
                report["entries"][place] = completed(entry, report["entries"][place])
    return report


def variants(report: dict | None, model: str = MODEL, kind: str = MAIN, workload: str = PAIRS) -> dict:
    """Return the variants of a workload that have figures, by name."""
    found = entries_of(report, model, kind) if report else []
    entry = next((entry for entry in found if entry["name"] == workload), None)
    return {name: v for name, v in entry["variants"].items() if not v["failed"]} if entry else {}


def attention_share(record: dict) -> float | None:
    """Return attention's share of the profiled time of fastrm's step on the main workload."""
    profile = variants(training_report(record)).get(FASTRM, {}).get("profile")
    return profile["shares"]["attention"] if profile else None


def planned_memory(report: dict | None) -> list[tuple[str, str, float, float]]:
    """Return (workload, variant, planned MiB, measured MiB) of all variants that have both."""
    if report is None:
        return []
    return [
        (f"{entry['model']}, {entry['name']}", name, variant["planned_mib"], variant["peak_mib"])
        for entry in report["entries"]
        for name, variant in entry["variants"].items()
        if not variant["failed"] and variant.get("planned_mib") and variant["peak_mib"]
    ]


def red_gates(record: dict) -> list[str]:
    """Return what was wrong: tests that failed or did not finish, and variants that compute something else."""
    found = []
    tests = one_result(record, "tests.json")
    if tests is None:
        found.append("the GPU tests have no result")
    else:
        wrong = tests["failed"] + tests["errors"]
        if wrong:
            found.append(f"{wrong} GPU tests failed, first {tests['failures'][0]['test']}")
        if not tests["finished"]:
            found.append("the GPU tests were not finished")
        if not tests["passed"]:
            found.append("no GPU test passed")
    kernels, training = kernel_report(record), training_report(record)
    entries = [(op, entry) for op, part in (kernels or {"operations": {}})["operations"].items()
               for entry in part["entries"]]  # fmt: skip
    entries += [(entry["model"], entry) for entry in (training or {"entries": []})["entries"]]
    if turns := one_result(record, "turn_loss.json"):
        entries.append(("loss of turns", {"name": turns["model"], "variants": turns["programs"]}))
    for where, entry in entries:
        for name, variant in entry["variants"].items():
            if variant["failed"] and variant["failed"].startswith("red gate"):
                found.append(f"{where} {entry['name']}, {name}: {variant['failed']}")
    return found
