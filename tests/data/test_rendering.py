"""What a row says is what the stock chat template renders of it, in every layout, or it is refused by name."""

import copy
from dataclasses import replace

import pytest

from fastrm.data.group import check_distinct, encode_group
from fastrm.data.record import Message, Preference, Record, Response
from fastrm.data.sources.layouts.groups import group_record
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ConfigError, RecordError
from tests.helpers.chat_templates import HERMES, LLAMA3_1, QWEN2_5, QWEN3, TEMPLATES, TRIMMED, UNCLOSED, tokenizer_with
from tests.helpers.source_rows import FLAT, GROUP, RATED, SHAREGPT, read, turns
from tests.helpers.support import make_image, make_model

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <b>now</b> & here, été",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": None}}},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "day": 1.0}}}
ASKED = [{"role": "user", "content": "Weather in Oslo?"}]
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWERED = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"}
TOOL_PROMPT = [*ASKED, CALLED, ANSWERED]


def encoder_of(template, **options):
    return ConversationEncoder(tokenizer_with(template), **options)


def stock_tokens(encoder, messages, **arguments):
    return encoder.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)


def scored(group):
    """The responses of a group as `RewardModel.score` takes it."""
    return group_record(copy.deepcopy(group), 0).responses


def refused(encode, *arguments):
    with pytest.raises(RecordError) as caught:
        encode(*arguments)
    return caught.value.code, caught.value.message


@pytest.mark.parametrize("template", TEMPLATES)
def test_tools_calls_and_answers_are_the_stock_tokens(template, read_one):
    encoder = encoder_of(TEMPLATES[template])
    chosen, rejected = [{"role": "assistant", "content": "", "tool_calls": [CALL]}], turns("Dry.", roles=("assistant",))
    record = read_one({"tools": [WEATHER], "prompt": TOOL_PROMPT, "chosen": chosen, "rejected": rejected})
    for response, last in zip(record.responses, (chosen, rejected), strict=True):
        expected = stock_tokens(encoder, [*TOOL_PROMPT, *last], tools=[WEATHER])
        assert encoder.encode(response).tokens.tolist() == expected


LAYOUTS = {
    "flat": (FLAT, [{"role": "user", "content": "What?"}]),
    "trl": ({"prompt": ASKED, "chosen": turns("yes", roles=("assistant",)), "rejected": "no"}, ASKED),
    "trl, implicit": ({"chosen": turns("What?", "yes"), "rejected": turns("What?", "no")}, turns("What?")),
    "groups": ({**GROUP, "responses": ["yes", "no", "so"]}, turns(GROUP["prompt"])),
    "rated": ({**RATED, "responses": [{"text": "yes", "score": 2}, {"text": "no", "score": 1}]},
              turns(RATED["prompt"])),
    "sharegpt": ({**SHAREGPT, "conversations": [{"from": "human", "value": "What?"}], "images": []}, turns("What?")),
    "swift": ({"messages": turns("What?", "yes"), "rejected_response": "no"}, turns("What?")),
    "labelled": ({"context": turns("What?"), "response1": "yes", "response2": "no", "overall_preference": -1},
                 turns("What?")),
    "arena": (
        {"conversation_a": turns("What?", "yes"), "conversation_b": turns("What?", "no"), "winner": "model_a"},
        turns("What?"),
    ),
    "completions": (
        {"prompt": "What?", "completions": [{"response": r, "annotations": {"Helpfulness": {"Rating": n}}}
                                            for r, n in (("yes", "4"), ("no", "1"))]},
        turns("What?"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_system_history_and_tools_are_rendered_in_every_layout(layout, read_one):
    row, prompt = LAYOUTS[layout]
    encoder = encoder_of(QWEN2_5)
    said = read_one({**{k: v for k, v in row.items() if k not in ("image", "images")}, "system": "Talk as a pirate.",
                     "history": [["Hi", "Ho"]], "tools": [WEATHER]}).responses[0]  # fmt: skip
    messages = [
        {"role": "system", "content": "Talk as a pirate."},
        *turns("Hi", "Ho"),
        *prompt,
        *turns("yes", roles=("assistant",)),
    ]
    assert encoder.encode(said).tokens.tolist() == stock_tokens(encoder, messages, tools=[WEATHER])


def test_nulls_that_parquet_fills_objects_with_are_not_rendered(tmp_path, read_json_rows):
    import pyarrow
    import pyarrow.parquet

    def row(arguments):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        said = [{"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"prompt": ASKED, "chosen": said, "rejected": turns("Dry.", roles=("assistant",))}

    rows = [row({"city": "Oslo"}), row({"day": 1})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    records, refused = read(tmp_path / "rows.parquet")
    assert refused == []
    assert [record.responses for record in records] == [record.responses for record in read_json_rows(*rows)[0]]


def test_tools_as_json_text_are_the_same(read_one):
    import json

    row = {**FLAT, "tools": [WEATHER]}
    assert read_one(row).responses == read_one({**row, "tools": json.dumps([WEATHER])}).responses


def test_groups_and_rated_rows_take_messages_as_responses(read_one):
    encoder = encoder_of(QWEN3)
    said = [{"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}, {"content": "", "tool_calls": [CALL]}]
    expected = [stock_tokens(encoder, [*ASKED, {"role": "assistant"} | one]) for one in said]
    for row in ({"prompt": ASKED, "responses": said, "preferences": [[0, 1]]},
                {"prompt": ASKED, "responses": [one | {"score": 2 - n} for n, one in enumerate(said)]}):  # fmt: skip
        assert [encoder.encode(response).tokens.tolist() for response in read_one(row).responses] == expected


def test_equal_words_with_another_call_are_two_responses(read_one):
    other = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    row = {"prompt": ASKED, "chosen": [{**CALLED, "content": "Looking."}],
           "rejected": [{**CALLED, "content": "Looking.", "tool_calls": [other]}]}  # fmt: skip
    chosen, rejected = read_one(row).responses
    assert chosen != rejected
    encoder = encoder_of(QWEN2_5)
    assert encoder.encode(chosen).tokens.tolist() != encoder.encode(rejected).tokens.tolist()


@pytest.mark.parametrize("change", ["system", "tools", "history", "prompt"])
def test_rows_merge_only_when_all_that_is_rendered_agrees(change, read_json_rows):
    other = {"system": "Be rude.", "tools": [WEATHER], "history": [["Hi", "Ho"]],
             "prompt": [{"role": "user", "content": "What?", "name": "Eve"}]}[change]  # fmt: skip
    (first, second), _ = read_json_rows(FLAT, {**FLAT, change: other})
    assert first.prompt_key != second.prompt_key
    again, copied = read_json_rows({**FLAT, change: other}, {**FLAT, change: other})[0]
    assert again.prompt_key == copied.prompt_key


def test_names_are_rendered_where_the_template_does():
    named = [{"role": "user", "name": "Eve", "content": "Who am I?"}]
    encoder = encoder_of(HERMES)
    (said,) = scored({"prompt": named, "responses": ["Eve."]})
    assert encoder.encode(said).tokens.tolist() == stock_tokens(encoder, [*named, *turns("Eve.", roles=("assistant",))])
    code, message = refused(encoder_of(QWEN2_5).encode, said)
    assert code == "UNRENDERED_KEY"
    assert 'message 1, of role "user", has "name"' in message


REASONED = {"role": "assistant", "content": "Yes.", "reasoning_content": "Let me think."}
# template, group, what the message names; each is silently left out by the stock template.
UNRENDERED = {
    "reasoning": (QWEN2_5, {"prompt": ASKED, "responses": [REASONED]}, '"reasoning_content"'),
    "tools": (TRIMMED, {"prompt": ASKED, "tools": [WEATHER], "responses": ["a"]}, 'the row has "tools"'),
    "calls": (TRIMMED, {"prompt": ASKED, "responses": [{**CALLED, "content": "a"}]}, '"tool_calls"'),
    "words beside a call": (LLAMA3_1, {"prompt": ASKED, "responses": [{**CALLED, "content": "Looking."}]}, '"content"'),
    "system turn": (TRIMMED, {"prompt": ASKED, "system": "Be brief.", "responses": ["a"]}, 'of role "system"'),
    "developer": (QWEN2_5, {"prompt": [{"role": "developer", "content": "Be brief."}, *ASKED], "responses": ["a"]},
                  'of role "developer"'),
    "documents": (QWEN3, {"prompt": ASKED, "documents": [{"text": "b"}], "responses": ["a"]}, '"documents"'),
    "argument": (QWEN2_5, {"prompt": ASKED, "chat_template_kwargs": {"enable_thinking": False}, "responses": ["a"]},
                 '"enable_thinking"'),
    "reserved argument": (QWEN3, {"prompt": ASKED, "chat_template_kwargs": {"add_generation_prompt": True},
                                  "responses": ["a"]}, '"add_generation_prompt"'),
}  # fmt: skip


@pytest.mark.parametrize("name", UNRENDERED)
def test_what_the_template_does_not_render_is_refused_by_name(name):
    template, group, part = UNRENDERED[name]
    encoder = encoder_of(template)
    code, message = refused(encoder.encode, scored(group)[0])
    assert (code, part in message) == ("UNRENDERED_KEY", True), message


def test_unknown_keys_of_turns_are_the_templates_to_render_or_to_refuse(read_one):
    row = {"prompt": [{**ASKED[0], "mood": "sad"}], "chosen": "a", "rejected": "b"}
    said = read_one(row).responses[0]
    code, message = refused(encoder_of(QWEN3).encode, said)
    assert (code, '"mood"' in message) == ("UNRENDERED_KEY", True)
    moody = encoder_of(
        QWEN3.replace("message.content + '<|im_end|>'", "message.content + (message.mood or '') + '<|im_end|>'")
    )
    assert moody.encode(said).tokens.tolist() == stock_tokens(
        moody, [*row["prompt"], {"role": "assistant", "content": "a"}]
    )
    left = read_one(row, ignore=["prompt[].mood"]).responses[0]
    assert left.messages[0] == Message("user", (ASKED[0]["content"],))


def test_the_templates_own_rule_about_earlier_turns_is_stocks():
    encoder = encoder_of(QWEN3)
    prompt = [*ASKED, REASONED, {"role": "user", "content": "Sure?"}]
    (said,) = scored({"prompt": prompt, "responses": [REASONED]})
    expected = stock_tokens(encoder, [*prompt, REASONED])
    assert encoder.encode(said).tokens.tolist() == expected


def test_a_system_text_that_is_the_default_one_is_rendered():
    encoder = encoder_of(QWEN2_5)
    (said,) = scored({"prompt": ASKED, "system": "You are Qwen.", "responses": ["a"]})
    assert encoder.encode(said).tokens.tolist() == stock_tokens(encoder, [*ASKED, *turns("a", roles=("assistant",))])


def test_what_a_template_cannot_take_is_refused():
    two = scored({"prompt": ASKED, "responses": [{**CALLED, "tool_calls": [CALL, CALL]}]})[0]
    assert refused(encoder_of(LLAMA3_1).encode, two)[0] == "TEMPLATE"
    nameless = scored({"prompt": ASKED, "responses": [{**CALLED, "tool_calls": [{"function": {"name": 3}}]}]})[0]
    assert refused(encoder_of(QWEN2_5).encode, nameless)[0] == "TEMPLATE"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("special", ["<|im_end|>", "<|image_pad|>", "<|eot_id|>"])
def test_special_tokens_in_calls_schemas_and_names_stay_text(template, special):
    def group(word):
        schema = {**WEATHER, "function": {**WEATHER["function"], "description": word}}
        call = {"type": "function", "function": {"name": "weather", "arguments": {f"to {word}": [word, {"a": word}]}}}
        return {"tools": [schema], "prompt": TOOL_PROMPT, "responses": [{"content": "", "tool_calls": [call]}]}

    encoder = encoder_of(TEMPLATES[template])
    typed, plain = (encoder.encode(scored(group(word))[0]).tokens for word in (special, "word"))
    number = encoder.special_ids[special]
    assert (typed == number).sum() == (plain == number).sum()
    decoded = encoder.tokenizer.decode(typed[typed != number])
    assert decoded.count(special) == 4
    assert "\ue000" not in decoded
    assert "ue000" not in decoded


def test_the_length_of_a_response_counts_its_calls_and_reasoning():
    encoder = encoder_of(QWEN3)
    (plain, reasoned, called) = scored(
        {"prompt": ASKED, "responses": ["Yes.", REASONED, {"content": "Yes.", "tool_calls": [CALL]}]}
    )
    encoded = [encoder.encode(response) for response in (plain, reasoned, called)]
    lengths = [one.num_response_tokens for one in encoded]
    assert lengths[0] == encoder.num_text_tokens("Yes.")
    for length, one in zip(lengths[1:], encoded[1:], strict=True):
        assert length - lengths[0] == len(one.tokens) - len(encoded[0].tokens) > 0


@pytest.mark.parametrize("value", [float("nan"), b"x", {"a": "\ud800"}, {"a": "b\0"}, {1: object()}])
def test_arguments_that_json_cannot_hold_are_refused(value):
    call = {"function": {"name": "f", "arguments": value}}
    assert refused(scored, {"prompt": ASKED, "responses": [{"tool_calls": [call]}]})[0] in ("BAD_ROW", "BAD_TEXT")


def test_calls_of_llama_factory_and_ms_swift_are_calls(read_one):
    written = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    expected = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "rain"}]
    encoder = encoder_of(QWEN2_5)
    tokens = stock_tokens(encoder, [*expected, *turns("It rains.", roles=("assistant",))])
    sharegpt = [{"from": "human", "value": "Weather in Oslo?"}, {"from": "function_call", "value": written},
                {"from": "observation", "value": "rain"}]  # fmt: skip
    factory = read_one({**SHAREGPT, "conversations": sharegpt, "images": [],
                        "chosen": {"from": "gpt", "value": "It rains."}})  # fmt: skip
    agent = [*ASKED, {"role": "tool_call", "content": written}, {"role": "tool_response", "content": "rain"}]
    swift = read_one({"messages": [*agent, *turns("It rains.", roles=("assistant",))], "rejected_response": "Dry."})
    assert encoder.encode(factory.responses[0]).tokens.tolist() == tokens
    assert encoder.encode(swift.responses[0]).tokens.tolist() == tokens


def test_tools_of_ms_swifts_rejected_conversation_are_its_own(read_one):
    other = {**WEATHER, "function": {**WEATHER["function"], "name": "tides"}}
    row = {"messages": turns("What?", "yes"), "rejected_response": "no", "tools": [WEATHER], "rejected_tools": [other]}
    encoder = encoder_of(QWEN2_5)
    for said, text, tool in zip(read_one(row).responses, ("yes", "no"), (WEATHER, other), strict=True):
        assert encoder.encode(said).tokens.tolist() == stock_tokens(encoder, turns("What?", text), tools=[tool])


def test_rated_rows_of_one_prompt_join_only_when_all_that_is_rendered_agrees(read_json_rows):
    rows = [
        {"prompt": "What?", "response": text, "helpfulness": n, "system": "Be brief."} for n, text in enumerate("ab")
    ]
    assert [len(record.responses) for record in read_json_rows(*rows)[0]] == [2]
    rows[1]["system"] = "Be long."
    records, _ = read_json_rows(*rows, require_preferences=False)
    assert [record.responses[0].messages[0].text for record in records] == ["Be brief.", "Be long."]


def test_a_turn_of_both_namings_says_one_thing(read_one, refusal):
    turn = {"from": "human", "value": "What?", "role": "user", "content": "What?"}
    row = {**SHAREGPT, "conversations": [turn], "images": []}
    assert read_one(row).responses[0].messages[0] == Message("user", ("What?",))
    code, message = refusal({**row, "conversations": [turn | {"content": "Why?"}]})
    assert code == "BAD_ROW" and 'another "value" than "content"' in message


def test_an_old_function_call_is_refused_where_the_template_does_not_render_it():
    said = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    code, message = refused(encoder_of(QWEN2_5).encode, scored({"prompt": ASKED, "responses": [said]})[0])
    assert code == "UNRENDERED_KEY" and '"function_call"' in message


def test_a_row_with_two_system_texts_is_refused(refusal):
    prompt = [{"role": "system", "content": "Be kind."}, *ASKED]
    row = {"prompt": prompt, "chosen": "a", "rejected": "b", "system": "Be rude."}
    assert refusal(row)[0] == "BAD_ROW"


def test_an_anchor_before_the_end_of_the_response_is_an_error():
    encoder_of(UNCLOSED)
    with pytest.raises(ConfigError, match=r"end_of_turn comes before the end of the response"):
        encoder_of(UNCLOSED, anchor="end_of_turn")
    with pytest.raises(ConfigError, match="does not render it"):
        encoder_of(TRIMMED.replace("('user', 'assistant')", "('user',)"))


def test_an_anchor_before_the_end_of_a_rows_response_is_refused():
    # Calls are not closed, so that the last special token stands before them.
    unclosed = QWEN2_5.replace("</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}", "</tool_call>' }}{%- endfor %}")
    assert unclosed != QWEN2_5
    encoder = encoder_of(unclosed, anchor="end_of_turn")
    plain, called = scored({"prompt": ASKED, "responses": ["Yes.", CALLED]})
    assert encoder.encode(plain).tokens[-1] == encoder.special_ids["<|im_end|>"]
    assert refused(encoder.encode, called)[0] == "ANCHOR"


def test_stored_records_keep_all_that_is_rendered():
    from fastrm.data.prepared.records import decode_record, encode_record

    record = group_record({"prompt": TOOL_PROMPT, "tools": [WEATHER], "responses": [REASONED, "b"]}, 0)
    assert decode_record(encode_record(record, None), "media.bin") == record


def test_hashes_see_all_that_is_rendered():
    from fastrm.data.prepared.content import prompt_hash, response_hash

    def hashes(**further):
        record = group_record({"prompt": ASKED, "responses": [REASONED], **further}, 0)
        return prompt_hash(record), response_hash(record.responses[0])

    plain, tools = hashes(), hashes(tools=[WEATHER])
    assert plain[0] != tools[0]
    assert plain[1] != tools[1]
    other = Response((Message("user", ("Weather in Oslo?",)), Message("assistant", ("Yes.",))))
    assert response_hash(other) != plain[1]


def test_a_preference_between_equal_tokens_is_refused():
    group = {"prompt": ASKED, "responses": ["Yes", "Yes\n", "No"], "preferences": [[0, 2], [0, 1]]}
    record = group_record(group, 0, require_preferences=True)
    check_distinct(encode_group(record, encoder_of(QWEN2_5)))  # which does not trim
    trimmed = encode_group(record, encoder_of(TRIMMED))
    code, message = refused(check_distinct, trimmed)
    assert code == "IDENTICAL_RESPONSES"
    assert f"the chat template makes the same {len(trimmed.responses[0].tokens)} tokens of both" in message
    check_distinct(replace(trimmed, preferences=(Preference(0, 2), Preference(0, 1, tie=True))))


def test_equal_tokens_about_other_images_are_two_responses():
    encoder = make_model("qwen2_5_vl").encoder
    images = [make_image(56, 56, seed) for seed in (0, 1)]
    responses = tuple(Response((Message("user", (image, "What?")), Message("assistant", ("a",)))) for image in images)
    record = Record("r", responses, (Preference(0, 1),), "s", "o")
    group = encode_group(record, encoder)
    assert group.responses[0].tokens.tolist() == group.responses[1].tokens.tolist()
    check_distinct(group)


CHATML = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
RENDERED = {
    "chatml": CHATML,
    "image": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n",
    "behind a preamble": "Go on. " + CHATML,
    "end of a turn": "What?<|im_end|>\n<|im_start|>assistant\nThis",
    "generation prompt": "What?\n<|im_start|>assistant\n",
    "llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>",
    "llama 2": "<s>[INST] What? [/INST]",
    "granite": "<|start_of_role|>user<|end_of_role|>What?<|end_of_text|>",
    "kimi": "<|im_user|>user<|im_middle|>What?<|im_end|>",
    "exaone": "[|user|]\nWhat?[|endofturn|]",
    "gemma": "<bos><start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\n",
    "zephyr": "<|user|>\nWhat?</s>\n<|assistant|>\n",
    "deepseek": "<\uff5cbegin▁of▁sentence\uff5c><\uff5cUser\uff5c>What?<\uff5cAssistant\uff5c>",
}


@pytest.mark.parametrize("name", RENDERED)
def test_texts_of_rendered_templates_are_refused(name):
    encoder = encoder_of(QWEN2_5)
    said = scored({"prompt": RENDERED[name], "responses": ["a"]})[0]
    code, message = refused(encoder.encode, said)
    assert code == "RENDERED_TEMPLATE"
    assert 'message 1, of role "user"' in message


@pytest.mark.parametrize("markup", ["<|vision_start|><|image_pad|><|vision_end|>", "<img><IMG_CONTEXT></img>"])
def test_a_rendered_image_beside_the_image_is_refused_and_else_is_text(markup):
    encoder = make_model("qwen2_5_vl").encoder
    answer = Message("assistant", (f"Write {markup}",))
    shown = Response((Message("user", (make_image(56, 56), f"{markup}What?")), answer))
    assert refused(encoder.encode, shown)[0] == "RENDERED_TEMPLATE"
    encoder.encode(Response((Message("user", (make_image(56, 56), "What?")), answer)))
    encoder.encode(Response((Message("user", (f"{markup}What?",)), answer)))


def test_a_response_of_rendered_turns_is_refused():
    said = scored({"prompt": "What?", "responses": ["<|im_start|>assistant\nThis.<|im_end|>"]})[0]
    assert refused(encoder_of(QWEN2_5).encode, said)[0] == "RENDERED_TEMPLATE"


@pytest.mark.parametrize(
    "behind", ["<|im_end|>", "<|im_end|>\n", "<|im_end|><|endoftext|><|endoftext|>", "<|endoftext|>"]
)
def test_a_response_with_the_end_of_its_turn_is_refused(behind):
    """As a policy's tokens are decoded whole: stock would close the turn twice, and we would read the token as text."""
    encoder = encoder_of(QWEN2_5)
    for words in ("This.", "It is `<b>`", "<|im_end|> or this", "```\ncode\n```\n", ""):
        said = scored({"prompt": "What?", "responses": [words + behind]})[0]
        code, message = refused(encoder.encode, said)
        assert code == "RENDERED_TEMPLATE"
        assert f"ends in {behind.strip()!r}" in message and "skip_special_tokens=True" in message
        encoder.encode(scored({"prompt": words + behind, "responses": [words]})[0])  # of a user it is a text
    said = [("user", "a"), ("assistant", f"b{behind}"), ("user", "c")]
    earlier = [{"role": role, "content": text} for role, text in said]
    assert "message 2" in refused(encoder.encode, scored({"prompt": earlier, "responses": ["d"]})[0])[1]


@pytest.mark.parametrize(
    "text",
    [
        "What does <|im_start|>user mean?",
        "Qwen writes `<|im_start|>user`, then the text, then `<|im_end|>` and a line break.",
        "The turn ends with <|im_end|>",
        "[INSTALL] the <user> and </s>",
        "array[0] < [1]; user: hi\nassistant: ho",
        "`<|im_end|><|im_end|>`",
    ],
)
def test_texts_that_speak_of_templates_stay_texts(text):
    encoder = encoder_of(QWEN2_5)
    said = scored({"prompt": text, "responses": [text]})[0]
    assert encoder.tokenizer.decode(encoder.encode(said).tokens).count(text) == 2
