"""`fastrm data show`: rows as a model reads them, on a page and in the terminal."""

import io
import re
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from fastrm.data.paradigm import TextReading
from fastrm.data.show import as_example, differences, first_rows, print_row, show_record, tokens_shared
from fastrm.data.tree import build_tree
from fastrm.data_config import SourceConfig
from fastrm.errors import StorageError
from fastrm.limits import MediaLimits
from fastrm.prompts.spec import load_spec
from fastrm.train.show_command import show_data
from tests.helpers.prepared_sets import Made
from tests.helpers.runs import colour_rows, fastrm, text_rows, tiny_config, write_rows
from tests.helpers.smollm2 import needs_smollm2
from tests.helpers.source_rows import SHARED, png
from tests.helpers.support import make_image, make_model, make_record

NASTY = "<script>document.title = 'taken'</script>"
LIMITS = MediaLimits()


def printed(row, width=80):
    console = Console(file=io.StringIO(), width=width)
    print_row(console, row)
    return console.file.getvalue()


def shown(path, encoder=None, count=20):
    return first_rows(SourceConfig(path=str(path)), LIMITS, encoder, count)


def squeezed(text):
    """Return a text without spaces and line ends: lines of a terminal are cut where they end."""
    return "".join(text.split())


def num_common(first, second):
    return next((n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), len(first))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shared_and_own_tokens_are_those_of_common_beginnings(count):
    for seed in range(30):
        rng = np.random.default_rng([seed, count])
        sequences = [np.append(rng.integers(0, 2, rng.integers(1, 9)), 100 + n) for n in range(count)]
        shared, own = tokens_shared(build_tree(sequences, min_shared=1))
        assert shared == min(num_common(sequences[0], other) for other in sequences[1:])
        for number, sequence in enumerate(sequences):
            others = sequences[:number] + sequences[number + 1 :]
            assert own[number] == len(sequence) - max(num_common(sequence, other) for other in others)


def test_a_response_that_begins_another_has_no_tokens_of_its_own():
    assert tokens_shared(build_tree([np.arange(20), np.arange(25)])) == (20, [0, 5])


@pytest.mark.parametrize(
    "first, second, marked",
    [
        ("The bus is red.", "The bus is blue.", ([" red"], [" blue"])),
        ("the same", "the same", ([], [])),
        ("", "all new", ([], ["all new"])),
        ("here by chance a word", "also by luck a thing", (["here by chance a word"], ["also by luck a thing"])),
        ("公交车是红色的", "公交车是蓝色的", (["红"], ["蓝"])),
    ],
)
def test_differences_are_marked_and_nothing_is_lost(first, second, marked):
    runs = differences(first, second)
    assert tuple("".join(text for text, _ in found) for found in runs) == (first, second)
    assert tuple([text for text, mark in found if mark] for found in runs) == marked
    assert all(one[1] != other[1] for found in runs for one, other in pairwise(found))


def test_rows_come_in_order_with_their_layouts_and_reasons(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    pair = {"prompt": "What?", "chosen": "a bus", "rejected": "a boat"}
    write_rows(
        tmp_path / "rows.jsonl",
        [
            {**pair, "images": ["a.png"]}, {**pair, "images": ["missing.png"]}, "{not json",
            {**pair, "rejected": "a bus"},
            {"prompt": "Two?", "responses": ["x", "y", "z"], "scores": [1, 2, 0]},
        ],
    )  # fmt: skip
    rows = shown(tmp_path / "rows.jsonl")
    assert [row.title.rpartition(":")[2] for row in rows] == ["1", "2", "3", "4", "5"]
    found = [[note for note in row.notes if note.startswith(("layout", "refused"))] for row in rows]
    assert found == [
        ["layout: flat"], ["layout: flat", "refused: IMAGE_MISSING"], ["refused: BAD_JSON"],
        ["layout: flat", "refused: IDENTICAL_RESPONSES"], ["layout: groups"],
    ]  # fmt: skip
    assert [label for label, _ in rows[0].responses] == [
        "chosen: 2 words, 5 characters",
        "rejected: 2 words, 6 characters",
    ]
    assert [text for _, text in rows[4].responses] == ["y", "x", "z"]  # the most preferred first
    assert len(shown(tmp_path / "rows.jsonl", count=2)) == 2
    assert len(as_example(rows[0], LIMITS).images) == 1 and "missing.png" in squeezed(printed(rows[1]))


@pytest.mark.parametrize(
    ("name", "note", "labels"),
    [
        ("r1_reward", "texts: 2", ["text 1: ", "text 2: "]),
        ("mm_rlhf_reward", "preferences: 1", ["chosen: ", "rejected: "]),
    ],
)
def test_conversations_of_a_paradigm_are_counted_as_what_they_are(tmp_path, name, note, labels):
    row = {"prompt": "Is 2 even?", "chosen": "yes", "rejected": "no"}
    row |= {"chosen_reason": "2 is 2 times 1.", "rejected_reason": "It is."}
    path, spec = write_rows(tmp_path / "rows.jsonl", [row]), load_spec(name)
    kind = "critic" if spec.kind == "critic" else "judge"
    reading = TextReading(kind, spec.prompt, spec.system, spec.parser or "", order="both")
    (row,) = first_rows(SourceConfig(path=str(path)), LIMITS, None, 20, reading)
    assert note in row.notes
    assert [label[: len(wanted)] for (label, _), wanted in zip(row.responses, labels, strict=True)] == labels


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
def test_texts_and_counts_are_those_of_the_models_tokens(family):
    encoder = make_model(family).encoder
    images = (make_image(84, 56),) if family == "qwen2_5_vl" else ()
    record = make_record(3, images=images)
    row = show_record(record, encoder)
    tokens = [encoder.encode(response).tokens.tolist() for response in record.responses]
    shared = num_common(*tokens)
    assert row.prompt[0][0] == f"shared by all: {shared} tokens"
    assert [label for label, _ in row.responses] == [
        f"{name}: {len(ids) - shared} tokens of its own"
        for name, ids in zip(("chosen", "rejected"), tokens, strict=True)
    ]
    assert [text for _, text in row.responses] == [encoder.tokenizer.decode(ids[shared:]) for ids in tokens]
    apart = sum(map(len, tokens))
    assert any(note.startswith(f"{apart - shared} tokens in the prefix tree, {apart} in") for note in row.notes)
    for _, description in row.media:
        assert description.endswith(
            f": {sum(span.num_tokens for span in encoder.encode(record.responses[0]).media)} tokens"
        )


def test_what_the_model_refuses_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "What?", "images": ["a.png"], "chosen": "a", "rejected": "b"}])
    (row,) = shown(tmp_path / "rows.jsonl", make_model("qwen2").encoder)
    assert "refused: IMAGE_UNSUPPORTED" in row.notes


def test_the_terminal_keeps_its_width_and_marks_differences_without_colours(tmp_path):
    write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "What? " * 30, "chosen": "A big red bus.", "rejected": "A big blue bus."}]
    )
    (row,) = shown(tmp_path / "rows.jsonl")
    text = printed(row, 60)
    assert "A big {+red+} bus." in text and "A big [-blue-] bus." in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("/")) <= 60
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="standard")
    print_row(console, row)
    assert "\x1b[32m" in console.file.getvalue() and "{+" not in console.file.getvalue()


def test_a_page_shows_sources_of_a_configuration_and_escapes_their_texts(tmp_path):
    rows = [{"prompt": NASTY, "chosen": NASTY + " 1", "rejected": NASTY + " 2"}]
    config = tiny_config(tmp_path, colour_rows(tmp_path), write_rows(tmp_path / "eval.jsonl", rows))
    show_data(str(config), reading={}, count=3, out=tmp_path / "rows.html")
    page = (tmp_path / "rows.html").read_text()
    titles = re.findall(r"<h2[^>]*>([^<]*)", page)
    assert [title.partition(": ")[0] for title in titles] == ["data.train.0", "data.eval.0"]
    assert page.count("<article>") == 4 and page.count('src="data:image/jpeg') == 3
    assert NASTY not in page and page.count("&lt;script&gt;") == 3


def test_a_prepared_set_is_shown_with_what_it_refused(tmp_path, capsys):
    rows = [*text_rows(5), {"prompt": "Is 0 even?", "chosen": "yes", "rejected": "never"}, text_rows(1)[0]]
    made = Made(tiny_config(tmp_path, write_rows(tmp_path / "rows.jsonl", rows)))
    show_data(str(made.folder), reading={})
    printed = capsys.readouterr().out
    show_data(str(tmp_path / "run"), reading={})  # the run that has the set
    assert capsys.readouterr().out == printed
    text = " ".join(printed.split())
    assert f"train: first groups: 5 of {len(made.train)}" in text
    assert f"{made.train.groups[0].num_tokens} tokens in the prefix tree when it was prepared" in text
    # A long path is cut at the end of a line, and with it what follows.
    assert "mergedwith" in squeezed(printed) and "rows.jsonl:6" in squeezed(printed)
    assert "refused: DUPLICATE" in text


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    for out in (tmp_path / "none" / "rows.html", tmp_path):
        with pytest.raises(StorageError, match=r"no folder|is a folder"):
            show_data(str(tmp_path / "missing.jsonl"), reading={}, out=out)


@needs_smollm2
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_somebody_elses_rows_read_by_a_pretrained_model(tmp_path, smollm2_folder):
    path, out = SHARED / "llamafactory_dpo_demo" / "dpo_en_demo.json", tmp_path / "rows.html"
    done = fastrm("data", "show", path, "-n", 3, "--model", smollm2_folder, "--out", out)
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    assert page.count("<article>") == 3 and page.count("layout: llamafactory") == 3
    assert page.count("&lt;|im_start|&gt;user") >= 3 and page.count("tokens in the prefix tree") == 3
