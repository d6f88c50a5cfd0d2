"""`fastrm data check`: what it finds is what is in the rows, whoever reads them, and its page and exit code say so."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastrm.data.check import check_source
from fastrm.data.check_page import print_page
from fastrm.data.prepared import units
from fastrm.data.prepared.findings import PAIR, find_in_pairs
from fastrm.data_config import SourceConfig
from fastrm.errors import ConfigError, DataError
from fastrm.limits import MediaLimits
from fastrm.train.check_command import check_data
from tests.helpers.prepared_sets import Made, config_of
from tests.helpers.runs import fastrm, text_rows, tiny_config, write_rows
from tests.helpers.source_rows import SHARED, png, turns


def mixed_rows(folder):
    """Rows in three layouts: a copy, a contradiction, a tie, an image in two rows, three reasons to refuse."""
    (folder / "a.png").write_bytes(png("red"))
    (folder / "b.png").write_bytes(png("blue"))
    pair = {"prompt": "What?", "chosen": "a long answer", "rejected": "no"}
    return [
        {**pair, "images": ["a.png"], "level": 3},
        {**pair, "images": ["b.png"]},
        {**pair, "images": ["a.png"], "id": "again"},
        {**pair, "chosen": "no", "rejected": "a long answer", "images": ["a.png"]},
        {"messages": turns("Hi", "Ho", "So?"), "responses": ["x", "y", "z"], "scores": [2, 2, 1]},
        {**pair, "images": ["missing.png"]},
        {**pair, "rejected": ""},
        {**pair, "imags": ["a.png"]},
        "{not json",
        {"prompt": turns("What?"), "chosen": turns("yes", roles=("assistant",)), "rejected": "no"},
    ]


def checked(folder, **options):
    return check_source(SourceConfig(path=str(folder / "rows.jsonl")), MediaLimits(), **options)


def page(found, width=80, encoder=None):
    console = Console(file=io.StringIO(), width=width)
    print_page(console, "rows.jsonl", found, encoder)
    return console.file.getvalue()


def test_findings_are_what_is_in_the_rows(tmp_path):
    write_rows(tmp_path / "rows.jsonl", mixed_rows(tmp_path))
    found = checked(tmp_path)
    assert (found.num_rows, found.num_refused, len(found.records)) == (10, 4, 6)
    assert found.layouts == {"flat": 7, "groups": 1, "trl": 1}  # the line that is not JSON is in none
    assert {code: (refused.number, refused.examples[0][0][-1]) for code, refused in found.refused.items()} == {
        "IMAGE_MISSING": (1, "6"), "EMPTY_RESPONSE": (1, "7"), "UNREAD_MEDIA": (1, "8"), "BAD_JSON": (1, "9"),
    }  # fmt: skip
    assert found.copies(5) == (1, [("row 3", "row 1")])
    assert found.num_prompts == 4  # about a.png, about b.png, "So?", and "What?" alone
    assert found.num_ties == 1
    pairs = found.preferences
    assert (pairs.num_pairs, pairs.contradicting, pairs.example) == (7, 1, ((0, 1), (0, 4)))
    assert (pairs.longer, pairs.shorter) == (4, 1)
    assert sorted(uses for uses, _ in found.media.values()) == [1, 3]
    assert "chosen: 3 words, 13 characters\n  {+a long answer+}\n" in page(found)


def test_findings_do_not_depend_on_who_reads_the_rows(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", [*mixed_rows(tmp_path), *text_rows(40)])
    whole = checked(tmp_path)
    monkeypatch.setattr(units, "ROWS_PER_UNIT", 3)
    parts = checked(tmp_path, num_workers=2)
    assert page(parts) == page(whole)
    assert np.array_equal(parts.pairs, whole.pairs) and np.array_equal(parts.records, whole.records)


def test_page_says_what_was_found_in_80_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths are shown as they are written, and stay whole
    write_rows(tmp_path / "rows.jsonl", mixed_rows(tmp_path))
    text = page(checked(Path()))
    assert max(map(len, text.splitlines())) <= 80
    said = " ".join(text.split())
    for part in (
        "10 rows in 1 file: 6 can be used, 4 refused (40 %)",
        "flat 7 prompt, chosen, rejected, images",
        "groups 1 messages, responses, scores",
        "UNREAD_MEDIA 1",
        "leave it out with `ignore: [imags]`",
        "level 1 3",
        "ignore: [level",
        "1 pair of responses is preferred both ways, first at row 1 and row 4: nothing can be learned from them",
        "1 row with the prompt, responses and preferences of an earlier one: row 3 repeats row 1",
        "2 different images and videos in 4 places; 1 of them in several rows",
        "chosen: 3 words, 13 characters {+a long answer+}",
    ):
        assert part in said, part


def test_liking_for_length_is_said_where_there_is_one():
    pairs = np.zeros(200, PAIR)
    pairs["key"] = np.arange(200)
    pairs["chosen"], pairs["rejected"] = 10, 5
    pairs["chosen"][:50] = 1
    found = find_in_pairs(pairs)
    assert found.share_longer == 0.75
    assert found.liking == (
        "a model that only prefers the longer response is right in 75 % of the preferences, and may learn just that"
    )
    pairs["chosen"][:100] = 1
    assert find_in_pairs(pairs).liking is None
    pairs["chosen"] = 1
    assert "only prefers the shorter response is right in 100 %" in find_in_pairs(pairs).liking
    assert find_in_pairs(pairs[:99]).liking is None  # too few to say
    assert find_in_pairs(pairs[:0]).share_longer is None


def test_same_direction_twice_is_no_contradiction():
    pairs = np.zeros(3, PAIR)
    assert find_in_pairs(pairs).contradicting == 0
    pairs["is_swapped"][2] = True
    pairs["row"] = [4, 5, 6]
    found = find_in_pairs(pairs)
    assert (found.contradicting, found.example) == (1, ((0, 4), (0, 6)))


def test_pairs_that_their_own_scores_contradict_are_counted(tmp_path):
    scores = [(5, 5), (7.5, 7.5), (3, 8), (8, 3), (True, True), ("5", "5"), (None, None)]
    names = [("chosen_score", "rejected_score"), ("score_chosen", "score_rejected")] * 4
    rows = [
        row | dict(zip(keys, pair, strict=True)) for row, keys, pair in zip(text_rows(7), names, scores, strict=False)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    found = checked(tmp_path, num_workers=2)
    assert found.all_keys.scores == {"equal": 2, "reversed": 1} and found.num_refused == 0
    said = " ".join(page(found).split())
    assert (
        "scores 2 pairs with equal scores of both responses and 1 pair whose rejected response has the greater score; "
        "they are trained on as chosen and rejected say: remove them if the scores are right"
    ) in said
    write_rows(tmp_path / "rows.jsonl", [rows[3]])
    assert "greater score" not in page(checked(tmp_path))


def test_exit_code_says_that_too_many_rows_are_refused(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [*text_rows(9), {"prompt": "a"}])
    result = fastrm("data", "check", rows)
    assert result.returncode == 65
    assert "1 of 10 rows of" in result.stderr and "more than --max-refused 1%" in result.stderr
    assert "BAD_ROW" in result.stdout
    assert len(check_data([str(rows)], max_refused="10%", num_workers=1)[0].records) == 9
    assert len(check_data([str(rows)], max_refused="0.1", num_workers=1)) == 1
    with pytest.raises(ConfigError, match="data check: format: got 'nope'; input should be"):
        check_data([str(rows)], reading={"format": "nope"})
    for share in ("2", "1", "1.0", "nan", "101%", "-1%"):
        with pytest.raises(ConfigError, match=r"--max-refused: got '.*', wanted a share such as 1% or 0\.01; 100% "):
            check_data([str(rows)], max_refused=share, num_workers=1)
    assert check_data([str(rows)], max_refused="100%", num_workers=1)
    with pytest.raises(DataError, match=r"none\.jsonl has no rows; name a file with rows$"):
        check_data([str(write_rows(tmp_path / "none.jsonl", [""]))], num_workers=1)


def test_settings_of_sources_are_options_and_those_of_a_configuration(tmp_path, capsys):
    rows = [
        {"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "url": "http://x/a.png"} for r in text_rows(4)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    reading = {"columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}, "ignore": ["url"]}
    assert len(check_data([str(path)], reading=reading, num_workers=1)[0].records) == 4
    config = config_of(tmp_path, {"path": str(path), **reading})
    (found,) = check_data([str(config)], num_workers=1)
    assert found.num_refused == 0 and found.all_keys.unread == {}
    assert f"data.train.0: {path}" in capsys.readouterr().out.replace("\n", "")


def test_rows_for_scoring_need_no_preference(tmp_path):
    path = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "responses": ["b"]}]))
    assert len(check_data([path], scoring=True, num_workers=1)[0].records) == 1
    with pytest.raises(DataError, match="1 of 1 rows"):
        check_data([path], num_workers=1)


def test_first_row_is_shown_as_the_model_reads_it(tmp_path):
    from fastrm.data.template import ConversationEncoder
    from fastrm.data.tokenizer import load_tokenizer

    write_rows(tmp_path / "rows.jsonl", text_rows(6))
    Made(tiny_config(tmp_path, tmp_path / "rows.jsonl"))
    encoder = ConversationEncoder(load_tokenizer(str(tmp_path / "run" / "prepared" / "tokenizer")))
    write_rows(tmp_path / "rows.jsonl", [*text_rows(2), {**text_rows(1)[0], "image": {"path": "a.png"}}])
    (tmp_path / "a.png").write_bytes(png("red"))
    found = checked(tmp_path, encoder=encoder)
    assert {code: refused.number for code, refused in found.refused.items()} == {"IMAGE_UNSUPPORTED": 1}
    text = page(found, width=200, encoder=encoder)
    assert "<|im_start|>user\n" in text.replace("  ", "") and "Is 0 even?<|im_end|>" in text
    assert "tokens in the prefix tree" in text and "tokens of its own" in text


def test_preparing_says_what_a_model_may_learn_from_lengths_and_contradictions(tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": "a longer answer", "rejected": "no"} for n in range(120)]
    rows.append({**rows[0], "chosen": "no", "rejected": "a longer answer"})
    write_rows(tmp_path / "rows.jsonl", rows)
    made = Made(config_of(tmp_path, {"path": str(tmp_path / "rows.jsonl"), "name": "mine"}))
    said = made.said.replace("\n", "")
    assert "mine: 1 pair of responses is preferred both ways" in said
    assert "mine: a model that only prefers the longer response is right in 99.2 % of the preferences" in said
    assert made.row("mine")["pairs"]["longer"] == 120


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data here")
@pytest.mark.parametrize(
    "name, rows, refused",
    [
        ("caption_contest/pairs_even_contests.jsonl", 1080, 0), ("caption_contest/rated_lists.jsonl", 45, 0),
        ("quickstart_mix/train.jsonl", 156, 2), ("llamafactory_dpo_demo/dpo_en_demo.json", 300, 0),
        ("mathv_pairs/pairs_even.jsonl", 453, 0), ("nlvr/pairs_dev_balanced.jsonl", 884, 0),
        ("pandalm/testset-v1.json", 999, 60),
    ],
)  # fmt: skip
def test_page_about_real_files(name, rows, refused):
    found = check_source(SourceConfig(path=str(SHARED / name)), MediaLimits())
    assert (found.num_rows, found.num_refused) == (rows, refused)
    assert max(map(len, page(found).splitlines())) <= 80


def test_first_two_refused_rows_of_a_reason_are_named(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{n}?", "chosen": "", "rejected": "no"} for n in range(5)])
    monkeypatch.setattr(units, "ROWS_PER_UNIT", 1)
    refused = checked(tmp_path).refused["EMPTY_RESPONSE"]
    assert (refused.number, [origin[-2:] for origin, _ in refused.examples]) == (5, [":1", ":2"])
