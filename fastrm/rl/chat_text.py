"""Prompts that a trainer hands over as rendered text, read back to messages.

The templates of Qwen, InternVL and SmolLM (ChatML) and of Llama 3 are known by their marks; the model's own template
then renders the messages anew.
"""

import re

# The mark of a turn's start, what parts its role from its text, and the mark of its end.
_TEMPLATES = (("<|im_start|>", "\n", "<|im_end|>"), ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"))
# The tokens of an image. InternVL's template puts a line end behind them.
_IMAGE = re.compile(
    r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|(?:<\|image_pad\|>)+"
    r"|<img>(?:<IMG_CONTEXT>)+</img>\n?|(?:<IMG_CONTEXT>)+\n?"
)
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


def read_chat(text: str) -> list[dict]:
    """Return the messages of a rendered prompt, without the begun turn of the assistant at its end.

    A text without marks of a known template is one turn of the user. A run of image tokens is one image part.
    """
    for start, middle, end in _TEMPLATES:
        if start in text:
            turns = [turn.partition(middle) for turn in text.split(start)[1:]]
            messages = [_message(role, said.partition(end)[0]) for role, _, said in turns]
            return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return [_message("user", text)]


def read_response(text: str) -> str:
    """Return a response without the marks that end its turn."""
    text = text.strip()
    while end := next((end for end in _ENDS if text.endswith(end)), None):
        text = text.removesuffix(end).rstrip()
    return text


def _message(role: str, said: str) -> dict:
    if not _IMAGE.search(said):
        return {"role": role.strip(), "content": said}
    texts = _IMAGE.split(said)
    parts = [part for text in texts for part in ({"type": "text", "text": text}, {"type": "image"})][:-1]
    return {"role": role.strip(), "content": [part for part in parts if part.get("text") != ""]}
