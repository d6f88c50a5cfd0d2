"""The page that `fastrm data check` prints about a source."""

from collections import Counter

from rich.console import Console
from rich.text import Text

from fastrm.data.check import Refusals, SourceCheck
from fastrm.data.prepared.findings import PairFindings, bare_sentence
from fastrm.data.show import counted, print_row, show_or_refuse
from fastrm.data.sources.key_tally import EQUAL, REVERSED
from fastrm.data.sources.keys import ignore_setting, nearest
from fastrm.data.sources.layouts import keys_read_by
from fastrm.data.template import ConversationEncoder
from fastrm.limits import MediaLimits
from fastrm.tables import Table
from fastrm.ui import print_table, say

_MAX_COPIES = 3


def print_page(
    console: Console,
    name: str,
    found: SourceCheck,
    encoder: ConversationEncoder | None = None,
    limits: MediaLimits | None = None,
) -> None:
    """Print the findings in the rows of a source.

    Args:
        name: what the user calls the source.
        encoder: of the model that will read the rows: the first one is shown as it reads it.
        limits: of the bytes of images and videos.
    """
    console.print(Text(name, style="bold"), soft_wrap=True)
    say(console, _summary(found))
    parts = (
        _layouts(found), _by_reason("Refused", found.refused),
        _by_reason("Parts of rows that are left out", found.left_out), _unread(found), _ignore(found), _contents(found),
    )  # fmt: skip
    for part in parts:
        if isinstance(part, Table):
            print_table(console, part)
        elif part is not None:
            console.print()
            say(console, part)
    console.print()
    if found.first is not None:
        say(console, "The first row as it is read")
        print_row(console, show_or_refuse(found.first, limits or MediaLimits(), encoder))


def _summary(found: SourceCheck) -> str:
    files = "1 file" if len(found.files) == 1 else f"{len(found.files):,} files"
    good = found.num_usable
    share = f" ({_percent(found.num_refused / found.num_rows)})" if found.num_refused else ""
    return f"{counted(found.num_rows, 'row')} in {files}: {good:,} can be used, {found.num_refused:,} refused{share}"


def _layouts(found: SourceCheck) -> Table | None:
    keys = found.all_keys
    if not keys.layouts:
        return None
    table = Table("layout", "rows", "keys that are read", title="Read as", text=(0, 2))
    for name, number in keys.layouts.most_common():
        table.add_row(name, f"{number:,}", ", ".join(keys.read[name]))
    return table


def _by_reason(title: str, rows: dict[str, Refusals]) -> Table | None:
    if not rows:
        return None
    table = Table("reason", "rows", "the first of them", title=title, text=(0, 2))
    for code, found in sorted(rows.items(), key=lambda item: -item[1].number):
        table.add_row(code, f"{found.number:,}", _examples(found))
    return table


def _examples(refused: Refusals) -> str:
    return "\n".join(f"{origin}: {message}" for origin, message in refused.examples)


def _unread(found: SourceCheck) -> Table | None:
    """Return the table of keys that are not read, of each file once."""
    tallies = {path: tally for path, tally in found.keys.items() if tally.unread}
    if not tallies:
        return None
    table = Table("key", "rows", "such as", "nearest key", title="Keys that are not read", text=(0, 2, 3))
    for path, tally in tallies.items():
        if len(found.files) > 1:
            table.add_row(Text(path, style="italic"))
        known = keys_read_by(tally.layouts)
        for name, number in tally.unread.most_common():
            table.add_row(name, f"{number:,}", tally.examples[name], nearest(name, known) or "")
    return table


def _ignore(found: SourceCheck) -> str | None:
    keys = found.all_keys
    names = keys.likely_metadata(keys_read_by(keys.layouts))
    return f"Where that is right, say so in the source: {ignore_setting(names)}" if names else None


def _contents(found: SourceCheck) -> Table | None:
    if not len(found.records):
        return None
    table = Table("", "", title="In the rows", text=(0, 1))
    pairs = found.preferences
    ties = f", and {counted(found.num_ties, 'tie')}" if found.num_ties else ""
    table.add_row("prompts", f"{found.num_prompts:,} different; rows of one prompt and source become one group")
    table.add_row("preferences", f"{pairs.num_pairs:,}{ties}")
    table.add_row("both ways", _contradictions(found, pairs))
    for lesson, number in found.without.items():
        if sentence := bare_sentence(lesson, number):
            table.add_row(lesson, sentence)
    if scores := found.all_keys.scores:
        table.add_row("scores", _against_scores(scores))
    table.add_row("copies", _copies(found))
    if pairs.num_pairs:
        table.add_row("length", _length(pairs))
    table.add_row("media", _media(found))
    return table


def _contradictions(found: SourceCheck, pairs: PairFindings) -> str:
    if pairs.contradiction is None:
        return "no two responses are preferred both ways"
    first, second = (found.place(*place) for place in pairs.example)
    return f"{pairs.contradiction}, first at {first} and {second}: nothing can be learned from them"


def _against_scores(scores: Counter[str]) -> str:
    parts = {EQUAL: "with equal scores of both responses", REVERSED: "whose rejected response has the greater score"}
    found = (f"{counted(scores[kind], 'pair')} {what}" for kind, what in parts.items() if scores[kind])
    said = "they are trained on as chosen and rejected say: remove them if the scores are right"
    return f"{' and '.join(found)}; {said}"


def _copies(found: SourceCheck) -> str:
    number, copies = found.copies(_MAX_COPIES)
    if not number:
        return "no row repeats another"
    shown = "; ".join(f"{again} repeats {first}" for again, first in copies)
    more = f"; and {number - len(copies):,} more" if number > len(copies) else ""
    return f"{counted(number, 'row')} with the prompt, responses and preferences of an earlier one: {shown}{more}"


def _length(pairs: PairFindings) -> str:
    medians = f"median of {pairs.chosen:,} characters chosen, {pairs.rejected:,} rejected"
    share = pairs.share_longer
    if share is None:
        return f"{medians}; all pairs are of equal length"
    line = f"{medians}; the longer one is chosen in {_percent(share)} of {pairs.longer + pairs.shorter:,} unequal pairs"
    return f"{line}: a model may learn that in place of quality" if pairs.liking else line


def _media(found: SourceCheck) -> str:
    uses = sum(number for number, _ in found.media.values())
    if not uses:
        return "none; text only"
    most, name = max(found.media.values(), key=lambda use: use[0])
    line = f"{counted(len(found.media), 'different image or video', 'different images and videos')}"
    if most == 1:
        return f"{line}, each in one row"
    repeated = sum(number > 1 for number, _ in found.media.values())
    return f"{line} in {uses:,} places; {repeated:,} of them in several rows, most often {name}, in {most:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
