"""Rows of which a part that stands for the prompt, or for an image of it, would not be read."""

import pytest

from fastrm.data.sources import source_files
from fastrm.data.sources.key_tally import KeyTally
from tests.helpers.source_rows import FLAT, IMAGE, PAIR, RATED, SWIFT, human_turns, shape, turns

WHOLE = {"chosen": turns("What?", "yes"), "rejected": turns("What?", "no")}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "prompt",
    [[SYSTEM, *turns("What?")], turns("Hello.", "Hi."), [SYSTEM], "Answer in French: why?"],
    ids=["a system", "earlier turns", "a system alone", "another text"],
)
def test_prompt_that_whole_conversations_do_not_repeat_is_refused(refusal, prompt):
    code, message = refusal({**WHOLE, "prompt": prompt})
    assert code == "BAD_ROW"
    assert '"chosen" is a whole conversation that does not begin with "prompt"' in message


@pytest.mark.parametrize(
    "row",
    [
        {**WHOLE, "prompt": "What?\n"},
        {**WHOLE, "prompt": turns("What?")},
        {"prompt": "What?", "chosen": [SYSTEM, *turns("What?", "yes")], "rejected": [SYSTEM, *turns("What?", "no")]},
        {
            "prompt": "User: What?\nBot: This.\nUser: Why?",
            "chosen": turns("What?", "This.", "Why?", "yes"),
            "rejected": turns("What?", "That.", "Why?", "no"),
        },
    ],
    ids=["a text", "turns", "a text behind a system", "all turns in one text"],
)
def test_prompt_that_whole_conversations_repeat_is_read_once(read_one, row):
    record = read_one(row)
    assert record.preferences == PAIR
    for number, name in enumerate(("chosen", "rejected")):
        assert shape(record, number) == [(turn["role"], turn["content"]) for turn in row[name]]


@pytest.mark.parametrize(
    "row",
    [
        {"input": "Where did it sit?", "chosen": "The cat sat.", "rejected": "The cat stood."},
        {"query": "Where did it sit?", "chosen": "The cat sat.", "rejected": "The cat stood."},
    ],
    ids=str,
)
def test_texts_beside_another_word_for_the_prompt_are_not_split(refusal, read_one, row):
    code, message = refusal(row)
    assert code == "UNKNOWN_KEY" and 'did you mean "prompt"?' in message
    # Of whole conversations it is the prompt again.
    assert shape(read_one({**row, **WHOLE}), 1) == [("user", "What?"), ("assistant", "no")]


@pytest.mark.parametrize("key", ["context", "passage", "input"])
def test_a_text_beside_the_prompt_is_refused_unless_the_prompt_holds_it(refusal, read_one, key):
    sat = "The cat sat on the mat."
    for value in (sat, [sat, "And slept."], [{"role": "user", "content": sat}]):
        code, message = refusal({**FLAT, key: value})
        assert code == "UNKNOWN_KEY"
        assert f'the key "{key}" holds a text that the prompt may be about' in message
        assert f"`ignore: [{key}]`" in message
        assert shape(read_one({**FLAT, key: value}, ignore=[key]), 0)[0] == ("user", "What?")
    # What an answer quotes, or a file is called, the prompt does not show.
    turns = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "yes"), ("rejected", sat))}
    for row in ({"chosen": f"He said: {sat}"}, {"image": f"{sat}png"}, turns):
        assert refusal({**FLAT, **row, key: sat})[0] == "UNKNOWN_KEY"
    for value in ("", [], None, f"{sat}\n"):
        assert shape(read_one({**FLAT, "prompt": f"{sat} Where?", key: value}), 0)[0] == ("user", f"{sat} Where?")


@pytest.mark.parametrize(
    "value", ["000123", ["https://example.org/photo/7"], {"url": "https://example.org/7"}], ids=str
)
def test_another_word_for_images_is_refused_whatever_it_holds(refusal, read_one, value):
    code, message = refusal({**FLAT, "image_url": value})
    assert code == "UNKNOWN_KEY" and 'did you mean "images"?' in message
    assert shape(read_one({**FLAT, "image": "a.png", "image_url": value}), 0)[0] == ("user", IMAGE, "What?")
    assert read_one({**FLAT, "clip": 0.31, "image_url": ""}).media == ()


@pytest.mark.parametrize("images", [[], ["b.png"]])
@pytest.mark.parametrize(
    "part", [{"source": {"type": "base64", "data": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYA"}}, {"data": "a.png"}], ids=str
)
def test_part_whose_image_is_under_another_key_takes_no_other_image(refusal, part, images):
    content = [{"type": "image", **part}, {"type": "text", "text": "What?"}]
    code, message = refusal({**FLAT, "images": images, "prompt": [{"role": "user", "content": content}]})
    assert code == "UNREAD_MEDIA" and f'"prompt[].content[].{next(iter(part))}" holds an image' in message


def test_settings_and_texts_that_are_not_read_are_reported(read_json_rows, tmp_path):
    part = {"type": "image", "image": "a.png", "max_pixels": 3136}
    rated = {"text": "a", "response": "b", "score": 1}
    read_json_rows(
        {**FLAT, "prompt": [{"role": "user", "content": [part]}]}, {**RATED, "responses": [rated, *RATED["responses"]]}
    )
    (file,), tally = source_files(tmp_path / "rows.jsonl"), KeyTally()
    assert len(list(file.read(keys=tally))) == 2
    assert tally.unread == {"prompt[].content[].max_pixels": 1, "responses[].response": 1}


def test_names_and_boxes_that_are_not_put_in_are_refused(refusal):
    row = {**SWIFT, "messages": turns("<image>Find <ref-object>.", "<bbox>"), "objects": {"ref": ["cat"]}}
    code, message = refusal(row)
    assert code == "UNRENDERED_KEY" and '"objects"' in message


def test_finished_conversation_of_another_name_is_scored_or_told_how(read_one, refusal):
    record = read_one({"conversation": turns("What?", "yes")}, require_preferences=False)
    assert shape(record, 0) == [("user", "What?"), ("assistant", "yes")]
    code, message = refusal({"conversations": human_turns("What?", "yes")}, require_preferences=False)
    assert code == "BAD_JUDGE_TEXT" and 'to be scored belongs under "messages"' in message


def test_prompt_with_a_response_alone_is_told_the_key_of_responses(refusal):
    code, message = refusal({"prompt": "What?", "response": "yes"}, require_preferences=False)
    assert code == "BAD_ROW" and "one response stands in a list: \"responses\"" in message
