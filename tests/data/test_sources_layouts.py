"""Layouts of trainers and our own: rows as published, and every bad row to its code."""

import json

import pytest

from fastrm.data.record import ImageRef, Message, Preference
from tests.helpers.source_rows import (
    FLAT,
    GROUP,
    IMAGE,
    IXC,
    PAIR,
    RATED,
    SAME_PAIR,
    SHAREGPT,
    SWIFT,
    bot_turns,
    data_uri,
    human_turns,
    png,
    read,
    shape,
    turns,
)


@pytest.mark.parametrize("layout", SAME_PAIR)
def test_every_layout_reads_the_same_pair(read_one, layout):
    row = SAME_PAIR[layout]
    for options in ({}, {"format": layout.split(",")[0].split()[0]}):
        record = read_one(row, **options)
        assert shape(record, 0) == [("user", IMAGE, "What?"), ("assistant", "yes")]
        assert shape(record, 1) == [("user", IMAGE, "What?"), ("assistant", "no")]
        assert record.preferences == PAIR


def test_system_and_history_come_first(read_one):
    expected = [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "What?\nNow"),
        ("assistant", "yes"),
    ]  # fmt: skip
    alpaca = {"system": "Be brief.", "history": [["Hi", "Hello"]], "instruction": "What?", "input": "Now"}
    assert shape(read_one({**alpaca, "chosen": "yes", "rejected": "no"}), 0) == expected
    swift = {"system": "Be brief.", "history": [["Hi", "Hello"]], "query": "What?\nNow", "response": "yes"}
    assert shape(read_one({**swift, "rejected_response": "no"}), 0) == expected
    sharegpt = {**SHAREGPT, "conversations": human_turns("Hi", "Hello", "What?\nNow"), "images": []}
    assert shape(read_one({**sharegpt, "system": "Be brief."}), 0) == expected
    own_system = [{"from": "system", "value": "Be brief."}, *human_turns("Hi", "Hello", "What?\nNow")]
    assert shape(read_one({**sharegpt, "conversations": own_system, "system": "Be long."}), 0) == expected


def test_tool_turns_keep_their_roles(read_one):
    agent = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": "{}"},
        {"from": "observation", "value": "rain"},
    ]
    roles = [m.role for m in read_one({**SHAREGPT, "conversations": agent, "images": []}).responses[0].messages]
    assert roles == ["user", "assistant", "tool", "assistant"]


def test_swift_list_replaces_what_follows_the_last_user_turn(read_one):
    agent = [
        *turns("Weather?", "call"),
        {"role": "tool", "content": "rain"},
        *turns("It rains.", roles=("assistant",)),
    ]
    row = {"messages": agent, "rejected_response": turns("No idea.", roles=("assistant",))}
    assert shape(read_one(row), 1) == [("user", "Weather?"), ("assistant", "No idea.")]


def test_swift_same_text_about_another_image(read_one):
    row = {"messages": turns("<image>What?", "yes"), "images": ["a.png"], "rejected_images": ["b.png"]}
    record = read_one(row)
    assert shape(record, 0)[0] == ("user", IMAGE, "What?")
    assert shape(record, 1)[0] == ("user", ("image", "b.png"), "What?")
    assert record.responses[0].text == record.responses[1].text


def test_trl_standard_format_without_a_prompt_splits_between_words(read_one):
    record = read_one({"chosen": "The sky is blue.", "rejected": "The sky is bleak."})
    assert shape(record, 0) == [("user", "The sky is"), ("assistant", " blue.")]
    assert shape(record, 1) == [("user", "The sky is"), ("assistant", " bleak.")]


def test_trl_conversations_may_differ_before_the_response(read_one):
    record = read_one({"chosen": turns("Hi", "Ho", "So?", "yes"), "rejected": turns("Hi", "Ha", "So?", "yes")})
    assert [shape(record, i)[1] for i in (0, 1)] == [("assistant", "Ho"), ("assistant", "Ha")]


def test_ixc_images_and_videos_stand_where_image_here_says(read_one):
    asked = "Image1 <ImageHere>; Image2 <ImageHere>; Which?"
    row = {"conversations_a": bot_turns(asked, "the first"), "conversations_b": bot_turns(asked, "the second")}
    record = read_one({**row, "image": ["b.png", "a.png"]})
    assert shape(record, 0) == [
        ("user", "Image1 ", ("image", "b.png"), "; Image2 ", IMAGE, "; Which?"), ("assistant", "the first"),
    ]  # fmt: skip
    record = read_one({**row, "image": ["b.mp4", "a.png"]})
    assert shape(record, 1)[0] == ("user", "Image1 ", ("video", "b.mp4"), "; Image2 ", IMAGE, "; Which?")
    assert shape(read_one({**IXC, "image": "b.mp4"}), 0)[0] == ("user", ("video", "b.mp4"), "What?")


def test_ixc_turns_share_the_places_of_images(read_one):
    asked = bot_turns("<ImageHere>A?", "a", "<ImageHere>B?", "b")
    row = {"conversations_a": asked, "conversations_b": [*asked[:-1], *bot_turns("", "c")[1:]]}
    record = read_one({**row, "image": ["b.mp4", "a.png"]})
    assert shape(record, 0) == [
        ("user", ("video", "b.mp4"), "A?"), ("assistant", "a"), ("user", IMAGE, "B?"), ("assistant", "b"),
    ]  # fmt: skip


def test_ixc_without_an_image_is_text(read_one):
    assert shape(read_one(IXC), 1) == [("user", "What?"), ("assistant", "no")]


def test_ixc_place_in_a_response_can_be_scored_only(read_one, refusal):
    row = {**IXC, "conversations_b": bot_turns("What?", "see <ImageHere>")}
    message = 'the response of "conversations_b" holds <ImageHere>; images belong in the prompt'
    assert refusal(row) == ("IMAGE_COUNT", message)
    assert read_one(row, require_preferences=False).responses[1].text == "see <ImageHere>"


@pytest.mark.parametrize("row", [FLAT, SAME_PAIR["trl, implicit prompt"], SHAREGPT, SWIFT, IXC])
def test_margin_is_read(read_one, row):
    assert read_one({**row, "margin": 1.5}).preferences == (Preference(0, 1, margin=1.5),)


def test_group_preferences_and_margins(read_one):
    record = read_one(GROUP)
    assert [r.text for r in record.responses] == ["a", "b", "c"]
    assert record.preferences == (Preference(0, 1), Preference(2, 0, margin=0.5))


def test_rated_list_makes_all_pairs_and_ties(read_one):
    scores = {"a": 1, "b": 3, "c": 2, "d": 1}
    record = read_one({"prompt": "?", "responses": [{"text": t, "score": s} for t, s in scores.items()]})
    assert set(record.preferences) == {
        Preference(1, 0), Preference(2, 0), Preference(0, 3, tie=True),
        Preference(1, 2), Preference(1, 3), Preference(2, 3),
    }  # fmt: skip


def test_equal_texts_with_equal_scores_are_a_tie(read_one):
    record = read_one({"prompt": "?", "responses": [{"text": "a", "score": 1}, {"text": "a", "score": 1}]})
    assert record.preferences == (Preference(0, 1, tie=True),)


def test_text_of_a_completion_left_out_is_not_a_repeated_one(read_json_rows):
    ratings = {"first": "N/A", "again": "4", "other": "2"}
    texts = {"first": "same", "again": "same", "other": "other"}
    completions = [
        {"response": texts[name], "annotations": {"Helpfulness": {"Rating": rating}}}
        for name, rating in ratings.items()
    ]
    (record,), refused = read_json_rows({"prompt": "What?", "completions": completions})
    assert [response.text for response in record.responses] == ["same", "other"]
    assert [refusal[1] for refusal in refused] == ["RATING_MISSING"]


def test_ids_sources_and_origins(read_json_rows, tmp_path):
    rows = [{**FLAT, "id": "x"}, {**FLAT, "id": 7, "source": "mine"}, {**FLAT, "id": True, "source": 3}]
    path = tmp_path / "rows.jsonl"
    records, _ = read_json_rows(*rows)
    assert [r.id for r in records] == ["x", "7", "rows:3"]
    assert [r.source for r in records] == ["rows", "mine", "rows"]
    assert [r.origin for r in records] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert [r.source for r in read_json_rows(*rows, name="set")[0]] == ["set", "set", "set"]
    assert [r.source for r in read_json_rows(*rows)[0]][1] == "mine"


def test_origin_is_the_path_as_given(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**FLAT, "image": "a.png"}))
    monkeypatch.chdir(tmp_path)
    record = read("rows.jsonl")[0][0]
    assert record.origin == "rows.jsonl:1"
    assert record.media[0].path == str(tmp_path / "a.png")  # workers may run elsewhere


BAD_ROWS = {
    "chosen missing": (
        {"prompt": "p", "rejected": "b"},
        "BAD_ROW",
        '"chosen" is missing or null, wanted text',
    ),
    "rejected null": ({**FLAT, "rejected": None}, "BAD_ROW", '"rejected" is missing or null, wanted text'),
    "boolean text": ({**FLAT, "chosen": True}, "BAD_ROW", '"chosen" is a boolean (true), wanted text'),
    "number prompt": ({**FLAT, "prompt": 3}, "BAD_ROW", '"prompt" is a number, wanted text or a list'),
    "object chosen": ({**FLAT, "chosen": {"x": 1}}, "BAD_ROW", '"chosen" is an object, wanted text'),
    "unknown keys": ({"a": 1, "b": 2}, "BAD_ROW", 'the keys "a", "b"'),
    "no keys": ({}, "BAD_ROW", "the keys none"),
    "a list": ([1, 2], "BAD_ROW", '"row" is a list, wanted an object'),
    "a number": (3.5, "BAD_ROW", '"row" is a number (3.5), wanted an object'),
    "null": (None, "BAD_ROW", '"row" is missing or null'),
    "empty prompt": ({**FLAT, "prompt": ""}, "BAD_ROW", "the prompt is empty"),
    "no common prompt": ({"chosen": "a b", "rejected": "c d"}, "BAD_ROW", '"prompt" is missing'),
    "empty HH response": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "\n\nHuman: Hi\n\nAssistant:"},
        "EMPTY_RESPONSE",
        '"rejected" is empty',
    ),
    "empty HH response with a space": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: ", "rejected": "\n\nHuman: Hi\n\nAssistant: Ho"},
        "EMPTY_RESPONSE",
        '"chosen" is empty',
    ),
    "equal without prompt": ({"chosen": "a b", "rejected": "a b"}, "IDENTICAL_RESPONSES", "are equal"),
    "empty chosen": ({**FLAT, "chosen": ""}, "EMPTY_RESPONSE", '"chosen" is empty'),
    "blank rejected": ({**FLAT, "rejected": " \n"}, "EMPTY_RESPONSE", '"rejected" is empty'),
    "equal": ({**FLAT, "rejected": "yes"}, "IDENTICAL_RESPONSES", "response 0 is preferred to response 1"),
    "equal in swift": ({**SWIFT, "rejected_response": "yes"}, "IDENTICAL_RESPONSES", "equal"),
    "lone surrogate": (
        {**FLAT, "chosen": "a\ud800"},
        "BAD_TEXT",
        '"chosen" has a lone surrogate at character 1',
    ),
    "NUL": ({**FLAT, "prompt": "a\0"}, "BAD_TEXT", '"prompt" holds a NUL'),
    "surrogate in id": ({**FLAT, "id": "\udfff"}, "BAD_TEXT", '"id"'),
    "surrogate in source": ({**FLAT, "source": "\udfff"}, "BAD_TEXT", '"source"'),
    "NaN margin": ({**FLAT, "margin": float("nan")}, "BAD_PREFERENCE", '"margin" is nan'),
    "text margin": ({**FLAT, "margin": "1"}, "BAD_PREFERENCE", '"margin" is text, wanted a number'),
    "boolean margin": ({**FLAT, "margin": True}, "BAD_PREFERENCE", '"margin" is a boolean'),
    "huge margin": ({**FLAT, "margin": 10**400}, "BAD_PREFERENCE", '"margin" is inf'),
    "audio": ({**FLAT, "audio": "a.wav"}, "UNSUPPORTED_MEDIA", '"audio"'),
    "audio part": (
        {**FLAT, "prompt": [{"role": "user", "content": [{"type": "audio"}]}]},
        "UNSUPPORTED_MEDIA",
        "audio",
    ),
    "video part without video": (
        {**FLAT, "prompt": [{"role": "user", "content": [{"type": "video"}]}]},
        "VIDEO_COUNT",
        "of videos in the row 0; make them equal",
    ),
    "unknown part": (
        {**FLAT, "prompt": [{"role": "user", "content": [{"type": "x"}]}]},
        "BAD_ROW",
        "'x', wanted",
    ),
    "text as part": ({**FLAT, "prompt": [{"role": "user", "content": ["x"]}]}, "BAD_ROW", "content part"),
    "unknown role": ({**FLAT, "prompt": [{"role": "narrator", "content": "x"}]}, "BAD_ROW", "'narrator'"),
    "role missing": ({**FLAT, "prompt": [{"content": "x"}]}, "BAD_ROW", '"prompt[0].role" is None'),
    "content null": (
        {**FLAT, "prompt": [{"role": "user", "content": None}]},
        "BAD_ROW",
        '"prompt[0].content"',
    ),
    "turn is text": ({**FLAT, "prompt": ["x"]}, "BAD_ROW", '"prompt[0]" is text'),
    "no turns": ({**FLAT, "prompt": []}, "BAD_ROW", '"prompt" is an empty list'),
    "prompt of the assistant": ({**FLAT, "prompt": turns("a", "b")}, "BAD_ROW", "ends with the assistant"),
    "even sharegpt": (
        {**SHAREGPT, "conversations": human_turns("a", "b"), "images": []},
        "BAD_ROW",
        "ends with the assistant",
    ),
    "response of the user": (
        {"chosen": turns("a", "b"), "rejected": [*turns("a"), *turns("c")]},
        "BAD_ROW",
        '"rejected" ends with',
    ),
    "image in response": (
        {
            "chosen": [*turns("a"), {"role": "assistant", "content": [{"type": "image"}]}],
            "rejected": turns("a", "b"),
        },
        "BAD_ROW",
        "holds an image",
    ),
    "image without user turn": (
        {"prompt": [{"role": "system", "content": "s"}], "chosen": "a", "rejected": "b", "image": "a.png"},
        "BAD_ROW",
        "no user turn",
    ),
    "ixc, one image for two places": (
        {**IXC, "conversations_a": bot_turns("<ImageHere><ImageHere>?", "a"), "image": "a.png"},
        "IMAGE_COUNT",
        'the prompt of "conversations_a" has <ImageHere> 2 times, and the row 1 images and videos',
    ),
    "ixc, a place without an image": (
        {**IXC, "conversations_b": bot_turns("<ImageHere>?", "a")},
        "IMAGE_COUNT",
        'the prompt of "conversations_b" has <ImageHere> 1 times, and the row 0',
    ),
    "ixc, rejected missing": (
        {"conversations_a": bot_turns("p", "a")},
        "BAD_ROW",
        '"conversations_b" is missing or null',
    ),
    "history": ({**SAME_PAIR["swift, old columns"], "history": [["a"]]}, "BAD_ROW", '"history[0]" is a list'),
    "history text": ({**SAME_PAIR["swift, old columns"], "history": "a"}, "BAD_ROW", '"history" is text'),
    "swift rejected number": (
        {**SWIFT, "rejected_response": 3},
        "BAD_ROW",
        '"rejected_response" is a number',
    ),
    "responses text": ({**GROUP, "responses": "abc"}, "BAD_ROW", '"responses" is text, wanted a list'),
    "responses empty": ({**GROUP, "responses": []}, "BAD_ROW", '"responses" is an empty list'),
    "response boolean": (
        {**GROUP, "responses": ["a", False]},
        "BAD_ROW",
        '"responses[1]" is a boolean (false)',
    ),
    "one response": ({"prompt": "p", "response": "a"}, "BAD_ROW", '"responses": [the text of "response"]'),
    "one completion": ({"prompt": "p", "completion": "a"}, "BAD_ROW", '"responses": [the text of "completion"]'),
    "one output": ({"instruction": "p", "output": "a"}, "BAD_ROW", '"responses": [the text of "output"]'),
    "one response, key misspelt": ({"prompt": "p", "response": "a", "rejectd": "b"}, "BAD_ROW", '"rejected" for'),
    "response empty": ({**GROUP, "responses": ["a", "b", " "]}, "EMPTY_RESPONSE", '"responses[2]"'),
    "equal in a group": ({**GROUP, "responses": ["a", "a", "c"]}, "IDENTICAL_RESPONSES", "response 0"),
    "no preferences": ({**GROUP, "preferences": []}, "NO_PREFERENCE", "found 3"),
    "preferences missing": ({"prompt": "p", "responses": ["a", "b"]}, "NO_PREFERENCE", "found 2"),
    "preferences object": ({**GROUP, "preferences": {}}, "BAD_ROW", '"preferences" is an object'),
    "index too large": ({**GROUP, "preferences": [[0, 3]]}, "BAD_PREFERENCE", "index 3, wanted 0 to 2"),
    "index negative": (
        {**GROUP, "preferences": [[0, 1], [-1, 0]]},
        "BAD_PREFERENCE",
        '"preferences[1]" has index -1',
    ),
    "index boolean": ({**GROUP, "preferences": [[True, 0]]}, "BAD_PREFERENCE", "index True"),
    "index text": ({**GROUP, "preferences": [["0", 1]]}, "BAD_PREFERENCE", "index '0'"),
    "preferred to itself": ({**GROUP, "preferences": [[1, 1]]}, "BAD_PREFERENCE", "response 1 to itself"),
    "four values": ({**GROUP, "preferences": [[0, 1, 2, 3]]}, "BAD_PREFERENCE", "[winner, loser, margin?]"),
    "group margin": (
        {**GROUP, "preferences": [[0, 1, float("inf")]]},
        "BAD_PREFERENCE",
        '"preferences[0][2]" is inf',
    ),
    "one rating": ({**RATED, "responses": RATED["responses"][:1]}, "NO_PREFERENCE", "found 1"),
    "score missing": (
        {**RATED, "responses": [{"text": "a"}]},
        "BAD_PREFERENCE",
        '"responses[0].score" is missing',
    ),
    "score text": ({**RATED, "responses": [{"text": "a", "score": "N/A"}]}, "BAD_PREFERENCE", "is text"),
    "rated text": ({**RATED, "responses": [{"score": 1}]}, "BAD_ROW", '"responses[0].text" is missing'),
    "rated mixed": (
        {**RATED, "responses": [{"text": "a", "score": 1}, "b"]},
        "BAD_ROW",
        '"responses[1]" is text',
    ),
    "rated equal texts": (
        {**RATED, "responses": [{"text": "a", "score": 1}, {"text": "a", "score": 2}]},
        "IDENTICAL_RESPONSES",
        "equal",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_refused_once_and_named(refusal, name):
    row, code, part = BAD_ROWS[name]
    assert refusal(row)[0] == code
    assert part in refusal(row)[1]


def test_every_row_is_a_record_or_one_refusal(read_json_rows):
    rows = [row for row, _, _ in BAD_ROWS.values()] + list(SAME_PAIR.values())
    records, refused = read_json_rows(*rows)
    lines = [r.origin for r in records] + [origin for origin, _, _ in refused]
    assert sorted(int(line.rsplit(":", 1)[1]) for line in lines) == list(range(1, len(rows) + 1))


def test_explicit_format_is_not_guessed_around(refusal):
    assert refusal(SHAREGPT, format="flat")[0] == "BAD_ROW"


def test_groups_without_preferences_are_for_scoring(read_one):
    record = read_one({"prompt": "p", "responses": ["a"]}, require_preferences=False)
    assert (len(record.responses), record.preferences) == (1, ())


def test_flat_row_is_the_documented_record(read_one):
    record = read_one({**FLAT, "image": data_uri(png())})
    prompt = Message("user", (ImageRef(data=png()), "What?"))
    assert record.responses[0].messages == (prompt, Message("assistant", ("yes",)))
