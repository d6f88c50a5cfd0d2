"""Keys of rows: what is not read is said once for its file, and what would change the model's input is refused."""

import base64

import pytest
from PIL import Image

from fastrm import cli
from fastrm.config import load_config
from fastrm.data.record import Preference
from fastrm.data.sources import source_files, unread_lines
from fastrm.data.sources.columns import understood
from fastrm.data.sources.key_tally import KeyTally
from fastrm.data.sources.keys import key_names, misspelt, unread_keys
from fastrm.data.sources.layouts import ALL_KEYS, LAYOUTS
from fastrm.data.sources.layouts.groups import group_record
from fastrm.data.sources.media import file_kind, media_kind
from fastrm.errors import ConfigError, DataError, RecordError
from fastrm.evaluate.reading import read_in_order
from fastrm.evaluate.scoring import score_dicts
from fastrm.forecast.inputs import check_rows
from tests.helpers.prepared_sets import Made, config_of
from tests.helpers.runs import text_rows, write_rows
from tests.helpers.source_rows import FLAT, GROUP, RATED, SAME_PAIR, SHAREGPT, SWIFT, data_uri, png, shape, turns

BASE64 = base64.b64encode(png()).decode()


class _Watched(dict):
    """A row that notes which of its keys are asked for."""

    def __init__(self, row, asked):
        super().__init__(row)
        self.asked = asked

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)


@pytest.mark.parametrize("name", SAME_PAIR)
def test_layout_declares_every_key_that_it_asks_for(name, tmp_path):
    layout, asked = LAYOUTS[name.split(",")[0].split()[0]], set()
    layout.parse(_Watched(SAME_PAIR[name], asked), lambda path, kind: kind(path=path))
    assert asked and asked <= {*key_names(layout.KEYS), "source"}


@pytest.mark.parametrize(
    "row, name, meant",
    [
        ({**FLAT, "imags": ["a.png"]}, "imags", "images"),
        ({**FLAT, "img": "photos/a b.JPG"}, "img", "images"),
        ({**FLAT, "image_path": "a.webp"}, "image_path", "images"),
        ({**FLAT, "picture": {"bytes": BASE64}}, "picture", "images"),
        ({**FLAT, "shown": [{"file": {"name": "x/1.png"}}]}, "shown", "images"),
        ({**FLAT, "clip": "a.mp4"}, "clip", "videos"),
        ({**FLAT, "look": data_uri(png())}, "look", "images"),
        ({**FLAT, "page": "https://example.org/a.png?size=3"}, "page", "images"),
        ({**FLAT, "speech": "a.wav"}, "speech", "audio"),
        ({**FLAT, "metadata": {"image": "a.png"}}, "metadata", "images"),
        ({**FLAT, "image": "a.png", "second": "b.png"}, "second", "images"),
        ({**SHAREGPT, "imgs": ["b.png"]}, "imgs", "images"),
        ({**SWIFT, "image_url": "b.png"}, "image_url", "images"),
        ({**GROUP, "photo": "a.png"}, "photo", "images"),
        ({**RATED, "photo": "a.png"}, "photo", "images"),
        ({**FLAT, "prompt": [{"role": "user", "content": "What?", "image": "a.png"}]}, "prompt[].image", "images"),
        (
            {**FLAT, "prompt": [{"role": "user", "content": [{"type": "text", "text": "What?", "image": "a.png"}]}]},
            "prompt[].content[].image",
            "images",
        ),
        ({"text": '{"question": "What?", "chosen": "a", "rejected": "b", "img": "a.png"}'}, "img", "images"),
    ],
    ids=str,
)
def test_media_under_another_key_are_refused(refusal, row, name, meant):
    code, message = refusal(row)
    assert code == "UNREAD_MEDIA"
    assert f'"{name}" holds' in message and meant in message


@pytest.mark.parametrize(
    "row",
    [
        {**FLAT, "image": "x/a.png", "image_path": "coco/a.png"},  # names the image that is read
        {**FLAT, "image": {"bytes": None, "path": "a.png"}, "metadata": {"original": "b.png"}},
        {**FLAT, "id": "train/a.png"},
        {
            **FLAT,
            "prompt_id": "a.png",
            "note": "It is in a.png, below.",
            "count": 3,
            "spans": [[1, 2]],
            "raw": "x" * 99,
        },
        {**FLAT, "imags": []},
    ],
    ids=str,
)
def test_what_names_no_other_medium_is_no_reason_to_refuse(read_json_rows, row):
    row = {key: value for key, value in row.items() if key != "imags"}
    records, refused = read_json_rows(row)
    assert refused == [] and len(records) == 1


@pytest.mark.parametrize(
    "row, name, meant",
    [
        ({**FLAT, "imagse": []}, "imagse", "images"),
        ({"promt": "What?", "chosen": "yes", "rejected": "no"}, "promt", "prompt"),
        ({**FLAT, "Image": 3}, "Image", "image"),
        ({**FLAT, "margn": 1.0}, "margn", "margin"),
        ({**GROUP, "preference": []}, "preference", "preferences"),
        ({**SHAREGPT, "sytem": "Be brief."}, "sytem", "system"),
        ({**SWIFT, "system_prompt": "Be brief."}, "system_prompt", "system"),
    ],
    ids=str,
)
def test_misspelt_key_is_refused_with_the_key_that_was_meant(refusal, row, name, meant):
    code, message = refusal(row)
    assert code == "UNKNOWN_KEY"
    assert f'the key "{name}" is not read; did you mean "{meant}"?' in message
    assert f"ignore: [{name}]" in message


def test_names_of_keys_are_no_slips_of_the_pen():
    names = "chosen_n rejected_n image_wh num_images answer_gt options level z prompt_len"
    for name in names.split():
        assert misspelt(name, ALL_KEYS) is None, name
    assert misspelt("imgaes", ALL_KEYS) == "images"
    assert misspelt("rejected-response", ALL_KEYS) == "rejected_response"


def test_ignored_keys_are_not_read_and_not_said(tmp_path, read_json_rows):
    row = {**FLAT, "img": "a.png", "margin": 2.0, "url": "https://example.org"}
    (record,), refused = read_json_rows(row, ignore=("img", "margin", "url"))
    assert refused == [] and record.preferences[0].margin == 0.0 and record.media == ()
    tally = KeyTally()
    (file,) = source_files(tmp_path / "rows.jsonl", ignore=("img", "margin", "url"))
    list(file.read(keys=tally))
    assert tally.layouts == {"flat": 1} and unread_lines({"rows.jsonl": tally}) == []


def test_unread_keys_are_counted_and_reported_once(tmp_path, read_json_rows):
    rows = [
        {**FLAT, "contest_no": 520, "z": None}, {**FLAT, "contest_no": 521, "z": 6.7},
        {**FLAT, "prompt": [{"role": "user", "content": "Hi", "mood": "glad"}], "query": "x" * 99},
    ]  # fmt: skip
    read_json_rows(*rows)
    (file,) = source_files(tmp_path / "rows.jsonl")
    tally, other = KeyTally(), KeyTally()
    list(file.read(0, 2, tally))
    list(file.read(2, None, other))
    tally.merge(KeyTally.from_json(other.to_json()))
    assert tally.layouts == {"flat": 2, "trl": 1}
    (line,) = unread_lines({"rows.jsonl": tally})
    assert line == (
        "rows.jsonl: keys that are not read: contest_no (2 rows, such as 520), z (1 row, such as 6.7), "
        f"query (1 row, such as '{'x' * 17}...{'x' * 18}'; nearest key: prompt), "
        "prompt[].mood (1 row, such as 'glad'); where that is right: ignore: [contest_no, z, \"prompt[].mood\"]"
    )


def test_alternative_that_is_not_read_is_unread(read_one):
    row = {"prompt": "a", "question": "b", "chosen": "c", "rejected": "d"}
    assert unread_keys(row, LAYOUTS["flat"].KEYS) == {"question": "b"}
    assert shape(read_one(row), 0)[0] == ("user", "a")


def test_image_and_images_that_differ_are_refused(refusal, read_one):
    assert read_one({**FLAT, "image": "a.png", "images": ["a.png", "b.png"]}).media[1].path.endswith("b.png")
    code, message = refusal({**FLAT, "image": "c.png", "images": ["a.png", "b.png"]})
    assert code == "UNREAD_MEDIA" and '"image" holds one that "images" does not' in message


@pytest.mark.parametrize(
    "extra, part",
    [
        ({"imags": ["a.png"]}, '"imags" holds an image, and is not read (\'a.png\'); the key is "images"'),
        ({"imags": []}, 'the key "imags" is not read; did you mean "images"?'),
        ({"picture": Image.new("RGB", (2, 2))}, '"picture" holds an image'),
        ({"data": png()}, '"data" holds an image'),
        ({"context": "a text"}, 'the group has "context", which is not read; remove it'),
        ({7: 1}, 'the group has "7", which is not read'),
    ],
    ids=["imags", "imags, empty", "a picture", "bytes", "context", "a number"],
)
def test_python_group_with_an_unknown_key_is_refused(extra, part):
    group = {"prompt": "What?", "responses": ["a", "b"], "id": "x", "metadata": {"a": 1}, "images": None}
    assert group_record(group, 0).id == "x"
    with pytest.raises(RecordError) as caught:
        group_record({**group, **extra}, 0)
    assert part in caught.value.message and "ignore" not in caught.value.message


def test_keys_that_are_null_are_named(refusal):
    _, message = refusal({**SWIFT, "rejected_response": None})
    assert 'null in the row: "rejected_response"' in message
    assert refusal({**FLAT, "chosen": None})[1].endswith('; null in the row: "chosen"')
    assert "null" not in refusal({"a": None, "b": 1})[1]


def test_keys_of_no_layout_name_the_nearest(refusal):
    code, message = refusal({"query": "What?", "better": "a", "worse": "b"})
    assert code == "BAD_ROW" and 'did you mean "chosen" for "better", "rejected" for "worse"?' in message


def test_file_url_is_the_path_of_a_local_file(tmp_path, read_one, refusal):
    record = read_one({**FLAT, "image": f"file://{tmp_path}/a%20b.png"})
    assert record.media[0].path == str(tmp_path / "a b.png")
    assert "leaves the images folder" in refusal({**FLAT, "image": "file:///local.png"})[1]
    assert "is a file URL with a host" in refusal({**FLAT, "image": "file://images/a.png"})[1]
    assert "is a URL, which is never fetched" in refusal({**FLAT, "image": "http://a.png"})[1]


def test_base64_without_its_prefix_is_no_path(refusal):
    code, message = refusal({**FLAT, "image": BASE64})
    assert code == "IMAGE_PATH" and 'is base64; put "data:image/...;base64," in front of it' in message


@pytest.mark.parametrize(
    "value, kind",
    [
        ("a.png", "image"), ("A B.JPeG", "image"), ("http://x/y.webp?z#w", "image"), ("x.mp4", "video"),
        ("Is it a.png?", None), ("a\n.png", None), ("png", None), ("", None), ("x" * 2000 + ".png", None),
    ],
)  # fmt: skip
def test_kind_of_a_file_is_in_its_name(value, kind):
    assert file_kind(value) == kind


@pytest.mark.parametrize(
    "value, kind",
    [
        (png(), "image"), (BASE64, "image"), (data_uri(png()), "image"), (b"RIFF\0\0\0\0WAVE", "audio"),
        (b"\0\0\0\x18ftypmp42", "video"), ("data:video/mp4;base64,AAAA", "video"), ("A" * 64, None), (b"", None),
        ("data:text/plain;base64,AAAA", None), ("The colour is red. " * 9, None), (b"text", None),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_kind_of_media_is_in_their_bytes(value, kind):
    assert media_kind(value) == kind


def test_images_of_every_joined_row_belong_to_the_prompt(read_json_rows):
    row = {"prompt": "What?", "response": "a", "helpfulness": 1, "image": "a.png"}
    rows = [row, {**row, "response": "b", "helpfulness": 2}, {**row, "image": "b.png"}]
    records, refused = read_json_rows(*rows)
    assert [len(record.responses) for record in records] == [2]
    assert [code for _, code, _ in refused] == ["NO_PREFERENCE"]


def test_keys_of_turns_are_those_that_are_read():
    row = {
        "prompt": turns("Hi"),
        "chosen": [{"role": "assistant", "content": "a", "loss_weight": 1.0}],
        "rejected": "b",
    }
    assert unread_keys(row, LAYOUTS["trl"].KEYS) == {}


def test_unread_keys_are_said_while_preparing_and_scoring(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{**row, "level": 2} for row in text_rows(6)])
    made = Made(config_of(tmp_path, {"path": str(tmp_path / "rows.jsonl")}))
    line = f"{tmp_path}/rows.jsonl: keys that are not read: level (6 rows, such as 2); where that is right"
    assert line in made.said.replace("\n", "")
    keys = {}
    assert (
        len(list(read_in_order(str(tmp_path / "rows.jsonl"), None, "auto", require_preferences=True, keys=keys))) == 6
    )
    assert unread_lines(keys) == [f"{line}: ignore: [level]"]


def test_responses_may_follow_several_turns(read_one):
    row = {"messages": turns("Hi", "Hello", "So?"), "responses": ["a", "b"], "preferences": [[1, 0]]}
    record = read_one(row)
    assert shape(record, 1) == [("user", "Hi"), ("assistant", "Hello"), ("user", "So?"), ("assistant", "b")]
    assert record.preferences == (Preference(1, 0),)
    agent = [
        *turns("call", roles=("assistant",)),
        {"role": "tool", "content": "rain"},
        *turns("It rains.", roles=("assistant",)),
    ]
    record = read_one({"messages": turns("Weather?"), "responses": [agent, "No idea."], "scores": [1, 0]})
    assert [part for _, part in shape(record, 0)] == ["Weather?", "call", "rain", "It rains."]
    assert shape(record, 1) == [("user", "Weather?"), ("assistant", "No idea.")]


def test_finished_conversation_is_scored_and_not_trained_on(read_one, refusal):
    row = {"messages": turns("<image>What?", "yes"), "images": ["a.png"], "rejected_response": None}
    record = read_one(row, require_preferences=False)
    assert shape(record, 0) == [("user", ("image", "a.png"), "What?"), ("assistant", "yes")]
    assert len(record.responses) == 1
    code, message = refusal(row)
    assert code == "NO_PREFERENCE" and message.endswith('; null in the row: "rejected_response"')
    assert "ends with a turn of the user" in refusal({"messages": turns("Hi")})[1]
    assert group_record({"messages": turns("Hi", "Ho")}, 0).responses[0].text == "Ho"
    with pytest.raises(RecordError, match='"system_prompt" is not read'):
        group_record({"messages": turns("Hi", "Ho"), "system_prompt": "x"}, 0)


@pytest.mark.parametrize(
    "change, code, part",
    [
        ({"scores": [1, 2], "preferences": [[0, 1]]}, "BAD_PREFERENCE", "keep one of them"),
        ({"scores": [1]}, "BAD_ROW", "a list of 2 numbers, one for each response"),
        ({"scores": [1, "2"]}, "BAD_PREFERENCE", '"scores[1]" is text'),
        ({"messages": None, "scores": [1, 2]}, "BAD_ROW", '"prompt" is missing, wanted text or a list of messages'),
        ({"messages": turns("Hi", "Ho"), "scores": [1, 2]}, "BAD_ROW", "the prompt ends with the assistant"),
        ({"responses": ["a", turns("b")], "scores": [1, 2]}, "BAD_ROW", '"responses[1]" ends with a turn of the user'),
    ],
)
def test_group_of_messages_that_cannot_be_used(refusal, change, code, part):
    row = {"messages": turns("Hi"), "responses": ["a", "b"], **change}
    found = refusal(row)
    assert found[0] == code and part in found[1]


RENAMED = {"question": "What?", "better": "yes", "worse": "no", "img": "a.png"}
COLUMNS = {"prompt": "question", "chosen": "better", "rejected": "worse", "images": "img"}


def test_columns_are_the_files_names_for_the_keys(read_json_rows, tmp_path):
    (record,), refused = read_json_rows(RENAMED, columns=COLUMNS)
    assert refused == []
    assert shape(record, 0) == [("user", ("image", "a.png"), "What?"), ("assistant", "yes")]
    (file,) = source_files(tmp_path / "rows.jsonl", columns=COLUMNS)
    assert understood(file) == (
        f"{tmp_path}/rows.jsonl: read as flat with prompt = question, chosen = better, rejected = worse, images = img; "
        "1 of the first 1 rows can be used"
    )
    assert understood(source_files(tmp_path / "rows.jsonl")[0]) is None


def test_columns_may_be_swapped_and_hide_none_in_silence(read_json_rows, refusal):
    (record,), _ = read_json_rows(FLAT, columns={"chosen": "rejected", "rejected": "chosen"})
    assert [response.text for response in record.responses] == ["no", "yes"]
    code, message = refusal({**FLAT, "img": "a.png", "images": "b.png"}, columns={"images": "img"})
    assert code == "UNREAD_MEDIA" and '"images (in the file)" holds an image' in message


@pytest.mark.parametrize(
    "columns, error, part",
    [
        ({"chossen": "better"}, ConfigError, "no layout reads the key 'chossen'; did you mean \"chosen\"?"),
        ({"chosen": "beter"}, DataError, 'has a column "beter"; did you mean "better"?'),
        ({"chosen": "good"}, DataError, 'has a column "good"; they have question, better, worse, img'),
        ({"prompt": "question", "chosen": "better"}, DataError, 'can be used: "img" holds an image'),
    ],
)
def test_columns_that_cannot_be_are_errors(tmp_path, columns, error, part):
    write_rows(tmp_path / "rows.jsonl", [RENAMED])
    (file,) = source_files(tmp_path / "rows.jsonl", columns=columns)
    with pytest.raises(error) as caught:
        understood(file)
    assert part in str(caught.value)


def test_columns_are_checked_and_said_before_a_run_reads(tmp_path):
    rows = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in text_rows(6)]
    write_rows(tmp_path / "rows.jsonl", rows)
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    made = Made(config_of(tmp_path, {"path": str(tmp_path / "rows.jsonl"), "columns": columns}))
    assert len(made.train) == 6
    said = made.said.replace("\n", "")
    assert "read as flat with" in said and "prompt = q" in said and "6 of the first 6 rows can be used" in said
    wrong = config_of(tmp_path, {"path": str(tmp_path / "rows.jsonl"), "columns": {**columns, "prompt": "p"}})
    with pytest.raises(DataError, match=r'columns\.prompt: none of the first rows of .* has a column "p"'):
        Made(wrong)


@pytest.mark.parametrize("groups", [{"prompt": "What?", "responses": ["a"]}, "What?", None, 3])
def test_groups_that_are_no_list_are_refused_as_such(groups):
    with pytest.raises(DataError, match=r"wanted a list of groups: score\(\[group\]\)"):
        score_dicts(lambda records: [], groups)


@pytest.mark.parametrize(
    "votes, preference",
    [
        ((1, 1, 2), Preference(0, 1)), ((2, 0, 2), Preference(1, 0)), ((0, 0, 2), Preference(0, 1, tie=True)),
        ((0, 1, 2), Preference(0, 1, tie=True)), ((1,), Preference(0, 1)),
    ],
)  # fmt: skip
def test_majority_of_pandalms_annotators_decides(read_one, refusal, votes, preference):
    row = {"instruction": "Correct it.", "input": "a b", "response1": "x", "response2": "y"}
    record = read_one({**row, **{f"annotator{number}": vote for number, vote in enumerate(votes, 1)}})
    assert shape(record, 0) == [("user", "Correct it.\na b"), ("assistant", "x")]
    assert record.preferences == (preference,)
    assert refusal({**row, "annotator1": 3})[0] == "BAD_PREFERENCE"


def test_dry_run_checks_columns_and_names_unread_keys(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{**row, "level": 2} for row in text_rows(3)])
    source = {"path": str(tmp_path / "rows.jsonl")}
    ((name, state, detail),) = check_rows(load_config(config_of(tmp_path, source), []))
    assert (name, state) == ("data.train.0", "usable") and "keys that are not read: level (3 rows" in detail
    wrong = config_of(tmp_path, {**source, "columns": {"prompt": "promt"}})
    ((name, state, detail),) = check_rows(load_config(wrong, []))
    assert state == "missing" and 'has a column "promt"; did you mean "prompt"?' in detail


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process; returns its exit code and what it said on standard error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["fastrm", *map(str, arguments)])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        return leave.value.code or 0, capsys.readouterr().err

    return run


def test_score_and_eval_take_columns_and_keys_to_ignore(tmp_path, command):
    rows = [{"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "page": "a.png"} for r in text_rows(3)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    read = list(read_in_order(path, None, "auto", require_preferences=True, columns=columns, ignore=["page"]))
    assert [record.responses[0].text for record in read] == [row["good"] for row in rows]
    options = ["--columns", "prompt=q,chosen=good,rejected=bad", "--ignore", "page"]
    assert command("data", "check", path, "--workers", "1", *options)[0] == 0
    code, said = command("eval", "model", "bench:rm_bench", *options)
    assert code == 64 and "--columns and --ignore are for preferences of your own" in said
    assert command("data", "check", path, "--columns", "prompt")[0] == 64
    code, said = command("score", "model", path, "--out", tmp_path / "out.jsonl", "--columns", "prompt=p")
    assert code == 65 and 'has a column "p"' in said
