"""Texts from an OpenAI-compatible server: /v1/chat/completions of vLLM, SGLang or a vendor."""

import os
import queue
import threading
from collections.abc import Iterator, Sequence

import httpx

from fastrm.data.media.images import read_bytes
from fastrm.errors import DataError, FastrmError, RecordError, ServerError
from fastrm.judge.questions import JudgeQuestion, TextSize, Written
from fastrm.limits import MediaLimits
from fastrm.prompts.spec import DecodingSection, GeneratorSection
from fastrm.rl.client import MAX_WAIT, check_url
from fastrm.rl.wire import image_url

# The server is away, overloaded, or wants fewer requests: the next try may succeed.
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class Endpoint:
    """A writer of texts by URL, several at a time.

    A server that is away, says so (429, 5xx), or breaks off an answer is asked again, `tries` times in all, after a
    time that doubles and is no shorter than its Retry-After. What it refuses is not asked again.
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

    def write(self, questions: Sequence[JudgeQuestion]) -> Iterator[Written]:
        """Yield the text of each question, as answers come.

        Raises:
            ServerError: when a question has no answer after all tries, or is refused; those that are answered meanwhile
                are yielded before.
            DataError: for an image that cannot be read, in the same way.
        """
        key = os.environ.get(self._settings.key_env)
        self._stopped = threading.Event()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=self._settings.batch)
        answers: queue.SimpleQueue[Written | Exception] = queue.SimpleQueue()
        waiting, running, failed = list(reversed(questions)), 0, None
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
                    if isinstance(answer, Written):
                        yield answer
                    elif isinstance(answer, FastrmError):
                        failed = failed or answer
                        self._stopped.set()
                    else:
                        raise answer
            finally:
                self._stopped.set()
        if failed is not None:
            raise failed

    def _answer(self, client: httpx.Client, question: JudgeQuestion, answers: queue.SimpleQueue) -> None:
        """Put the text of a question, or the error instead of it, into `answers`."""
        try:
            answers.put(self._ask(client, question))
        except Exception as error:  # raised by the one who waits
            answers.put(error)

    def _ask(self, client: httpx.Client, question: JudgeQuestion) -> Written:
        body = self._body | {"messages": _messages(question, self._limits)}
        if self._seed is not None:  # each vote draws its own text
            body["seed"] = (self._seed + int(question.key[:8], 16)) % 2**31
        for tried in range(1, self._settings.tries + 1):
            asked = 0.0
            try:
                answer = client.post(self._place, json=body)
            except httpx.TransportError as error:
                said = f"{type(error).__name__}: {error}"
            else:
                if answer.status_code == 200:
                    try:
                        found = answer.json()
                        choice = found["choices"][0]
                        text, is_cut = _text(choice["message"]["content"]), choice.get("finish_reason") == "length"
                        return Written(question, text, is_cut, _size(found.get("usage")))
                    except (ValueError, LookupError, TypeError, AttributeError):
                        said = f"half an answer, or none of this API: {answer.text[:200]!r}"
                else:
                    said = f"HTTP {answer.status_code}: {answer.text.strip()[:500] or answer.reason_phrase}"
                    if answer.status_code not in _AGAIN:
                        raise ServerError(f"{self._place}: {question.origin}: {said}; correct the SPEC or the row")
                after = answer.headers.get("Retry-After", "")
                asked = float(after) if after.isascii() and after.isdigit() else 0.0
            seconds = min(max(asked, 0.5 * 2.0 ** min(tried - 1, 9)), MAX_WAIT)
            if tried < self._settings.tries and self._stopped.wait(seconds):
                raise ServerError(f"{self._place}: {question.origin}: not asked again, as others failed")
        raise ServerError(
            f"{self._place}: {question.origin}: no answer in {self._settings.tries} tries, at last {said}; is the "
            "server running? Run the command again to go on where it ended"
        )


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
        DataError: for an image that cannot be read.
    """
    try:
        urls = [image_url(read_bytes(image, limits)) for image in question.images]
    except RecordError as error:
        raise DataError(f"{question.origin}: {error.message} ({error.code})") from None
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": question.text}] if parts else question.text
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, {"role": "user", "content": content}]
