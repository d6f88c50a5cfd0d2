"""Texts of a model that transformers loads into this process."""

from collections.abc import Iterator, Sequence

import torch

from fastrm.data.record import Message
from fastrm.errors import ConfigError
from fastrm.grpo.config import PolicySection
from fastrm.grpo.policy import encode, is_visual, load_policy
from fastrm.grpo.questions import Question
from fastrm.judge.endpoint import Written
from fastrm.judge.questions import JudgeQuestion
from fastrm.model.network import pick_device
from fastrm.prompts.spec import DecodingSection, GeneratorSection


class LocalModel:
    """A writer of texts by `generate`, some at a time: the language model of a folder or of the hub."""

    def __init__(self, generator: GeneratorSection, decoding: DecodingSection):
        """Load the model: on a GPU in bfloat16, else in float32.

        Raises:
            ConfigError: for files that are no language model.
        """
        try:
            model, self._processor = load_policy(PolicySection(path=generator.model), [], 0)
        except ConfigError as error:  # a policy is what `fastrm grpo` calls such a model
            raise ConfigError(str(error).replace("policy.path", "generator.model")) from None
        device = pick_device("auto")
        self._model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
        self._batch, self._decoding = generator.batch, decoding

    def write(self, questions: Sequence[JudgeQuestion]) -> Iterator[Written]:
        """Yield each question with its text, batch by batch.

        A text that is drawn depends on the seed and on its batch.

        Raises:
            ConfigError: for a question with an image if the model reads none.
        """
        decoding, tokenizer = self._decoding, getattr(self._processor, "tokenizer", self._processor)
        drawn = {"do_sample": True, "temperature": decoding.temperature} if decoding.temperature else {}
        for start in range(0, len(questions), self._batch):
            batch = questions[start : start + self._batch]
            if not is_visual(self._processor) and (seen := next((one for one in batch if one.images), None)):
                raise ConfigError(
                    f"generator.model: a text model, but {seen.origin} has an image; name a model that reads images"
                )
            torch.manual_seed(decoding.seed + int(batch[0].key[:8], 16))
            inputs = encode(self._processor, [_as_question(one) for one in batch]).to(self._model.device)
            with torch.inference_mode():
                tokens = self._model.generate(
                    **inputs, max_new_tokens=decoding.max_tokens, pad_token_id=tokenizer.pad_token_id,
                    **(drawn or {"do_sample": False}),
                )  # fmt: skip
            texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            yield from zip(batch, texts, strict=True)


def _as_question(question: JudgeQuestion) -> Question:
    system = (Message("system", (question.system,)),) if question.system else ()
    return Question((*system, Message("user", (*question.images, question.text))), "", question.origin)
