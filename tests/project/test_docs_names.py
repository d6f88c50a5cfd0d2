"""Names in the documentation: links lead somewhere, files exist, generated pages are those of the code."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from bench.peers.ms_swift_results import ratio
from fastrm.data.tree import build_tree
from tests.helpers.documents import PAGES, text_of
from tests.helpers.project import PROJECT

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
# Paths from the project's folder, in code, in tables and in prose; not those of other projects or of a cache.
PATH = re.compile(r"(?<![\w./<~-])((?:fastrm|kernels|bench|tests|configs|docs)/[\w*./-]*\w)")
FILE = re.compile(r"`([\w-]+\.py)`")
PACKAGES = sorted(str(file.relative_to(PROJECT)) for file in (PROJECT / "fastrm").rglob("__init__.py"))
OTHERS = {"0_download_data.py"}  # of a benchmark's authors


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, PROJECT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(text):
    """The names of a page's headings in links: GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for found in LINK.findall(text_of(page)):
        target, _, anchor = (found[0] or found[1]).partition("#")
        if "://" in target:
            continue
        file = (PROJECT / page).parent / target if target else PROJECT / page
        assert file.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    text = text_of(page)
    missing = [path for path in PATH.findall(text) if "NAME" not in path and not list(PROJECT.glob(path))]
    folders = ("fastrm", "kernels", "bench", "tests", "docs")
    names = OTHERS | {file.name for folder in folders for file in (PROJECT / folder).rglob("*.py")}
    missing += [name for name in FILE.findall(text) if name not in names]
    assert missing == []


def test_every_page_is_on_the_map():
    """From README.md all pages are reached by links."""
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for found in LINK.findall(text_of(page)):
            file = Path((PROJECT / page).parent / found[0].partition("#")[0]).resolve()
            name = str(file.relative_to(PROJECT)) if file.is_relative_to(PROJECT) else ""
            if name in PAGES and name not in reached:
                waiting.append(name)
    assert sorted(set(PAGES) - reached) == []


def test_five_questions_name_functions_that_are_there():
    """The table at the top of docs/architecture.md: each function is defined in one of its line's files."""
    table = text_of("docs/architecture.md").split("## One batch")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and ".py`" in line]
    assert len(rows) == 5
    for _, places, functions in rows:
        sources = "".join((PROJECT / path).read_text() for path in PATH.findall(places))
        # A layout's parse
        sources += "".join(file.read_text() for file in (PROJECT / "fastrm/data/sources/layouts").glob("*.py"))
        for name in re.findall(r"`([\w.]+)`", functions):
            assert f"def {name.split('.')[-1]}(" in sources, f"{name} is in none of {places}"


@pytest.mark.parametrize("file", PACKAGES)
def test_packages_introduce_themselves(file):
    """What comes in, what goes out, which file to open first."""
    text = ast.get_docstring(ast.parse((PROJECT / file).read_text()))
    assert re.search(r"\bcomes?\s+in\b", text) and re.search(r"\bgo(es)?\s+out\b|\bOut\s+comes?\b", text)
    opened = re.findall(r"`([\w/]+\.py)`", text[text.index("Open `") :])
    assert opened and all((PROJECT / file).with_name(name).exists() for name in opened)


def test_readme_fits_a_reader_in_a_hurry():
    assert len(text_of("README.md").splitlines()) <= 150


def test_settings_page_is_that_of_the_code():
    page = script("configuration").page()
    assert text_of("docs/configuration.md") == page, "run: python docs/configuration.py --write"


def test_picture_counts_the_tokens_of_a_real_tree():
    idea = script("idea")
    prompt = list(range(idea.IMAGE + idea.QUESTION))
    rows = {name: np.array([*prompt, *range(10_000 * (i + 1), 10_000 * (i + 1) + idea.RESPONSE)])
            for i, name in enumerate(idea.RESPONSES)}  # fmt: skip
    assert sum(build_tree(list(rows.values())).lengths) == idea.TREE_TOKENS
    assert sum(len(rows[name]) for name in idea.ROWS) == idea.PAIRWISE_TOKENS
    assert f"{idea.PAIRWISE_TOKENS:,} tokens as pairs, {idea.TREE_TOKENS:,} as one" in text_of("README.md")


def test_pictures_are_drawn_by_their_script(tmp_path, monkeypatch):
    idea = script("idea")
    monkeypatch.setattr(idea, "FOLDER", tmp_path)
    idea.main()
    for theme in idea.THEMES:
        assert (tmp_path / f"idea-{theme}.svg").stat().st_size > 10_000


def test_speed_in_readme_is_that_of_the_results():
    """The rows of README's table, from the files that the benchmarks wrote on that machine."""
    training, peers, pretrained = (results(name) for name in ("training", "peers-ms-swift", "pretrained"))
    by_name = {entry["workload"]: entry for entry in peers["entries"]}
    swift = [by_name[name] for name in ("pairs", "pairs-mixed", "groups-of-4")]
    pairs = next(entry["variants"] for entry in training["entries"] if entry["name"] == "pairs, 1300/300")
    ratios = [
        (pairs["plain"]["seconds"]["median"] / pairs["fastrm"]["seconds"]["median"],
         pairs["fastrm"]["peak_mib"] / pairs["plain"]["peak_mib"]),
        *((ratio(entry, "speed"), ratio(entry, "memory")) for entry in swift),
    ]  # fmt: skip
    for name in ("long prompts", "dialogues", "lists of 8"):
        ours, theirs = (pretrained["workloads"][name]["variants"][trainer] for trainer in ("fastrm", "trl"))
        ratios.append((theirs["seconds"] / ours["seconds"], ours["peak_mib"] / theirs["peak_mib"]))
    section = text_of("README.md").split("## Speed")[1].split("##")[0]
    shown = [row.strip("| ").split(" | ")[-2:] for row in section.splitlines() if row.startswith("| ")][2:]
    assert len(shown) == len(ratios)
    for (speed, memory), cells in zip(ratios, shown, strict=True):
        digits = len(cells[0].partition(".")[2])
        assert cells == [f"{speed:.{digits}f}", f"{memory:.2f}"]


def results(name):
    return json.loads((PROJECT / "bench/results" / f"amd-epyc-2-cores-{name}.json").read_text())
