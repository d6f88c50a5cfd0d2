"""A check for texts that were rendered with a chat template already, and would be rendered once more.

fastrm renders each conversation once. Some trainers take rendered text; a row's text that already holds rendered
turns would become one turn of markup here, with its images in front. The place of the markup distinguishes such a text
from one that only mentions a template: a turn is opened at its beginning, or right after the end of another turn, or
the assistant's turn is opened at its very end. In the same way, a response that was decoded together with the token
that ends its turn has this token at its very end, right after the last word.
"""

import re

from fastrm.data.record import MediaRef, Message
from fastrm.errors import RecordError

_ROLES = "(?:system|user|assistant|tool|developer|model|ipython)"
_ASSISTANT = "(?:assistant|model)"
# Markup that opens a turn, with {role} for the role, and that closes one. Sources: the templates of Qwen and other
# models with ChatML; Llama 3 and 4; Gemma; Phi 3 and Zephyr; gpt-oss; Granite; Kimi K2; EXAONE; Llama 2 and Mistral;
# DeepSeek; Cohere.
_OPENINGS = (
    r"<\|im_start\|>{role}\b",
    r"<\|(?:start_header_id|header_start)\|>{role}<\|(?:end_header_id|header_end)\|>",
    r"<start_of_turn>{role}\b",
    r"<\|{role}\|>",
    r"<\|start\|>{role}\b",
    r"<\|start_of_role\|>{role}<\|end_of_role\|>",
    r"<\|im_{role}\|>",
    r"\[\|{role}\|\]",
)
_FIXED_OPENINGS = (r"\[INST\]", "<\uff5cUser\uff5c>", r"<\|START_OF_TURN_TOKEN\|>")
_FIXED_ASSISTANT = (r"\[/INST\]", "<\uff5cAssistant\uff5c>", r"<\|CHATBOT_TOKEN\|>")
_CLOSINGS = (
    r"<\|im_end\|>", r"<\|(?:eot_id|eom_id|eot|eom)\|>", "<end_of_turn>", r"<\|end\|>", "</s>",
    r"<\|END_OF_TURN_TOKEN\|>", r"<\|end_of_text\|>", r"\[\|endofturn\|\]", "<\uff5cend▁of▁sentence\uff5c>",
)  # fmt: skip
_STARTS = (r"<s>", r"<\|begin_of_text\|>", "<bos>", "<\uff5cbegin▁of▁sentence\uff5c>", r"\[gMASK\]", "<sop>")
_opening = "|".join([*(form.format(role=_ROLES) for form in _OPENINGS), *_FIXED_OPENINGS, *_FIXED_ASSISTANT[1:]])
_assistant = "|".join([*(form.format(role=_ASSISTANT) for form in _OPENINGS), *_FIXED_ASSISTANT])
_RENDERED = re.compile(
    rf"\A\s*(?:(?:{'|'.join(_STARTS)})\s*)*(?:{_opening})"
    rf"|(?:{'|'.join(_CLOSINGS)})\s*(?:{'|'.join(_STARTS)})?\s*(?:{_opening})"
    rf"|(?:{_assistant})\s*\Z"
)
# An image or a video as a processor takes it, of Qwen-VL and of InternVL. Beside an image of the row it was meant for
# that image's place; in a response, or in a row without images, it is a quotation.
_RENDERED_MEDIUM = re.compile(
    r"<\|vision_start\|>\s*<\|(?:image|video)_pad\|>|<img>\s*<IMG_CONTEXT>|<start_of_image>|<\|image\|>"
)
# Every markup that is searched for contains one of these.
_MARKS = ("<|", "<\uff5c", "INST]", "[|", "_of_turn>", "</s>", "_CONTEXT>", "_of_image>")


def check_not_rendered(messages: tuple[Message, ...]) -> None:
    """Refuse a conversation that holds rendered text, or a prompt with media and their markup in a text.

    Raises:
        RecordError: RENDERED_TEMPLATE.
    """
    has_media = any(isinstance(part, MediaRef) for message in messages for part in message.parts)
    for number, message in enumerate(messages):
        text = message.text
        if not any(mark in text for mark in _MARKS):  # nearly all texts
            continue
        found = _RENDERED.search(text)
        if found is None and has_media and number < len(messages) - 1:
            found = _RENDERED_MEDIUM.search(text)
        if found is not None:
            raise RecordError(
                "RENDERED_TEMPLATE",
                f'message {number + 1}, of role "{message.role}", holds what a chat template has written '
                f"({found.group().strip()!r}), and would be rendered once more; give the turns as messages, and "
                "images by their files",
            )


def check_not_closed(messages: tuple[Message, ...], closing: tuple[str, ...]) -> None:
    """Refuse a conversation of which an answer ends in what closes answers.

    Args:
        closing: special tokens that the chat template writes behind an answer, and others that models end with.

    Raises:
        RecordError: RENDERED_TEMPLATE.
    """
    for number, message in enumerate(messages):
        text = message.text.rstrip() if message.role == "assistant" else ""
        words = text
        while words.endswith(closing):
            words = words.removesuffix(next(token for token in closing if words.endswith(token)))
        if words != text and not words.endswith((" ", "\t")):
            raise RecordError(
                "RENDERED_TEMPLATE",
                f'message {number + 1}, of role "assistant", ends in {text[len(words) :]!r}, which the chat template '
                "writes behind it and which would be read as text; decode responses with skip_special_tokens=True. To "
                "speak of the token, put a space in front of it, or quotes around it",
            )
