"""Tokens of a response's conversation, exactly as the stock chat template and tokenizer give them.

Special-token strings typed by users are the one exception: they stay text.

The conversation is rendered whole (`rendering.py`), and what the template leaves out is refused. The runs of text
between special tokens are tokenised with special tokens switched off.
The template's placeholder of an image or a video becomes its tokens, as the model family's format says.
"""

import copy
import datetime
import re
from dataclasses import dataclass, replace

import numpy as np

from fastrm.data.clock import at_date
from fastrm.data.media.format import MediaSize, MediaSpan, VisionFormat
from fastrm.data.record import MediaRef, Message, Response
from fastrm.data.rendering import ChatRenderer, Latest, Rendered, check_not_closed, check_not_rendered, lengthened
from fastrm.data.tokenizer import text_tokenizer
from fastrm.errors import ConfigError, RecordError, option
from fastrm.limits import MediaLimits

REMEMBERED_RUNS = 64  # the number of texts between special tokens whose tokens are remembered
# A text with more characters than so many for each token that is allowed is counted in parts first: tokens have four.
_CHARACTERS_PER_TOKEN = 8
_CHARACTERS_PER_PART = 16_384
_SAMPLE = Response((Message("user", (" Is  1 < 2?\n\n",)), Message("assistant", ("Yes: it is.\n",))))
REMEMBERED_SIZES = 4096  # the number of media whose sizes are remembered; the responses of a group share theirs


@dataclass(frozen=True)
class EncodedResponse:
    """A conversation up to the anchor, which is its last token.

    Attributes:
        tokens: (n,) int64.
        media: its images and videos, in order.
        num_response_tokens: of the response's own text, and of what the template writes for its calls and reasoning.
        positions: (3, n) int64; None: numbered from 0 on all axes.
        turn: (start, stop) of the tokens that a model writes: the last turn's text and the token that ends the turn;
            start = stop for an empty text. None unless the encoder has `turns`.

    An encoder made by `counting_only` leaves `num_response_tokens` 0 and `positions` None.
    """

    tokens: np.ndarray
    media: tuple[MediaSpan, ...]
    num_response_tokens: int
    positions: np.ndarray | None = None
    turn: tuple[int, int] | None = None


@dataclass(frozen=True)
class TurnLoss:
    """The weights of the tokens that a model learns to write.

    Attributes:
        per_token: a text's weight is the number of its tokens, so that every token of a step weighs the same, as in
            supervised fine-tuning; else a text weighs the same however long it is.
        factor: of the loss.
    """

    per_token: bool
    factor: float = 1.0


class ConversationEncoder:
    """An encoder that renders and tokenises conversations for one model, from any number of threads.

    Args:
        tokenizer: a fast transformers tokenizer with a chat template.
        vision: how the model's family reads images and videos, or None for a text model.
        anchor: last_token, end_of_turn or before_padding.
        limits: for opening image files.
        date: for a template that reads the clock; default: that of the template (see clock.py), else today.
        pad_token_id: of the model, for before_padding: conversations end at their last token that is another one.

    Attributes:
        date: that the template is given; None if it does not read the clock.
        counts_responses: tokenise each response's text once more for its length (see `num_text_tokens`).
        turns: the weights of what a model learns to write; None: it writes nothing.

    Raises:
        ConfigError: if our tokens differ from the stock ones on a sample conversation, or if its anchor comes before
            the end of its response.
    """

    def __init__(
        self,
        tokenizer,
        vision: VisionFormat | None = None,
        *,
        anchor: str = "last_token",
        limits: MediaLimits | None = None,
        date: datetime.date | None = None,
        pad_token_id: int | None = None,
    ):
        tokenizer, self.date = at_date(tokenizer, date)
        self.tokenizer = tokenizer
        self.vision = vision
        self.anchor = anchor
        self.limits = limits or MediaLimits()
        self.pad_token_id = pad_token_id
        self.counts_responses = True
        self.turns: TurnLoss | None = None
        self.special_ids = {
            token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        # Longest first: if one special token begins with another, the longer one matches.
        names = sorted(self.special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._renderer = ChatRenderer(tokenizer, self._special, vision)
        self._media_ids = frozenset() if vision is None else frozenset(vision.placeholders.values())
        self._backend = text_tokenizer(tokenizer)
        self._sizes, self._runs = Latest(REMEMBERED_SIZES), Latest(REMEMBERED_RUNS)
        self._counts_only, self._max_tokens = False, None
        self._check_against_stock()

    def encode(self, response: Response) -> EncodedResponse:
        """Tokenise one conversation.

        Raises:
            RecordError: TEMPLATE if the template refuses it or misplaces a medium, UNRENDERED_KEY if it leaves
                something out, ANCHOR if it closes the conversation before the response's end, IMAGE_UNSUPPORTED or
                VIDEO_UNSUPPORTED for a medium that the model does not read, RENDERED_TEMPLATE (see rendering.py),
                SPECIAL_TOKEN if typed text became a medium's token, TOO_LONG for a text that `up_to` does not allow,
                and the codes of `VisionFormat.measure`.
        """
        self._check_supported(response)
        check_not_rendered(response.messages)
        check_not_closed(response.messages, self._closing)
        self._renderer.check_arguments(response)
        rendered = self._renderer.render(response)
        self._renderer.check(response)
        self._check_anchor(response, rendered)
        pieces, spans, length = [], [], 0
        media = iter(response.media)
        for item in self._tokenize(rendered):
            if isinstance(item, int) and item in self._media_ids:
                ref = next(media, None)
                if ref is None or self.vision.placeholders[type(ref)] != item:
                    raise RecordError("TEMPLATE", "the chat template made placeholders other than the record's media")
                item, found = self._media_tokens(item, ref, length)
                spans += found
            elif isinstance(item, int):
                item = [item]
            elif not self._media_ids.isdisjoint(item):
                raise RecordError("SPECIAL_TOKEN", "typed text became an image token; remove it from the text")
            pieces.append(np.asarray(item, dtype=np.int64))
            length += len(item)
        if (ref := next(media, None)) is not None:
            raise RecordError("TEMPLATE", f"the chat template left a {ref.noun} out")
        tokens = np.concatenate(pieces)
        # When counting too: what is refused is refused before a run begins.
        turn = None if self.turns is None else self._turn(response, rendered, length)
        if self.anchor == "before_padding":
            tokens = tokens[: np.flatnonzero(tokens != self.pad_token_id)[-1] + 1]
            length = len(tokens)
            if turn is not None and turn[1] > length:
                raise RecordError(
                    "ANCHOR", "model.anchor: before_padding takes the token that ends a response's turn for padding"
                )
        if self._counts_only:
            return EncodedResponse(tokens, tuple(spans), 0)
        positions = self.vision.positions(length, spans) if spans else None
        num_response_tokens = self._num_response_tokens(response, rendered) if self.counts_responses else 0
        return EncodedResponse(tokens, tuple(spans), num_response_tokens, positions, turn)

    def rendered_text(self, response: Response) -> str:
        """Return a conversation as the chat template renders it, one placeholder for each image and video.

        Raises:
            RecordError: TEMPLATE if the template refuses it.
        """
        rendered = self._renderer.render(response)
        return rendered.mend(rendered.text)

    @property
    def closing(self) -> tuple[str, ...]:
        """The special tokens that end an assistant's turn, as the template writes them or policies do, longest first.
        """
        return self._closing

    def looking_anew(self) -> "ConversationEncoder":
        """Return an encoder of the same tokens without remembered sizes: files may have been replaced."""
        fresh = copy.copy(self)
        fresh._sizes = Latest(REMEMBERED_SIZES)
        return fresh

    def counting_only(self) -> "ConversationEncoder":
        """Return an encoder of the same tokens and media, without what only a pack needs."""
        counter = copy.copy(self)
        counter._counts_only = True
        return counter

    def up_to(self, max_tokens: int) -> "ConversationEncoder":
        """Return an encoder of the same tokens that refuses texts far over a number of tokens at little cost.

        A text of 32 MB can have 16 million tokens, for which the tokenizer takes half a minute and gigabytes.
        """
        bounded = copy.copy(self)
        bounded._max_tokens = max_tokens
        return bounded

    def _media_tokens(self, placeholder: int, ref: MediaRef, start: int) -> tuple[np.ndarray, list[MediaSpan]]:
        """Return the tokens (n,) int64 that replace a placeholder at `start`, and the runs of the medium among them."""
        size, spans, pieces = self.measure(ref), [], []
        for run in self.vision.runs(ref, size):
            before = [*(self._tokenize_runs([run.text])[0] if run.text else ()), *run.opening]
            span = MediaSpan(start + len(before), size, ref, run.planes)
            pieces += [before, np.full(span.num_tokens, placeholder, dtype=np.int64), run.closing]
            start = span.stop + len(run.closing)
            spans.append(span)
        return np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces]), spans

    def num_text_tokens(self, text: str) -> int:
        """Return the number of tokens of a response's own text, for length normalisation."""
        return len(self._tokenize_runs([text])[0])

    def _num_response_tokens(self, response: Response, rendered: Rendered) -> int:
        """Return the number of tokens of the response's text and of its other fields."""
        num_tokens = self.num_text_tokens(response.text)
        if not response.messages[-1].fields:
            return num_tokens
        plain = _with_last(response, replace(response.messages[-1], fields=""))
        lengths = [len(_flat(self._tokenize(one))) for one in (rendered, self._renderer.render(plain))]
        return num_tokens + max(0, lengths[0] - lengths[1])

    def learn_turns(self, turns: TurnLoss | None) -> None:
        """Set `turns`, for a model that writes.

        Raises:
            ConfigError: if the chat template does not show which tokens a model writes, or the anchor cuts them off.
        """
        self.turns = turns
        if turns is not None:
            try:
                self.encode(_SAMPLE)
            except RecordError as error:
                raise ConfigError(f"{error.message}, which a critic or judge has to learn") from None

    def _turn(self, response: Response, rendered: Rendered, length: int) -> tuple[int, int]:
        """Return the (start, stop) of the tokens of the last turn's text, and of the token that ends the turn.

        They are counted from the end of a conversation's `length` tokens, since media, whose placeholders become many
        tokens, lie before them.
        """
        text, (first, last) = self._up_to_anchor(rendered), self._renderer.turn(response, rendered)
        end = next((match.end() for match in self._special.finditer(text) if match.start() >= last), None)
        if end is None:
            why = "the chat template writes no special token behind a response, by which a model ends its text"
            raise RecordError("TEMPLATE", why)
        stop = length - len(_flat(self._tokens_of(text[end:], rendered)))
        if not response.text or self._counts_only:  # counting looks for refusals, which all lie before
            return stop, stop
        whole, prompt = (_flat(self._tokens_of(part, rendered)) for part in (text, rendered.text[:first]))
        # A text that begins with a blank may share a token with the prompt's end.
        common = next((n for n, pair in enumerate(zip(whole, prompt, strict=False)) if pair[0] != pair[1]), len(prompt))
        return min(length - len(whole) + max(1, common), stop), stop

    def measure(self, ref: MediaRef) -> MediaSize:
        """Return the tokens of an image or a video, from headers alone; the latest are remembered.

        Raises:
            RecordError: the codes of `VisionFormat.measure`.
        """
        size = self._sizes.get(ref.key)
        if size is None:
            size = self.vision.measure(ref, self.limits)
            self._sizes.store(ref.key, size)
        return size

    def _check_supported(self, response: Response) -> None:
        for ref in response.media:
            if self.vision is None:
                what, reads = f"{'an' if ref.noun == 'image' else 'a'} {ref.noun}", "reads text only"
            elif type(ref) not in self.vision.placeholders:
                what, reads = f"a {ref.noun}", f"reads no {ref.noun}s"
            else:
                continue
            raise RecordError(f"{ref.noun.upper()}_UNSUPPORTED", f"the record has {what} but the model {reads}")

    def _check_anchor(self, response: Response, rendered: Rendered) -> None:
        """Refuse a conversation whose anchor comes before the response's end.

        Where that may happen, the response is changed: a change must be before the anchor.
        """
        if self.anchor == "end_of_turn" and not self._anchor_follows(response, rendered):
            raise RecordError(
                "ANCHOR",
                "the chat template writes no special token behind the response, so that with model.anchor: end_of_turn "
                "the reward would be read before its end; set model.anchor: last_token",
            )

    def _anchor_follows(self, response: Response, rendered: Rendered) -> bool:
        seen = self._up_to_anchor(rendered)
        return all(
            self._up_to_anchor(self._renderer.render(_with_last(response, longer))) != seen
            for longer in lengthened(response.messages[-1])
        )

    def _up_to_anchor(self, rendered: Rendered) -> str:
        if self.anchor != "end_of_turn":
            return rendered.text
        end = max((match.end() for match in self._special.finditer(rendered.text)), default=len(rendered.text))
        return rendered.text[:end]

    def _tokenize(self, rendered: Rendered) -> list:
        """Return special-token ids (int) and token lists of the text runs between them, in order."""
        return self._tokens_of(self._up_to_anchor(rendered), rendered)

    def _tokens_of(self, text: str, rendered: Rendered) -> list:
        items, at = [], 0
        for match in self._special.finditer(text):
            items += [text[at : match.start()], self.special_ids[match.group()]]
            at = match.end()
        items = [item for item in (*items, text[at:]) if item != ""]
        texts = [rendered.mend(item) for item in items if isinstance(item, str)]
        runs = iter(self._tokenize_runs(texts))
        return [next(runs) if isinstance(item, str) else item for item in items]

    def _tokenize_runs(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of each text by itself. The latest are remembered: responses of a prompt share runs."""
        runs = {text: self._runs.get(text) for text in texts}
        missing = [text for text, tokens in runs.items() if tokens is None]
        if missing:
            self._check_lengths(missing)
            found = self._backend.encode_batch_fast(missing, add_special_tokens=False)
            for text, run in zip(missing, found, strict=True):
                runs[text] = run.ids
                self._runs.store(text, run.ids)
        return [runs[text] for text in texts]

    def _check_lengths(self, texts: list[str]) -> None:
        """Refuse a text that is far over the tokens that are allowed.

        Its parts have a few tokens more than the whole where they are cut, never as many again: one that is refused
        here has too many.

        Raises:
            RecordError: TOO_LONG.
        """
        for text in texts if self._max_tokens is not None else ():
            if len(text) <= _CHARACTERS_PER_TOKEN * self._max_tokens:
                continue
            num_tokens = 0
            for start in range(0, len(text), _CHARACTERS_PER_PART):
                part = text[start : start + _CHARACTERS_PER_PART]
                num_tokens += len(self._backend.encode(part, add_special_tokens=False))
                if num_tokens > 2 * self._max_tokens:
                    raise too_long(self._max_tokens)

    def _check_against_stock(self) -> None:
        """Refuse a tokenizer whose tokens change if a text is cut at special tokens.

        Such a tokenizer treats the start of a string differently.
        """
        response = _SAMPLE
        try:
            rendered = self._renderer.render(response)
        except RecordError as error:
            raise ConfigError(f"{error.message}, which is a sample of a question and an answer; change it") from None
        # What a policy's tokens end with, if they are decoded whole: the end of its turn, and padding behind it.
        closing = self._special.findall(rendered.text.rpartition(response.text.strip())[2])
        closing += {self.tokenizer.eos_token, self.tokenizer.pad_token} & self.special_ids.keys()
        self._closing = tuple(sorted(set(closing), key=len, reverse=True))
        turns = [{"role": message.role, "content": message.text} for message in response.messages]
        stock = self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        if not self._anchor_follows(response, rendered):
            reason = "does not render it" if self.anchor != "end_of_turn" else "writes no special token behind it"
            raise ConfigError(
                f"model.anchor: {self.anchor} comes before the end of the response, since the chat template {reason}; "
                "all responses to a prompt would have one reward: set model.anchor: last_token, or change the template"
            )
        items = self._tokenize(rendered)
        ours = _flat(items)
        if ours != stock[: len(ours)] or (self.anchor != "end_of_turn" and len(ours) != len(stock)):
            raise ConfigError(
                f"{type(self.tokenizer).__name__}: tokens cut at special tokens differ from the tokenizer's own on a "
                "sample conversation, so training on it would not be exact; use the model's fast tokenizer"
            )


def too_long(max_tokens: int) -> RecordError:
    """Return the refusal of a group that is so far over its limit that its tokens were not all counted."""
    limit = f"limit {max_tokens:,}; raise {option('tokens_per_pack')}"
    return RecordError("TOO_LONG", f"the group has more than {max_tokens:,} tokens, {limit}")


def _with_last(response: Response, message: Message) -> Response:
    return replace(response, messages=(*response.messages[:-1], message))


def _flat(items: list) -> list[int]:
    return [token for item in items for token in (item if isinstance(item, list) else [item])]
