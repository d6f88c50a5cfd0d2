"""One HTML file from sections of blocks, with nothing outside it: styles, script, charts and images are in the file.

Every text is escaped by the template, and the page's policy lets a browser run its one script only, known by its
digest, and load nothing: a text of the data that looks like HTML or a script is shown as it is written.
"""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fastrm.storage import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

THUMBNAIL_SIDE = 192  # the longer side of an image in a page, in pixels: about 8 KB each
_FOLDER = Path(__file__).parent

# A cell of a table: a text, or a text with the number that it is sorted by.
Cell = str | tuple[str, float]


@dataclass(frozen=True)
class Paragraph:
    """Sentences, or preformatted text such as a configuration."""

    kind: ClassVar[str] = "paragraph"
    text: str
    preformatted: bool = False


@dataclass(frozen=True)
class Facts:
    """A few values, each below its name."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class SortableTable:
    """Rows that the reader sorts by a click on a heading; columns whose cells are all numbers stand at the right.

    Attributes:
        caption: what the table is, above it; needed, as screen readers announce it.
    """

    kind: ClassVar[str] = "table"
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def numeric(self) -> list[bool]:
        """True for each column whose cells all have a number."""
        return [all(isinstance(row[column], tuple) for row in self.rows) for column in range(len(self.headings))]


@dataclass(frozen=True)
class Charts:
    """Pictures side by side where there is room, each made by `chart`."""

    kind: ClassVar[str] = "charts"
    charts: Sequence["Chart"]


@dataclass(frozen=True)
class Chart:
    """A picture as SVG with the sentence that says what it shows, which screen readers read in its place."""

    svg: str
    caption: str


@dataclass(frozen=True)
class MarkedText:
    """A text in runs (text, mark), below its label.

    Marks are "gone" (only here, not in the text beside it), "new" (only here, not in the text before it), "quiet", or
    "" for none.
    """

    label: str
    runs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Example:
    """A row of data: its name, facts about it, its images as data: addresses, and texts side by side.

    Attributes:
        lead: texts over the whole width, such as the prompt, above those side by side.
        images: (address, alternative text).
    """

    kind: ClassVar[str] = "example"
    title: str
    notes: Sequence[str] = ()
    lead: Sequence[MarkedText] = ()
    texts: Sequence[MarkedText] = ()
    images: Sequence[tuple[str, str]] = ()


Block = Paragraph | Facts | SortableTable | Charts | Example


@dataclass(frozen=True)
class Section:
    """A heading with the blocks below it.

    Attributes:
        anchor: the name by which an address leads to the section, as report.html#NAME; empty for none.
    """

    title: str
    blocks: Sequence[Block] = field(default_factory=list)
    anchor: str = ""


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return a page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(_FOLDER)
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("page.html")
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render(
        title=title, subtitle=subtitle, sections=sections, style=Markup(style), script=Markup(script), digest=digest,
        as_markup=Markup,
    )  # fmt: skip


def write_page(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write a page as an HTML file, whole or not at all.

    Raises:
        StorageError: if it cannot be written.
    """
    write_whole(path, page(title, subtitle, sections))


def chart(figure: "Figure", caption: str) -> Chart:
    """Return a figure of matplotlib as SVG for a page: black becomes the page's colour of text, the ground is clear."""
    import matplotlib

    file = io.StringIO()
    for part in (figure, *figure.axes):
        part.patch.set_visible(False)
    # Texts stay texts, and equal figures have equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    head, _, rest = svg.partition(">")
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    # A point of matplotlib is 4/3 of a CSS pixel; narrower screens shrink the picture.
    return Chart(f'{head} aria-hidden="true" style="max-width: {width * 4 / 3:.0f}px">{rest}', caption)


def thumbnail(image: "Image.Image", side: int = THUMBNAIL_SIDE) -> str:
    """Return an image as a data: address of a JPEG, its longer side at most `side` pixels."""
    from PIL import Image

    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
