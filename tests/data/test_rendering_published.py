"""Published chat templates, as TRL carries them: our tokens are the stock ones, or the conversation is refused.

No conversation may lose a word in silence: whatever is not refused has all its words among its tokens.
"""

import copy
from pathlib import Path

import pytest

from fastrm.data.sources.layouts.groups import group_record
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ConfigError, RecordError
from tests.helpers.chat_templates import tokenizer_with

trl = pytest.importorskip("trl", reason="carries published chat templates")
FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = ("qwen2_5", "qwen2_5_vl", "qwen3", "qwen3_instruct_2507", "qwen3_vl", "llama3", "llama3_1", "llama3_2",
             "gemma3", "gptoss", "glm4moe", "phi3", "cohere2")  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "forecast", "description": "Sunshine", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "c12345678", "type": "function", "function": {"name": "forecast", "arguments": {"town": "Oslo"}}}
ASKED = {"role": "user", "content": "Weather?"}
SAID = {"role": "assistant", "content": "Surely."}
REASONED = {**SAID, "reasoning_content": "Thoughtful."}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c12345678", "name": "forecast", "content": "drizzle"}
CASES = {
    "plain": ({"prompt": [ASKED], "responses": [SAID]}, "Weather? Surely."),
    "system": ({"prompt": [ASKED], "system": "Briefly!", "responses": [SAID]}, "Briefly! Weather? Surely."),
    "reasoning": ({"prompt": [ASKED], "responses": [REASONED]}, "Weather? Thoughtful. Surely."),
    "tools": ({"prompt": [ASKED], "tools": [TOOL], "responses": [SAID]}, "Sunshine Weather? Surely."),
    "call": ({"prompt": [ASKED], "tools": [TOOL], "responses": [CALLED]}, "Sunshine Weather? Oslo"),
    "call and words": ({"prompt": [ASKED], "responses": [CALLED | {"content": "Look."}]}, "Weather? Look. Oslo"),
    "two calls": ({"prompt": [ASKED], "responses": [CALLED | {"tool_calls": [CALL, CALL]}]}, "Weather? Oslo Oslo"),
    "answer of a tool": ({"prompt": [ASKED, CALLED, RESULT], "responses": [SAID]}, "Weather? Oslo drizzle Surely."),
    "earlier reasoning": ({"prompt": [ASKED, REASONED, ASKED], "responses": [SAID]}, "Weather? Thoughtful. Surely."),
    "name": ({"prompt": [ASKED | {"name": "Evelyn"}], "responses": [SAID]}, "Evelyn Weather? Surely."),
    "developer": ({"prompt": [{"role": "developer", "content": "Briefly!"}, ASKED], "responses": [SAID]}, "Briefly!"),
}


@pytest.fixture(scope="module", params=TEMPLATES)
def encoder(request):
    return ConversationEncoder(tokenizer_with((FOLDER / f"{request.param}.jinja").read_text()))


@pytest.mark.parametrize("name", CASES)
def test_a_conversation_is_stocks_to_the_token_or_refused(encoder, name):
    group, words = copy.deepcopy(CASES[name])
    said = group_record(group, 0).responses[0]
    system = [{"role": "system", "content": group["system"]}] if "system" in group else []
    messages = [*system, *group["prompt"], *group["responses"]]
    try:
        tokens = encoder.encode(said).tokens.tolist()
    except RecordError as error:
        assert name != "plain"
        assert error.code in ("UNRENDERED_KEY", "TEMPLATE")
        if error.code == "TEMPLATE":
            return
        text = encoder.tokenizer.apply_chat_template(messages, tools=group.get("tools"), tokenize=False)
        assert any(text.count(word) < words.split().count(word) for word in words.split())
        return
    stock = encoder.tokenizer.apply_chat_template(messages, tools=group.get("tools"), tokenize=True, return_dict=False)
    assert tokens == stock
    text = encoder.tokenizer.decode(tokens)
    # An earlier turn's reasoning is left out by the templates that render it in the last turn.
    kept = [word for word in words.split() if (name, word) != ("earlier reasoning", "Thoughtful.")]
    assert all(text.count(word) >= kept.count(word) for word in kept)


@pytest.mark.parametrize("name", ["smolvlm", "llava_next"])
def test_a_template_that_takes_no_plain_text_is_an_error(name):
    tokenizer = tokenizer_with((FOLDER / f"{name}.jinja").read_text())
    with pytest.raises(ConfigError, match="chat template"):
        ConversationEncoder(tokenizer)
