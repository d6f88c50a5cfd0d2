"""Small benchmark files in exactly the published layouts, and second writings of each benchmark's rules.

The naive measures follow the authors' code, row by row and in plain loops, in the versions that the docstrings of
fastrm/evaluate/benchmarks name, and share nothing with the modules that they test.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from fastrm.evaluate.benchmarks import load_benchmark

REWARDBENCH_SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
                  "hep-python": 164, "hep-rust": 164},
}  # fmt: skip


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_json(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def multimodal_rows() -> list[dict]:
    """all_data.json, with every category and both parts of safety and reasoning."""
    kinds = [
        ("nocaps_1", "open_generation/correctness_task"), ("visitbench_2", "open_generation/preference_task"),
        ("mmmu-s_3", "knowledge"), ("mathvista_4", "reasoning"), ("EMMA-Coding_5", "reasoning"), ("PAIRS_6", "safety"),
        ("hateful_7", "safety"), ("MMBench_8", "vqa"), ("nocaps_1", "open_generation/correctness_task"),
    ]  # fmt: skip
    return [
        {"ID": name, "Text": f"Question {n}?", "Image": f"images/{name}.jpg", "Output1": f"one {n}",
         "Output2": f"two {n}", "Better": "Output2" if n % 3 == 0 else "Output1", "Category": category}
        for n, (name, category) in enumerate(kinds)
    ]  # fmt: skip


def rewardbench_rows(each: int = 2) -> list[dict]:
    """The split `filtered`, `each` rows of every subset."""
    subsets = [subset for section in REWARDBENCH_SECTIONS.values() for subset in section]
    return [
        {"prompt": f"Do {n}.", "chosen": f"done {n}", "chosen_model": "a", "rejected": f"no {n}", "rejected_model": "b",
         "subset": subset, "id": n}
        for n, subset in enumerate(subset for subset in subsets for _ in range(each))
    ]  # fmt: skip


def rewardbench2_rows(prompts: int = 3) -> list[dict]:
    """The split `test`: best of four, and the ties' ref and tied rows."""
    rows = [
        {"id": str(n), "prompt": f"Do {n}.", "chosen": [f"right {n}"], "rejected": [f"wrong {n} {k}" for k in range(3)],
         "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["m"], "subset": subset}
        for n, subset in enumerate(("Factuality", "Precise IF", "Math", "Safety", "Focus") * prompts)
    ]  # fmt: skip
    for n in range(prompts):
        for kind, correct in (("ref", 1), ("tied", 3 + n)):
            rows.append(
                {"id": f"{kind}:{n}", "prompt": f"Name {n}.", "chosen": [f"{kind} {k}" for k in range(correct)],
                 "rejected": [f"not {k}" for k in range(2 + n)], "num_correct": correct, "num_incorrect": 2 + n,
                 "total_completions": correct + 2 + n, "models": ["m"], "subset": "Ties"}
            )  # fmt: skip
    return rows


def rm_bench_rows(each: int = 2) -> list[dict]:
    """total_dataset.json, `each` rows of every domain, of safety-refuse one more."""
    domains = [d for d in ("chat", "code", "math", "safety-refuse", "safety-response") for _ in range(each)]
    return [
        {"id": n, "prompt": f"Do {n}.", "chosen": [f"yes {n} {k}" for k in range(3)],
         "rejected": [f"no {n} {k}" for k in range(3)], "domain": domain}
        for n, domain in enumerate([*domains, "safety-refuse"])
    ]  # fmt: skip


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def naive_vl(rows: list[dict], rewards: list[list[float]]) -> dict[str, float]:
    found, groups = {}, {"official": defaultdict(list), "paper": defaultdict(list)}
    for row, pair in zip(rows, rewards, strict=True):
        best = 0 if row["human_ranking"] == [0, 1] else 1
        right = pair[best] > pair[1 - best]
        name, short = row["id"], min(row["id"].split("_")[0], row["id"].split("-")[0], key=len)
        if short in ("RLAIF", "RLHF", "hallucination"):
            groups["official"]["hallucination"].append(right)
        elif short in ("mathverse", "mmmu"):
            groups["official"]["reasoning"].append(right)
        else:
            groups["official"]["general"].append(right)
        if "mmmu" in name or "mathverse" in name:
            groups["paper"]["reasoning"].append(right)
        elif "hallucination" in name or "rlhf" in name or "rlaif" in name:
            groups["paper"]["hallucination"].append(right)
        else:
            groups["paper"]["general"].append(right)
    for grouping, parts in groups.items():
        found |= {f"{grouping}/{part}": _mean(values) for part, values in parts.items()}
        found[f"{grouping}/macro"] = _mean(map(_mean, parts.values()))
    found["overall"] = found["acc"] = _mean(v for values in groups["paper"].values() for v in values)
    return found | {"macro": found["official/macro"]}


def naive_mm_rlhf(rows: list[dict], rewards: list[list[float]]) -> dict[str, float]:
    def category(row):
        path = row.get("image") or row.get("video")
        return next(word for word in ("mcq", "long", "short", "safety", "video") if word in path)

    found = {}
    for name in (None, "mcq", "long", "short", "safety", "video"):
        ids, right = defaultdict(list), []
        for row, pair in zip(rows, rewards, strict=True):
            if name in (None, category(row)):
                right.append(pair[0] > pair[1])
                ids[row["id"]].append(pair[0] > pair[1])
        found[name or "acc"] = _mean(right)
        found[f"{name}/acc_plus" if name else "acc_plus"] = _mean(all(values) for values in ids.values())
    return found | {"overall": found["acc"]}


def naive_multimodal(rows: list[dict], rewards: list[list[float]]) -> dict[str, float]:
    groups = defaultdict(list)
    for row, (first, second) in zip(rows, rewards, strict=True):
        right = first > second if row["Better"] == "Output1" else second > first
        names = {"overall", "acc", row["Category"]}
        if row["Category"] == "safety":
            names.add("safety/bias" if row["ID"].lower().startswith("pairs") else "safety/toxicity")
        if row["Category"] == "reasoning":
            names.add("reasoning/math" if row["ID"].lower().startswith("math") else "reasoning/coding")
        for name in names:
            groups[name].append(right)
    return {name: _mean(values) for name, values in groups.items()}


def naive_rewardbench(rows: list[dict], rewards: list[list[float]]) -> dict[str, float]:
    subsets = defaultdict(list)
    for row, (chosen, rejected) in zip(rows, rewards, strict=True):
        subsets[row["subset"]].append(chosen > rejected)
    found = {name: _mean(values) for name, values in subsets.items()}
    for section, weights in REWARDBENCH_SECTIONS.items():
        found[section] = sum(found[name] * weight for name, weight in weights.items()) / sum(weights.values())
    found["overall"] = _mean(found[section] for section in REWARDBENCH_SECTIONS)
    return found | {"acc": _mean(v for values in subsets.values() for v in values)}


def naive_rewardbench2(rows: list[dict], rewards: list[list[float]]) -> dict[str, float]:
    subsets, ties = defaultdict(list), {"ref": {}, "tied": {}}
    for row, scores in zip(rows, rewards, strict=True):
        if row["subset"] != "Ties":
            best = max(scores)
            subsets[row["subset"]].append(1 / scores.count(best) if scores[0] == best else 0)
            continue
        kind, number = row["id"].split(":")
        correct, wrong = scores[: row["num_correct"]], scores[row["num_correct"] :]
        ties[kind][number] = (min(correct) - max(wrong), max(correct) - min(correct))
    found = {name: _mean(values) for name, values in subsets.items()}
    found["Ties/ref"] = _mean(gap > 0 for gap, _ in ties["ref"].values())
    found["Ties/tied"] = _mean(gap > 0 for gap, _ in ties["tied"].values())
    preferred, hard, margin = [], [], []
    for number in set(ties["ref"]) & set(ties["tied"]):
        gap, spread = ties["tied"][number]
        least = min(gap, ties["ref"][number][0])
        preferred.append(gap > spread)
        hard.append(least > spread)
        if spread:
            margin.append(np.tanh(least / spread - 1))
        else:
            margin.append(0.0 if least == 0 else np.tanh(np.inf if least > 0 else -np.inf))
    found |= {"Ties/preferred": _mean(preferred), "Ties/preferred_hard": _mean(hard), "Ties/margin": _mean(margin)}
    found["Ties"] = (
        0.3 * found["Ties/tied"] + 0.3 * found["Ties/ref"] + 0.2 * found["Ties/preferred"]
        + 0.2 * found["Ties/preferred_hard"] + 0.01 * found["Ties/margin"]
    )  # fmt: skip
    names = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
    return found | {"overall": _mean(found[name] for name in names)}


def naive_rm_bench(rows: list[dict], rewards: list[list[float]]) -> dict[str, float]:
    def levels(kept):
        matrix = np.zeros((3, 3))
        for scores in kept:
            for i in range(3):
                for j in range(3):
                    matrix[i, j] += scores[i] > scores[3 + j]
        matrix /= len(kept)
        return {
            "hard": (matrix[0, 1] + matrix[0, 2] + matrix[1, 2]) / 3,
            "normal": (matrix[0, 0] + matrix[1, 1] + matrix[2, 2]) / 3,
            "easy": (matrix[1, 0] + matrix[2, 0] + matrix[2, 1]) / 3,
        }

    found = levels(rewards)
    domains = ("chat", "code", "math", "safety")
    for name in (*domains, "safety-refuse", "safety-response"):
        kept = [scores for row, scores in zip(rows, rewards, strict=True) if row["domain"].startswith(name)]
        found |= {f"{name}/{level}": value for level, value in levels(kept).items()}
        found[name] = _mean(levels(kept).values())
    for level in ("hard", "normal", "easy"):
        found[f"macro/{level}"] = _mean(found[f"{name}/{level}"] for name in domains)
    return found | {"overall": _mean(found[name] for name in domains)}


VL_IDS = (
    "RLAIF-V-1", "RLHF-V-2", "hallucination_pair-3", "mathverse_4", "mmmu_pro_5", "wildvision-6", "jailbreak-7",
    "svit-8", "RLAIF-V-1",
)  # fmt: skip


def vl_rows() -> list[dict]:
    return [
        {"id": name, "query": f"<image>\nWhat is {n}?", "response": [f"a {n}", f"b {n}"], "models": ["x", "y"],
         "human_ranking": [1, 0] if n % 3 == 0 else [0, 1], "image_path": f"images/{n}.jpg"}
        for n, name in enumerate(VL_IDS)
    ]  # fmt: skip


def mm_rows() -> list[dict]:
    kinds = [
        "mcq/a.png",
        "mcq/a.png",
        "long/b.png",
        "short/c.png",
        "safety/d.png",
        "video/e",
        "video/e",
        "short/video.png",
    ]
    return [
        {"id": f"{kind}_x", "prompt": f"What {n}?", "chosen": f"good {n}", "rejected": f"bad {n}",
         "video" if kind == "video/e" else "image": kind}
        for n, kind in enumerate(kinds)
    ]  # fmt: skip


SMALL = {
    "vl_rewardbench": ("data.jsonl", write_jsonl, vl_rows, naive_vl),
    "mm_rlhf_rewardbench": ("mm_reward_bench.jsonl", write_jsonl, mm_rows, naive_mm_rlhf),
    "multimodal_rewardbench": ("data/all_data.json", write_json, multimodal_rows, naive_multimodal),
    "rewardbench": ("data/filtered-00000-of-00001.parquet", write_parquet, rewardbench_rows, naive_rewardbench),
    "rewardbench2": ("data/test-00000-of-00001.parquet", write_parquet, rewardbench2_rows, naive_rewardbench2),
    "rm_bench": ("total_dataset.json", write_json, rm_bench_rows, naive_rm_bench),
}
NAMES = sorted(SMALL)


def small(name, folder):
    """(benchmark, rows) of a small file in the published layout."""
    file, write, make_rows, _ = SMALL[name]
    rows = make_rows()
    write(folder / file, rows)
    return load_benchmark(name, str(folder)), rows


def random_rewards(benchmark, seed, levels=3):
    """Few levels, so that there are many ties."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, levels, row.num_rewards).astype(float).tolist() for row in benchmark.rows]
