"""Texts of a model that transformers loads into this process."""

import itertools
from collections.abc import Iterator, Sequence

import torch

from fastrm.data.media.images import decode_image
from fastrm.errors import ConfigError, RecordError
from fastrm.evaluate.reward_model import DTYPES
from fastrm.grpo.config import PolicySection
from fastrm.grpo.policy import encode, end_tokens, is_visual, load_policy, write_tokens
from fastrm.grpo.questions import Question
from fastrm.judge.questions import JudgeQuestion, Refusal, TextSize, Written
from fastrm.limits import MediaLimits
from fastrm.model.network import pick_device
from fastrm.prompts.spec import DecodingSection, GeneratorSection


class LocalModel:
    """A writer of texts by `generate`, some at a time: the language model of a folder or of the hub."""

    def __init__(
        self,
        generator: GeneratorSection,
        decoding: DecodingSection,
        device: str = "auto",
        dtype: str = "auto",
        limits: MediaLimits = MediaLimits(),
    ):
        """Load the model.

        Args:
            device: as for `RewardModel.from_pretrained`.
            dtype: fp32, bf16, fp16, or auto: bf16 on a GPU, else fp32.
            limits: of the images that it is shown.

        Raises:
            ConfigError: for files that are no language model, or a device that is not there.
        """
        target = pick_device(device)
        if dtype == "auto":
            dtype = "bf16" if target.type == "cuda" else "fp32"
        try:
            model, self._processor = load_policy(PolicySection(path=generator.model), [], 0)
        except ConfigError as error:  # a policy is what `fastrm grpo` calls such a model
            raise ConfigError(str(error).replace("policy.path", "generator.model")) from None
        self._model = model.to(target, DTYPES[dtype]).eval()
        self._batch, self._decoding, self._limits = generator.batch, decoding, limits
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._ends = torch.tensor(end_tokens(self._model, self._tokenizer), device=target)

    def write(self, questions: Sequence[JudgeQuestion]) -> Iterator[Written | Refusal]:
        """Yield the text of each question, batch by batch, or why it has none: an image that it cannot be shown.

        A text that is drawn depends on the seed and on its batch.

        Raises:
            ConfigError: for a question with an image if the model reads none.
        """
        for start in range(0, len(questions), self._batch):
            batch = questions[start : start + self._batch]
            if not is_visual(self._processor) and (seen := next((one for one in batch if one.images), None)):
                raise ConfigError(
                    f"generator.model: a text model, but {seen.origin} has an image; name a model that reads images"
                )
            shown = []
            for question in batch:
                if (refusal := self._refusal(question)) is None:
                    shown.append(question)
                else:
                    yield refusal
            if shown:
                yield from self._write(shown)

    def _refusal(self, question: JudgeQuestion) -> Refusal | None:
        # What can be read is read again to be shown, which takes little beside writing about it.
        try:
            for image in question.images:
                self._processor.image_processor(decode_image(image, self._limits), return_tensors="pt")
        except RecordError as error:
            return Refusal(question, f"{error.message} ({error.code})")
        except ValueError as error:  # as of one that is 200 times as wide as it is high
            return Refusal(question, f'image "{image}" is none for this model: {error}; leave the row out')
        return None

    def _write(self, batch: Sequence[JudgeQuestion]) -> Iterator[Written]:
        decoding, tokenizer = self._decoding, self._tokenizer
        torch.manual_seed(decoding.seed + int(batch[0].key[:8], 16))
        shown = [Question(question.messages, "", question.origin) for question in batch]
        inputs = encode(self._processor, shown, limits=self._limits).to(self._model.device)
        with torch.inference_mode():
            tokens = write_tokens(self._model, tokenizer, inputs, decoding.max_tokens, decoding.temperature)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        is_end = torch.isin(tokens, self._ends)
        ended = is_end.any(1)
        written = torch.where(ended, is_end.int().argmax(1) + 1, tokens.shape[1])
        image_id = getattr(self._model.config, "image_token_id", None)
        of_images = (inputs["input_ids"] == (-1 if image_id is None else image_id)).sum(1)
        sizes = zip(inputs["attention_mask"].sum(1).tolist(), written.tolist(), of_images.tolist(), strict=True)
        yield from map(Written, batch, texts, (~ended).tolist(), itertools.starmap(TextSize, sizes))

    @property
    def config(self):
        """The model's transformers config."""
        return self._model.config

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self._model.device
