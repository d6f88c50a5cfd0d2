"""The table of a judge's figures, and the complaint about what they leave out."""

from pathlib import Path

from fastrm.errors import DataError
from fastrm.model.loading import shortened
from fastrm.tables import Table
from fastrm.ui import make_console, message


def figures_table(report: dict) -> Table:
    """Return the table that is printed of figures, which have the names that `--json` has."""

    def share(value: float | None) -> str:
        return "none" if value is None else f"{value:.4f}"

    low, high = report["interval"] or (None, None)
    is_critic = "scorer" in report
    noun, rule = ("Critic", "equal rewards wrong") if is_critic else ("Judge", "both orders, failures wrong")
    table = Table("figure", "value", title=f"{noun} {report['judge']} on {report['preferences']:,} preferences")
    nothing = "none: no preference was judged"
    table.add_row(f"accuracy, {rule}", nothing if report["accuracy"] is None else share(report["accuracy"]))
    table.add_row("its 95 % interval", "none" if low is None else f"{low:.4f} - {high:.4f}")
    if is_critic:
        table.add_row("preferences with equal rewards", f"{report['ties']:,}")
        table.add_row("critiques", f"{report['num_generations']:,}")
        table.add_row("of them cut at their longest length", f"{report['critiques_cut']:,}")
        table.add_row("of them empty", f"{report['critiques_empty']:,}")
    else:
        table.add_row("accuracy as released (winner shown first)", share(report["accuracy_as_released"]))
        table.add_row("verdicts that turn when the order turns", share(report["position_flip_rate"]))
        table.add_row("verdicts for what is shown first", share(report["first_place_rate"]))
        table.add_row("ties", f"{report['ties']:,}")
        table.add_row("texts cut at their longest length", f"{report['texts_cut']:,} of {report['num_generations']:,}")
        table.add_row("texts without a verdict", f"{report['num_parse_failures']:,} of {report['num_generations']:,}")
    if rewarded := report["rewards"]:
        known = sum(any(one is not None for one in row["rewards"]) for row in rewarded)
        rows = {row["id"] for row in rewarded}.union(report["rewards_missing"])
        table.add_row("rows with rewards", f"{known:,} of {len(rows):,}")
    if report["preferences_not_met"]:
        table.add_row("preferences whose responses did not meet", f"{report['preferences_not_met']:,}")
    if len(report["sources"]) > 1:
        table.add_section()
        for source, figures in report["sources"].items():
            table.add_row(f"accuracy on {source} ({figures['preferences']:,})", share(figures["accuracy"]))
    return table


def complain(report: dict, json_out: Path | None) -> None:
    """Name what the figures leave out.

    Args:
        report: the figures under the names that `--json` has.
        json_out: the file that they are written to, or None.

    Raises:
        DataError: if anything is.
    """
    reasons = []
    if report["missing"]:
        what = "have a response without a scored critique" if "scorer" in report else "were not judged"
        reasons.append(f"{len(report['missing']):,} preferences {what}: {shortened(report['missing'])}")
    if report["refused"]:
        reasons.append(f"{len(report['refused']):,} lines or rows could not be used")
    if report["rewards_missing"]:
        reasons.append(
            f"{len(report['rewards_missing']):,} rows have no reward, or not all, since texts about them are missing: "
            f"{shortened(report['rewards_missing'])}"
        )
    console = make_console(stderr=True)
    if report["preferences_in_one_order"]:
        message(console, f"{report['preferences_in_one_order']:,} preferences were judged in one order only")
    if "scorer" in report and report["failures"]:
        cut, empty = report["critiques_cut"], report["critiques_empty"]
        message(console, f"critiques: {cut:,} cut at their longest length, {empty:,} empty; --json names them")
    if reasons:
        where = "" if json_out is None else f"; {json_out} names all"
        raise DataError(f"partial result over {report['preferences']:,} preferences: {'; '.join(reasons)}{where}")
