"""The pages of reports: escaped, of one file, sorted by a click, readable on narrow and dark screens."""

import base64
import io
import re
from itertools import pairwise

import pytest
from PIL import Image

from fastrm.errors import StorageError
from fastrm.report import page as made
from fastrm.report.page import Example, MarkedText, Paragraph, Section, SortableTable, thumbnail, write_page
from fastrm.ui import new_figure
from tests.helpers.browser import CHROMIUM, Browser

NASTY = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">&amp;'\"</textarea>"


def curve(values, caption="Loss by step"):
    figure = new_figure(5, 3)
    figure.subplots().plot(values)
    return made.chart(figure, caption)


def sections(text=NASTY):
    return [
        Section(text, [Paragraph(text), Paragraph(text, preformatted=True), made.Facts([(text, text)])]),
        Section("Table", [SortableTable(text, [text, "rows"], [["b", ("10", 10.0)], [text, ("9", 9.0)]])]),
        Section("Charts", [made.Charts([curve([1, 3, 2], text), curve([1, 2], "second")])]),
        Section(
            "Rows",
            [
                Example(
                    text, [text], [MarkedText(text, [(text, "")])],
                    [MarkedText("chosen", [(text, "new"), (text, "gone"), (text, "quiet")])],
                    [(thumbnail(Image.new("RGB", (600, 300), "red")), text)],
                )
            ],
        ),
    ]  # fmt: skip


def test_no_text_becomes_markup():
    written = made.page(NASTY, NASTY, sections())
    plain = made.page("title", "title", sections("plain"))
    tags = re.compile(r"<(/?[a-z]+)")
    assert tags.findall(written) == tags.findall(plain)
    assert "onerror=&#34;" in written and 'onerror="' not in written


def test_nothing_is_asked_of_a_network():
    written = made.page("title", "", sections("plain"))
    addresses = re.findall(r'\b(?:src|href)="([^"]+)"', written) + re.findall(r"url\(([^)]+)\)", written)
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)


def test_a_chart_takes_the_colour_of_text_and_equal_charts_have_equal_bytes():
    first = curve([1, 3, 2]).svg
    assert first == curve([1, 3, 2]).svg
    assert "currentColor" in first and "#000000" not in first and "#ffffff" not in first
    ids = re.findall(r' id="([^"]+)"', first)
    assert ids and all(f"#{name}" in first for name in ids)


def test_a_thumbnail_is_small_and_keeps_its_shape():
    address = thumbnail(Image.effect_noise((2000, 1000), 90).convert("RGBA"), side=100)
    image = Image.open(io.BytesIO(base64.b64decode(address.partition("base64,")[2])))
    assert image.size == (100, 50) and len(address) < 20_000


def test_a_page_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(StorageError, match="there is no folder"):
        write_page(tmp_path / "none" / "page.html", "title", "", [])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    write_page(tmp_path / "page.html", "title", NASTY, sections())
    browser.open((tmp_path / "page.html").as_uri())
    yield browser
    assert not browser.faults and browser.evaluate("document.title") == "title"
    assert all(asked.startswith(("file:", "data:")) for asked in browser.asked)


def test_a_click_sorts_numbers_as_numbers_and_a_second_one_turns_them(opened):
    cells = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[1].textContent)"
    assert opened.evaluate(cells) == ["10", "9"]
    for wanted, order in ((["9", "10"], "ascending"), (["10", "9"], "descending")):
        opened.evaluate("document.querySelectorAll('th button')[1].click()")
        assert opened.evaluate(cells) == wanted
        assert opened.evaluate("document.querySelectorAll('th')[1].getAttribute('aria-sort')") == order


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(opened, width):
    opened.resize(width)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_headings_go_down_one_level_at_a_time(opened):
    levels = opened.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(one => Number(one.tagName[1]))")
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))
