"""The report of a run of `fastrm grpo`: report.json, report.png, and tables."""

from pathlib import Path

from fastrm.grpo.config import GrpoConfig
from fastrm.json_files import to_json
from fastrm.storage import write_whole
from fastrm.tables import Table
from fastrm.ui import make_console, new_figure, show

# Columns of a row of metrics.jsonl, by their names in TRL, and their titles in the picture.
PANELS = {
    "reward": "mean reward",
    "accuracy": "share of right rollouts",
    "completions/mean_length": "mean length in tokens",
    "frac_reward_zero_std": "share of questions with equal rewards",
}
# Those of a policy that is a judge, besides.
JUDGE_PANELS = {
    "format": "share of texts in the SPEC's form",
    "consistency": "mean consistency, -1 to 1",
    "first_place_rate": "verdicts for what is shown first",
    "no_verdict": "share of texts without a verdict",
}
# What is measured before and after: titles, and keys of the report.
MEASURES = (
    ("accuracy", "accuracy"), ("mean characters", "mean_characters"), ("judge", "judge_reward"),
    ("verdicts that turn when the order turns", "position_flip_rate"),
    ("verdicts for what is shown first", "first_place_rate"), ("texts in the SPEC's form", "format"),
    ("mean consistency", "consistency"), ("texts without a verdict", "num_parse_failures"),
    ("texts cut at their longest length", "texts_cut"),
)  # fmt: skip


def make_report(
    config: GrpoConfig,
    before: dict,
    after: dict,
    rows: list[dict],
    seconds: float,
    generation_seconds: float | None,
    folder: Path,
    ties: dict[str, int],
) -> dict:
    """Write report.json and report.png, and return the report.

    Args:
        rows: of metrics.jsonl.
        seconds: of the whole training.
        generation_seconds: of the rollouts' generation by the policy; None where vLLM generated.
        ties: preferences that were left out, by file.

    Returns:
        before and after: as `evaluate_policy` or `evaluate_judge`; training: means over the first and last fifth of the
        steps, and the time, in all, generating, and waiting for rewards; ties; settings: the configuration.
    """
    waited = sum(value for row in rows for name, value in row.items() if name.startswith("reward_seconds/"))
    fifth = max(1, len(rows) // 5)
    training = {
        "steps": len(rows),
        "seconds": seconds,
        "generation_seconds": generation_seconds,
        "reward_seconds": waited,
        "reward_share": waited / seconds,
        "first": _means(rows[:fifth]),
        "last": _means(rows[-fifth:]),
    }
    report = {"before": before, "after": after, "training": training, "ties": ties}
    report["settings"] = config.model_dump(mode="json")
    write_whole(folder / "report.json", to_json(report, indent=1) + "\n")
    _draw(rows, before, after, folder / "report.png")
    return report


def _means(rows: list[dict]) -> dict[str, float]:
    found = {name: [row[name] for row in rows if row.get(name) is not None] for name in PANELS | JUDGE_PANELS}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def show_report(report: dict) -> None:
    """Print what changed: on held-out questions, then in the rollouts."""
    console, before, after = make_console(), report["before"], report["after"]
    held_out = Table("held-out questions", "before", "after")
    for title, key in MEASURES:
        if key in before:
            held_out.add_row(title, *(_number(one[key]) for one in (before, after)))
    intervals = [one["interval"] for one in (before, after)]
    shown = ["none" if one is None else "{:.3f} to {:.3f}".format(*one) for one in intervals]
    held_out.add_row("95 % interval of accuracy", *shown)
    ties = sum(report["ties"].values())
    held_out.caption = f"{ties:,} ties among the preferences are left out." if ties else ""
    show(console, "What the policy answers", held_out)
    training = report["training"]
    rollouts = Table("rollouts", "first fifth", "last fifth")
    for name, title in _panels(training["last"]).items():
        values = [training[part].get(name) for part in ("first", "last")]
        rollouts.add_row(title, *("" if value is None else f"{value:.4f}" for value in values))
    share = f"{training['reward_share']:.1%} of {training['seconds']:,.0f} s went into waiting for rewards"
    generated = training["generation_seconds"]
    generation = "" if generated is None else f", {generated / training['seconds']:.1%} into generating rollouts"
    rollouts.caption = f"{share}{generation}."
    show(console, f"{training['steps']:,} steps", rollouts)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _draw(rows: list[dict], before: dict, after: dict, file: Path) -> None:
    panels = _panels(rows[-1])
    columns = len(panels) // 2
    figure = new_figure(5 * columns, 6)
    for axes, (name, title) in zip(figure.subplots(2, columns).flat, panels.items(), strict=True):
        axes.plot([row["step"] for row in rows], [row.get(name) for row in rows], color="tab:blue", linewidth=1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.suptitle(f"held-out accuracy {before['accuracy']:.3f} before, {after['accuracy']:.3f} after")
    figure.savefig(file, dpi=110)


def _panels(row: dict) -> dict[str, str]:
    """Return what is drawn of the steps, given one of them."""
    return PANELS | JUDGE_PANELS if "format" in row else PANELS
