"""A conversation as the model's own chat template renders it, and checks of what would be read otherwise than meant.

Special-token strings that were typed in a text, a tool's argument or a schema are broken with a private-use character
first, so that what still matches in the rendering was put there by the template. Whether a template renders
something is tested by rendering the conversation once more with that changed: equal outputs mean that it does not.

fastrm renders each conversation once. Some trainers take rendered text; a row's text that already holds rendered
turns would become one turn of markup here, with its images in front. The place of the markup distinguishes such a text
from one that only mentions a template: a turn is opened at its beginning, or right after the end of another turn, or
the assistant's turn is opened at its very end. In the same way, a response that was decoded together with the token
that ends its turn has this token at its very end, right after the last word.
"""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from fastrm.data.media.format import VisionFormat
from fastrm.data.record import MediaRef, Message, Response
from fastrm.errors import RecordError

# Breakers: characters that no published text needs, of which one is used that the conversation does not contain.
_BREAKERS = "".join(chr(code) for code in range(0xE000, 0xE010))
_ALWAYS_RENDERED = ("user", "assistant")  # roles whose texts every template writes
# Keys that tie a tool's answer to its call. Most templates rely on the order of turns and write neither.
_TIES = {"tool_call_id": None, "name": ("tool", "ipython", "function", "environment")}
# Arguments that only the caller of a template may set.
_RESERVED = ("messages", "add_generation_prompt")
REMEMBERED_CHECKS = 4096


class Rendered(NamedTuple):
    """A template's output, in which `breaker` breaks typed special tokens."""

    text: str
    breaker: str

    def mend(self, text: str) -> str:
        """Return a piece of the output as it was typed.

        A template that writes an object's `repr` has escaped the breaker.
        """
        return text.replace(self.breaker, "").replace(_escaped(self.breaker), "")


class ChatRenderer:
    """A renderer of conversations by a tokenizer's chat template.

    Args:
        special: matches the special tokens' strings.
        vision: how the model's family reads images and videos, or None for a text model.
    """

    def __init__(self, tokenizer, special: re.Pattern, vision: VisionFormat | None):
        self._tokenizer, self._special, self._vision = tokenizer, special, vision
        self._found_rendered = Latest(REMEMBERED_CHECKS)

    def render(self, response: Response) -> Rendered:
        """Render a conversation by the template.

        Raises:
            RecordError: TEMPLATE if the template refuses it; BAD_TEXT if no breaker is left.
        """
        from jinja2 import TemplateError

        breaker = _breaker(response)
        messages = [self._message(message, breaker) for message in response.messages]
        arguments = self._broken(json.loads(response.arguments), breaker) if response.arguments else {}
        try:
            return Rendered(self._tokenizer.apply_chat_template(messages, tokenize=False, **arguments), breaker)
        except TemplateError as error:
            raise RecordError("TEMPLATE", f"the chat template refuses the conversation: {error}") from None
        except TypeError as error:
            # A template may add texts, or expect a tool's arguments as an object: Jinja lets Python's error through.
            raise RecordError("TEMPLATE", f"the chat template cannot render the conversation: {error}") from None

    def turn(self, response: Response, rendered: Rendered) -> tuple[int, int]:
        """Return (start, stop), in characters of a rendered conversation, of the last turn's text.

        It starts where a model begins to write: behind the prompt as it is rendered for generation.

        Raises:
            RecordError: TEMPLATE if the conversation does not begin with that prompt; UNRENDERED_KEY if the template
                leaves out some of the text.
        """
        from jinja2 import TemplateError

        messages = [self._message(message, rendered.breaker) for message in response.messages[:-1]]
        arguments = self._broken(json.loads(response.arguments), rendered.breaker) if response.arguments else {}
        options = {"tokenize": False, "add_generation_prompt": True, **arguments}
        try:
            prompt = self._tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, TypeError) as error:
            raise RecordError("TEMPLATE", f"the chat template refuses the prompt for generation: {error}") from None
        if not rendered.text.startswith(prompt):
            raise RecordError(
                "TEMPLATE",
                "the chat template renders a prompt for generation otherwise than in a conversation, so that it is not "
                "known which tokens a model writes; use a template whose generation prompt begins its answers",
            )
        text = self._broken(response.text, rendered.breaker)
        if (stop := _end_of(text, rendered.text, len(prompt))) is None:
            raise _unrendered(
                f'message {len(response.messages)}, of role "assistant", has text', "writes only in part or otherwise",
                "change its text",
            )
        return len(prompt), stop

    def check(self, response: Response) -> None:
        """Refuse a conversation of which the template leaves something out that is no note.

        What a template writes of a turn when it is the last one and leaves out of earlier ones (Qwen3's reasoning) is
        the template's own rule, and no refusal.

        Raises:
            RecordError: UNRENDERED_KEY.
        """
        for name, altered in self._altered_arguments(response):
            prompt = replace(response, messages=response.messages[:-1])
            if not self._renders(name, (prompt, replace(prompt, arguments=altered.arguments)), (response, altered)):
                raise _unrendered(f'the row has "{name}"')
        for number, message in enumerate(response.messages):
            for name, altered in _altered(message):
                before, after = response.messages[:number], response.messages[number + 1 :]
                first = replace(response, messages=(*before, message)), replace(response, messages=(*before, altered))
                changed = replace(response, messages=(*before, altered, *after))
                if not self._renders(name, first, (response, changed)):
                    raise _unrendered(f'message {number + 1}, of role "{message.role}", has "{name}"')

    def check_arguments(self, response: Response) -> None:
        """Refuse arguments of the template that it does not read.

        Raises:
            RecordError: UNRENDERED_KEY.
        """
        if not response.arguments:
            return
        template = self._tokenizer.get_chat_template(tools=json.loads(response.arguments).get("tools"))
        for name in json.loads(response.arguments):
            if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", template):
                raise _unrendered(f'the row has "{name}"')

    def _renders(self, name: str, *pairs: tuple[Response, Response]) -> bool:
        """Return whether the outputs of one of the pairs differ; results are remembered by the first pair."""
        known = hashlib.blake2b(json.dumps([name, pairs[0][0].key]).encode(), digest_size=16).hexdigest()
        if self._found_rendered.get(known):
            return True
        if not any(self._differ(*pair) for pair in pairs):
            return False
        self._found_rendered.store(known, True)
        return True

    def _differ(self, first: Response, second: Response) -> bool:
        try:
            text = self.render(first).text
        except RecordError:
            return False  # the beginning of a conversation may be none
        try:
            return self.render(second).text != text
        except RecordError:
            return True

    def _altered_arguments(self, response: Response) -> Iterator[tuple[str, Response]]:
        if not response.arguments:
            return
        arguments = json.loads(response.arguments)
        for name in ("tools", "documents"):
            if arguments.get(name):
                changed = _without_last(arguments, name)
                yield name, replace(response, arguments=json.dumps(changed, ensure_ascii=False) if changed else "")

    def _message(self, message: Message, breaker: str) -> dict:
        row = {"role": message.role, "content": self._content(message, breaker)}
        return row | self._broken(json.loads(message.fields), breaker) if message.fields else row

    def _content(self, message: Message, breaker: str) -> str | list[dict]:
        parts: list[str | MediaRef] = []
        for part in message.parts:
            # Neighbouring texts are joined first: a special token could be typed across their border.
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            else:
                parts.append(part)
        if not any(isinstance(part, MediaRef) for part in parts):
            return self._broken("".join(parts), breaker)
        return [
            self._vision.part(part) if isinstance(part, MediaRef) else {"type": "text", "text": part}
            for part in self._broken(parts, breaker)
        ]

    def _broken(self, value, breaker: str):
        """Return the value with all special tokens in its texts broken."""
        if isinstance(value, str):
            return self._special.sub(lambda match: match.group()[0] + breaker + match.group()[1:], value)
        if isinstance(value, list):
            return [self._broken(item, breaker) for item in value]
        if isinstance(value, dict):
            return {self._broken(key, breaker): self._broken(item, breaker) for key, item in value.items()}
        return value


def _breaker(response: Response) -> str:
    texts = "".join(text for m in response.messages for text in (m.text, m.fields)) + response.arguments
    breaker = next((c for c in _BREAKERS if c not in texts and _escaped(c) not in texts), None)
    if breaker is None:
        raise RecordError("BAD_TEXT", f"the text uses all of U+E000 to U+{ord(_BREAKERS[-1]):X}")
    return breaker


def _escaped(breaker: str) -> str:
    return f"\\u{ord(breaker):04x}"


def _altered(message: Message) -> Iterator[tuple[str, Message]]:
    """Yield (a part's name, the message with that part changed) for all parts that a template might leave out."""
    if message.text.strip() and (message.fields or message.role not in _ALWAYS_RENDERED):
        yield "content", replace(message, parts=(*message.parts, "x"))
    fields = json.loads(message.fields) if message.fields else {}
    for name, value in fields.items():
        is_tie = name in _TIES and (_TIES[name] is None or message.role in _TIES[name])
        if is_tie or value in ("", [], {}):
            continue
        changed = fields | {name: value + "x"} if isinstance(value, str) else _without_last(fields, name)
        yield name, replace(message, fields=json.dumps(changed, ensure_ascii=False) if changed else "")


def lengthened(message: Message) -> Iterator[Message]:
    """Yield the message with more text at its end, and with more at the end of its fields, if it has them."""
    if message.text.strip() or not message.fields:
        yield replace(message, parts=(*message.parts, "x"))
    if message.fields:
        fields = json.loads(message.fields)
        if _lengthen(fields):
            yield replace(message, fields=json.dumps(fields, ensure_ascii=False))


def _lengthen(value: dict | list) -> bool:
    """Make the last text in an object or a list longer, in place; False if there is none."""
    for key, item in reversed(list(value.items() if isinstance(value, dict) else enumerate(value))):
        if key in ("id", "type", "tool_call_id"):
            continue
        if isinstance(item, str):
            value[key] = item + "x"
            return True
        if isinstance(item, (dict, list)) and _lengthen(item):
            return True
    return False


def _without_last(fields: dict, name: str) -> dict:
    """Return the fields with the last item of a list removed, or without the value."""
    if isinstance(fields[name], list) and len(fields[name]) > 1:
        return fields | {name: fields[name][:-1]}
    return {key: value for key, value in fields.items() if key != name}


def _end_of(text: str, rendered: str, start: int) -> int | None:
    """Return where a text ends in what a template wrote from `start` on; None if it is not there.

    A template may write something before it, and other white space around its parts, as Qwen3's does around thinking.
    """
    text = text.strip()
    if (found := rendered.find(text, start)) >= 0:
        return found + len(text)
    words = "".join(text.split())
    places = [place for place in range(start, len(rendered)) if not rendered[place].isspace()]
    found = "".join(rendered[place] for place in places).find(words)
    return None if found < 0 else places[found + len(words) - 1] + 1


def _unrendered(what: str, does: str = "does not render", change: str = "remove it from the row") -> RecordError:
    return RecordError(
        "UNRENDERED_KEY",
        f"{what}, which the model's chat template {does}, so the model would not read it; {change}, or use a chat "
        "template that renders it",
    )


class Latest:
    """The results of a pure function for the keys that were stored last.

    There is no lock, because a data worker that is forked while another thread holds one would wait for it
    for ever. Each step is one operation of a dictionary with text keys, which Python does as a whole, and no
    step relies on what an earlier one saw. What was stored may be gone at the next look: keep it if you need it.

    Args:
        capacity: number of results that are kept, the oldest of more is forgotten.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._results: OrderedDict[str, Any] = OrderedDict()

    def get(self, key: str) -> Any | None:
        """Return the result stored for a key; None if it is not known, or no longer."""
        return self._results.get(key)

    def store(self, key: str, result: Any) -> None:
        """Remember a result, and forget the oldest beyond `capacity`."""
        self._results[key] = result
        while len(self._results) > self.capacity:
            try:
                self._results.popitem(last=False)
            except KeyError:  # other threads have removed them meanwhile
                return

    def __len__(self) -> int:
        return len(self._results)


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
