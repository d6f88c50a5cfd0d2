"""Runs as HTML pages: report.html of one run, and `fastrm compare` of several, made of what run folders hold.

A run need not have ended: what it has written so far is shown.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrm.data.prepared.report import describe_sources
from fastrm.errors import ConfigError
from fastrm.evaluate.ratings import FIGURES, shown
from fastrm.report.page import Chart, Charts, Facts, Paragraph, Section, SortableTable, chart, write_page
from fastrm.storage import check_output
from fastrm.tables import Table
from fastrm.train.metrics import read_rows
from fastrm.train.report import accuracies, draw_lines, smooth
from fastrm.train.reward_curves import reward_curves
from fastrm.ui import make_console, new_figure, print_table, say
from fastrm.yaml_files import flat, read_yaml

REFUSED_SHOWN = 50
# What is drawn: the name in metrics.jsonl, that of the same on held-out data, and what it is called; "" is no name.
_CURVES = (
    ("loss", "eval/loss", "loss"),
    ("preference_loss", "eval/preference_loss", "loss of preferences"),
    ("critique_loss", "eval/critique_loss", "loss of critiques, times critic.lm_weight"),
    ("rewards/accuracies", "eval/accuracy", "pair accuracy"),
    ("rewards/margins", "eval/margin", "margin (chosen - rejected reward)"),
    ("preferences_per_second", "", "preferences a second"),
    ("grad_norm", "", "gradient norm"),
    ("lr", "", "learning rate"),
    *(("", f"eval/{name}", f"{text} with ratings") for name, text in FIGURES.items()),
)
# What is said of a source, and the number of what it is said of: of preferences, of ratings, of a judge's texts.
_BY_SOURCE = (("accuracy", "preferences"), ("spearman", "ratings"), ("loss", "texts"))
_OF_ONE_FOLDER = ("run.dir", "run.name", "run.tags", "data.prepared")  # settings that differ between any two runs
_CAPTIONS = ("Figures of whole runs", "Names, tags and folders are left out")


@dataclass(frozen=True)
class StoredRun:
    """A run as its folder has it.

    Attributes:
        settings: config.yaml by dotted keys.
        rows: of metrics.jsonl.
        summary: summary.json; empty before the end of the run.
    """

    folder: Path
    settings: dict[str, Any]
    rows: list[dict]
    summary: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "StoredRun":
        """Read a run folder.

        Raises:
            ConfigError: if it holds no run.
        """
        rows, config, summary = read_rows(folder / "metrics.jsonl"), folder / "config.yaml", folder / "summary.json"
        if not rows or not config.is_file():
            raise ConfigError(
                f"{folder}: holds no run: metrics.jsonl or config.yaml is missing or empty; name folders of runs, as "
                "runs/quickstart"
            )
        found = json.loads(summary.read_text()) if summary.is_file() else {}
        return cls(folder, flat(read_yaml(config)[0], in_lists=True), rows, found)

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.settings.get("run.name") or self.folder.resolve().name

    @property
    def paradigm(self) -> str:
        """The kind of model that the run trains."""
        return self.settings.get("paradigm", "reward")

    @property
    def last_eval(self) -> dict:
        """The row of the last evaluation; empty if there was none."""
        return next((row for row in reversed(self.rows) if "eval/loss" in row), {})

    def points(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of a figure of metrics.jsonl, where it has one."""
        return [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]

    def facts(self) -> dict[str, str]:
        """Return the figures of the run in words, by their names."""
        summary, evaluated = self.summary, self.last_eval
        found = {"steps": f"{summary.get('steps', self.rows[-1]['step']):,}{'' if summary else ', not ended'}"}
        if accuracy := self.points("eval/accuracy"):
            best = max(accuracy, key=lambda point: point[1])
            found["held-out pair accuracy"] = f"{evaluated['eval/accuracy']:.4f}"
            found["highest at an evaluation"] = f"{best[1]:.4f} (step {best[0]:,})"
        for name, text in FIGURES.items():
            if (key := f"eval/{name}") in evaluated:
                found[f"held-out {text}"] = shown(evaluated[key])
        if evaluated:
            found["held-out loss"] = f"{evaluated['eval/loss']:.4f}"
        if losses := self.points("loss"):
            found["training loss, last"] = f"{losses[-1][1]:.4f}"
        if summary:
            found["preferences"] = f"{summary['preferences']:,}"
            found["preferences a second"] = f"{summary['preferences_per_second']:,.1f}"
            found["training time"] = f"{summary['train_seconds'] / 60:,.1f} min"
            found["tokens processed"] = f"{summary['tokens_processed']:,}"
            found["tokens a pairwise trainer needs"] = f"{summary['tokens_unshared']:,}"
            found["peak memory"] = f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB"
            found["refused rows"] = f"{summary['quarantined']:,}"
        return found


def try_to_write_run_page(folder: Path, say: Callable[[str], None]) -> None:
    """Write report.html, or say why it cannot be written: a picture must not cost a run its end."""
    try:
        write_run_page(folder)
    except Exception as error:
        say(f"warning: {folder / 'report.html'}: not written: {error or type(error).__name__}; the model is complete")


def write_run_page(folder: Path) -> None:
    """Write report.html into the folder of a run.

    Raises:
        ConfigError, StorageError: if the folder holds no run, or cannot be written.
    """
    run = StoredRun.read(folder)
    sections = [
        Section("Result", [Facts(list(run.facts().items()))]),
        *reward_curves({run.name: run.rows}, {run.paradigm}),
        Section("Curves", [Charts(list(_curves([run])))]),
        *_by_part([run]),
        *_data(run),
        Section("Refused rows", list(_refused(folder / "quarantine.jsonl"))),
        *_machine(run),
        Section("Configuration", [Paragraph((folder / "config.yaml").read_text(), preformatted=True)]),
    ]
    write_page(folder / "report.html", run.name, f"A run of fastrm in {folder}", sections)


def _curves(runs: Sequence[StoredRun]) -> Iterator[Chart]:
    """Yield a chart for each figure that a run has; several runs lie over one another, without their single rows."""
    for name, evaluated, label in _CURVES:
        if not any(run.points(name) or run.points(evaluated) for run in runs):
            continue
        figure = new_figure(5.2, 3.1)
        axes = figure.subplots()
        for number, run in enumerate(runs):
            colour, own = f"C{number % 10}", f"{run.name}, " * (len(runs) > 1)
            points = run.points(name)
            steps, values = [step for step, _ in points], [value for _, value in points]
            is_noisy = name != "lr"
            if len(runs) == 1 and is_noisy:
                axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.8)
            if values:
                line = smooth(values) if is_noisy else values
                axes.plot(steps, line, color=colour, linewidth=1.6, label=f"{own}training")
            if (held_out := run.points(evaluated)):
                axes.plot(*zip(*held_out, strict=True), "o--", color=colour if own else "C1", markersize=4,
                          linewidth=1.0, label=f"{own}held out")  # fmt: skip
        _finish(axes, label)
        mean = "; training as a running mean" if name not in ("", "lr") else ""
        yield chart(figure, f"{label.capitalize()} over the steps{mean}.")
    if len(runs) == 1 and (parts := accuracies([row for row in runs[0].rows if "eval/accuracy" in row])):
        figure = new_figure(5.2, 3.1)
        axes = figure.subplots()
        draw_lines(parts, axes)
        _finish(axes, "held-out pair accuracy")
        yield chart(figure, "Held-out pair accuracy by set and source, the largest ones.")


def _finish(axes, label: str) -> None:
    axes.legend(fontsize=8, frameon=False)  # a frame would hide its names on a dark page
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)


def _by_part(runs: Sequence[StoredRun]) -> Iterator[Section]:
    """Yield the section of the last evaluation's accuracy by named set and by source, a column for each run."""
    found: dict[str, dict[int, tuple[str, float]]] = {}
    for number, run in enumerate(runs):
        last = run.last_eval
        for key, value in last.items():
            if key.count("/") == 2 and key.endswith("/accuracy"):
                found.setdefault(f"set {key.split('/')[1]}", {})[number] = f"{value:.4f}", value
        for source, figures in last.get("eval/sources", {}).items():
            kind, total = next((kind, total) for kind, total in _BY_SOURCE if total in figures)
            value = figures[kind]  # None for ratings without a correlation
            text = f"{shown(value)} of {figures[total]:,}"
            found.setdefault(source, {})[number] = text, -1.0 if value is None else value
    if found:
        rows = [[part, *(values.get(n, ("", -1.0)) for n in range(len(runs)))] for part, values in found.items()]
        headings = ["set or source", *(run.name if len(runs) > 1 else "accuracy" for run in runs)]
        caption = "Pair accuracy, with ratings Spearman's correlation, of a judge the loss, at the last evaluation"
        yield Section("Accuracy by source", [SortableTable(caption, headings, rows)])


def _data(run: StoredRun) -> Iterator[Section]:
    folder = Path(run.settings.get("data.prepared") or run.folder / "prepared")
    if (file := folder / "report.json").is_file():
        headings, rows = describe_sources(json.loads(file.read_text()))
        cells = [[source, *((f"{number:,}", number) for number in numbers)] for source, *numbers in rows]
        yield Section("Data", [SortableTable(f"What was read and kept, from {folder}", headings, cells)])


def _refused(file: Path) -> Iterator[Paragraph | SortableTable]:
    rows = read_rows(file)
    if not rows:
        yield Paragraph("None.")
        return
    counts = Counter(row["code"] for row in rows).most_common()
    yield SortableTable("Reasons", ["code", "rows"], [[code, (f"{number:,}", number)] for code, number in counts])
    shown = [[row["origin"], row["code"], row["message"]] for row in rows[:REFUSED_SHOWN]]
    yield SortableTable(f"The first {len(shown):,} of {len(rows):,}, from {file}", ["row", "code", "reason"], shown)


def _machine(run: StoredRun) -> Iterator[Section]:
    if run.summary:
        machine, versions = run.summary.get("hardware", {}), run.summary["versions"]
        pairs = [*machine.items(), ("processes", f"{run.summary['num_processes']:,}"), *versions.items()]
        yield Section("Machine and versions", [Facts(pairs)])


def compare_runs(folders: Sequence[Path], out: Path | None) -> None:
    """Print the figures of runs side by side and the settings in which they differ; write a page with their curves.

    Args:
        out: the HTML file; None writes none.

    Raises:
        ConfigError: for fewer than two runs, or a folder without one.
        StorageError: if the file cannot be written.
    """
    if len(folders) < 2:
        raise ConfigError("fastrm compare: got one run, wanted two or more; name the folders of runs")
    if out is not None:
        check_output(out)
    runs = _with_own_names([StoredRun.read(folder) for folder in folders])
    facts = [run.facts() for run in runs]
    figures = [[name, *(own.get(name, "") for own in facts)] for name in dict.fromkeys(n for own in facts for n in own)]
    settings = [[key, *map(_as_text, values)] for key, values in _differing(runs)]
    console, names = make_console(), [run.name for run in runs]
    tables = (("Runs", "", figures), ("Settings that differ", "setting", settings))
    for title, heading, rows in tables:
        table = Table(heading, *names, title=title, text=range(len(names) + 1) if heading else (0,))
        for row in rows:
            table.add_row(*row)
        print_table(console, table)
    if not settings:
        say(console, "none")
    if out is not None:
        sections = [
            Section(title, [SortableTable(said, [heading or "figure", *names], rows) if rows else Paragraph("None.")])
            for (title, heading, rows), said in zip(tables, _CAPTIONS, strict=True)
        ]
        sections += reward_curves({run.name: run.rows for run in runs}, {run.paradigm for run in runs})
        sections += [Section("Curves", [Charts(list(_curves(runs)))]), *_by_part(runs)]
        write_page(out, "Runs compared", ", ".join(str(run.folder) for run in runs), sections)
        say(console, f"curves are in {out}")


def _with_own_names(runs: list[StoredRun]) -> list[StoredRun]:
    """Return the runs, those of one name called by their folders."""
    times = Counter(run.name for run in runs)
    for run in runs:
        if times[run.name] > 1:
            run.settings["run.name"] = str(run.folder)
    return runs


def _differing(runs: Sequence[StoredRun]) -> Iterator[tuple[str, list]]:
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = [run.settings.get(key) for run in runs]
        if any(value != values[0] for value in values) and key not in _OF_ONE_FOLDER:
            yield key, values


def _as_text(value) -> str:
    """Return a setting as it is written in YAML."""
    if isinstance(value, list):
        return f"[{', '.join(map(_as_text, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
