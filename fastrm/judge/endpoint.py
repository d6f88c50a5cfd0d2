"""Texts from an OpenAI-compatible server: /v1/chat/completions of vLLM, SGLang or a vendor."""

import os
import queue
import threading
from collections.abc import Iterator, Sequence

import httpx

from fastrm.data.media.images import image_size, read_bytes
from fastrm.errors import ConfigError, FastrmError, RecordError, ServerError
from fastrm.judge.questions import JudgeQuestion, Refusal, TextSize, Written
from fastrm.limits import MediaLimits
from fastrm.prompts.spec import DecodingSection, GeneratorSection
from fastrm.rl.client import LOST, MAX_WAIT, check_url, post_whole, retry_after
from fastrm.rl.wire import image_url

# The longest Retry-After that is waited for, in seconds.
LONGEST_WAIT = 600.0
# The server is away, overloaded, or wants fewer requests, as it says with 5xx too: the next try may succeed.
_AGAIN = frozenset({408, 425, 429})
# What was sent is refused, as a prompt that is too long or filtered: another question may be answered.
_OF_THE_QUESTION = frozenset({400, 413, 422})
# Why a text ended, as servers of this API say it: by itself (eos is Together's word, the last two those of
# text-generation-inference), in its middle (model_length is Mistral's word, repetition vLLM's), or without a text that
# answers. All others, as abort, error or none, end an answer that broke off.
_ENDED = frozenset({"stop", "eos", "eos_token", "stop_sequence"})
_CUT = frozenset({"length", "model_length", "repetition"})
_NO_ANSWER = frozenset({"content_filter", "tool_calls", "function_call"})


class _TryAgain(Exception):
    """The reason why a try gave no answer; the next may succeed, `seconds` later or more.

    `is_there` says whether the server said anything.
    """

    def __init__(self, why: str, seconds: float = 0.0, *, is_there: bool = True):
        super().__init__(why)
        self.seconds, self.is_there = seconds, is_there


class _Unanswered(ServerError):
    """A question had no answer in all tries, from a server that is there."""

    def __init__(self, message: str, refusal: Refusal):
        super().__init__(message)
        self.refusal = refusal


class Endpoint:
    """A writer of texts by URL, several at a time.

    A server that is away, says so (429, 5xx), or breaks off an answer is asked again, `tries` times in all, after a
    time that doubles and is no shorter than its Retry-After. What it refuses is not asked again. A question that fails
    each time, while others are answered before and after it, is the server's fault with this question: it is left out.
    """

    def __init__(
        self,
        generator: GeneratorSection,
        decoding: DecodingSection,
        limits: MediaLimits = MediaLimits(),
    ):
        """Choose a server; nothing is sent yet.

        Args:
            limits: of the images that are sent.

        Raises:
            ConfigError: for a URL that is none.
        """
        check_url(generator.url, "generator.url")
        self._place = generator.url.rstrip("/") + "/chat/completions"
        self._settings, self._limits = generator, limits
        self._body = {
            "model": generator.model, "max_tokens": decoding.max_tokens, "temperature": decoding.temperature,
        }  # fmt: skip
        self._seed = decoding.seed if decoding.temperature else None

    def write(self, questions: Sequence[JudgeQuestion]) -> Iterator[Written | Refusal]:
        """Yield the text of each question, as answers come, or why it has none.

        That is an image that cannot be read or is over the limits, or a request that the server refuses for what it
        holds: HTTP 400, 413, 422, or a text that its filter took away, or at which it fails in all tries while it
        answers others.

        Raises:
            ConfigError: for a key that no header can hold.
            ServerError: when a question has no answer after all tries, the server wants to be left alone for longer
                than `LONGEST_WAIT`, or refuses all requests, as without a key; those that are answered meanwhile are
                yielded before.
        """
        key = os.environ.get(self._settings.key_env)
        self._stopped = threading.Event()
        if not (key or "").isascii():
            said = "the key has signs that are not ASCII, which no header can hold; set it again"
            raise ConfigError(f"{self._settings.key_env}: {said}")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=self._settings.batch)
        answers: queue.SimpleQueue[Written | Refusal | Exception] = queue.SimpleQueue()
        waiting, running, failed = list(reversed(questions)), 0, None
        was_answered, doubtful = False, []  # those that failed since the last that was answered
        with httpx.Client(timeout=self._settings.timeout, headers=headers, limits=limits) as client:
            try:
                while running or (waiting and failed is None):
                    while waiting and failed is None and running < self._settings.batch:
                        # Whoever stops, as with Ctrl-C, waits for none of them: a process ends with such threads.
                        asking = (client, waiting.pop(), answers)
                        threading.Thread(target=self._answer, args=asking, daemon=True).start()
                        running += 1
                    answer = answers.get()
                    running -= 1
                    if isinstance(answer, Written | Refusal):
                        yield answer
                        was_answered = was_answered or isinstance(answer, Written)
                        if isinstance(answer, Written):
                            yield from (one.refusal for one in doubtful)
                            doubtful = []
                    elif isinstance(answer, _Unanswered) and was_answered and failed is None and self._may_go_on(
                        answer, doubtful
                    ):
                        doubtful.append(answer)  # the next answers say whether the server or the question is to blame
                    elif isinstance(answer, FastrmError):
                        failed = failed or (doubtful[0] if doubtful else answer)
                        self._stopped.set()
                    else:
                        raise answer
            finally:
                self._stopped.set()
        if failed is not None:
            raise failed
        yield from (one.refusal for one in doubtful)

    def _may_go_on(self, answer: _Unanswered, doubtful: Sequence[_Unanswered]) -> bool:
        """Return whether no more rows failed than are asked about at a time: all questions of one may fail."""
        rows = {one.refusal.question.id for one in (*doubtful, answer)}
        return len(rows) <= self._settings.batch

    def _answer(self, client: httpx.Client, question: JudgeQuestion, answers: queue.SimpleQueue) -> None:
        """Put the text of a question, or what there is instead of it, into `answers`."""
        try:
            answers.put(self._ask(client, question))
        except Exception as error:  # raised by the one who waits
            answers.put(error)

    def _ask(self, client: httpx.Client, question: JudgeQuestion) -> Written | Refusal:
        place = f"{self._place}: {question.origin}"
        try:
            body = self._body | {"messages": _messages(question, self._limits)}
        except RecordError as error:
            return Refusal(question, f"{error.message} ({error.code})")
        if self._seed is not None:  # each vote draws its own text
            body["seed"] = (self._seed + int(question.key[:8], 16)) % 2**31
        body |= self._settings.extra_body
        body = {name: value for name, value in body.items() if value is not None}
        for tried in range(1, self._settings.tries + 1):
            try:
                return self._try(client, question, body)
            except _TryAgain as error:
                said, asked, is_there = str(error), error.seconds, error.is_there
            if asked > LONGEST_WAIT:
                raise ServerError(
                    f"{place}: {said}; the server wants to be asked again in {asked:,.0f} s, and up to "
                    f"{LONGEST_WAIT:,.0f} s are waited for: run the command again then to go on where it ended"
                )
            grown = min(0.5 * 2.0 ** min(tried - 1, 9), MAX_WAIT)
            if tried < self._settings.tries and self._stops_within(max(asked, grown)):
                raise ServerError(f"{place}: not asked again, as others failed")
        why = f"no answer in {self._settings.tries} tries, at last {said}"
        message = f"{place}: {why}; is the server running? Run the command again to go on where it ended"
        raise _Unanswered(message, Refusal(question, f"{self._place}: {why}")) if is_there else ServerError(message)

    def _stops_within(self, seconds: float) -> bool:
        """Wait, and return whether there is no use in going on."""
        return self._stopped.wait(seconds)

    def _try(self, client: httpx.Client, question: JudgeQuestion, body: dict) -> Written | Refusal:
        """Ask once.

        Raises:
            _TryAgain: where another try may succeed.
            ServerError: where none will, with this question or another.
        """
        try:
            answer = post_whole(client, self._place, self._settings.timeout, json=body)
        except LOST as error:
            raise _TryAgain(f"{type(error).__name__}: {error}", is_there=False) from None
        if answer.status_code == 200:
            return self._read(answer, question)
        said = f"HTTP {answer.status_code}: {answer.text.strip()[:500] or answer.reason_phrase}"
        if answer.status_code in _OF_THE_QUESTION:
            return Refusal(question, f"{self._place}: {said}")
        if answer.status_code >= 500 or answer.status_code in _AGAIN:
            raise _TryAgain(said, retry_after(answer))
        raise ServerError(f"{self._place}: {question.origin}: {said}; correct the SPEC or its key")

    def _read(self, answer: httpx.Response, question: JudgeQuestion) -> Written | Refusal:
        """Return what an answer with status 200 holds.

        Raises:
            _TryAgain: for half an answer, or one that broke off.
        """
        try:
            found = answer.json()
            choice = found["choices"][0]
            ended = choice.get("finish_reason")
            if ended in _NO_ANSWER:
                return Refusal(question, f"{self._place}: the answer ended with {ended!r}, and has no whole text")
            text = _text(choice["message"]["content"])
            is_known = ended in _ENDED | _CUT
            size = _size(found.get("usage"))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _TryAgain(f"half an answer, or none of this API: {answer.text[:200]!r}") from None
        if not is_known:
            raise _TryAgain(f"an answer that broke off, with finish_reason {ended!r}: {text[:200]!r}")
        return Written(question, text, ended in _CUT, size)


def _text(content: object) -> str:
    """Return the text of a message's content: of a text, of none at all, or of parts that are texts.

    Raises:
        TypeError, KeyError: for anything else.
    """
    if isinstance(content, list):
        content = "".join([part["text"] if part["type"] == "text" else None for part in content])
    if not isinstance(content, str | None):
        raise TypeError
    return content or ""


def _size(usage: object) -> TextSize | None:
    counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    return TextSize(*counts) if counts and all(isinstance(count, int) for count in counts) else None


def _messages(question: JudgeQuestion, limits: MediaLimits) -> list[dict]:
    """Return the conversation, with images as data URLs.

    Raises:
        RecordError: for an image that cannot be read, or is over the limits.
    """
    urls = []
    for image in question.images:
        image_size(image, limits)
        urls.append(image_url(read_bytes(image, limits)))
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": question.text}] if parts else question.text
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, {"role": "user", "content": content}]
