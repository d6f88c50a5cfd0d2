"""Policies: loaded, or made at random; their supervised start; and what they answer."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fastrm.config import ModelConfig
from fastrm.data.media.images import decode_image
from fastrm.data.record import Message
from fastrm.data.tokenizer import load_tokenizer, train_tokenizer
from fastrm.errors import ConfigError, DataError, RecordError
from fastrm.grpo.config import FitSection, PolicySection
from fastrm.grpo.questions import Question
from fastrm.limits import MediaLimits
from fastrm.model.families import FAMILIES, VISION_FAMILIES, chat_layout
from fastrm.model.loading import shortened
from fastrm.model.network import init_backbone
from fastrm.model.paradigms import stored_paradigm
from fastrm.model.places import locate

_HEAD = re.compile(r"(.*\.)?(score|v_head)\.")  # names of a reward head's weights


def load_policy(settings: PolicySection, questions: Sequence[Question], seed: int):
    """Return a policy and its processor; of a text model, its tokenizer.

    Args:
        questions: what the tokenizer of a random policy is trained on.

    Raises:
        ConfigError: for a folder or a family that cannot be used.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging as library

    if settings.init is not None:
        torch.manual_seed(seed)
        texts = [(*question.messages, Message("assistant", (question.lesson,))) for question in questions]
        layout = chat_layout(settings.init["model_type"])
        tokenizer = train_tokenizer(texts, settings.tokenizer.train_vocab_size, layout)
        config = init_backbone(ModelConfig(init=settings.init, tokenizer="trained"), tokenizer, "policy.init").config
        kind = AutoModelForImageTextToText if config.model_type in VISION_FAMILIES else AutoModelForCausalLM
        return kind.from_config(config), _processor(settings, None, tokenizer, config.model_type)
    folder, spoken = _folder(settings.path), library.get_verbosity()
    library.set_verbosity_error()  # weights without a place are named below, and those of a critic's head have none
    try:
        config = AutoConfig.from_pretrained(folder)
        kind = AutoModelForImageTextToText if config.model_type in VISION_FAMILIES else AutoModelForCausalLM
        policy, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # damaged files may raise anything, deep inside transformers
        raise ConfigError(f"policy.path: {settings.path!r} cannot be loaded: {error}") from error
    finally:
        library.set_verbosity(spoken)
    _check_weights(settings.path, found)
    tokenizer = load_tokenizer(folder, "policy.path")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as TRL does; padding is masked
    try:
        return policy, _processor(settings, folder, tokenizer, config.model_type)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"policy.path: {settings.path!r}: its image processor cannot be loaded: {error}") from error


def _folder(path: str) -> str:
    """Return the folder or hub id of a policy's files.

    Raises:
        ConfigError: for a path that does not exist, or an adapter, which transformers would leave out or train alone.
    """
    try:
        place = locate(path)
    except ConfigError as error:
        raise ConfigError(f"policy.path: {error}") from None
    if place.adapter is not None:
        raise ConfigError(
            f"policy.path: {path!r} is an adapter, wanted a whole policy; save the model that PEFT's merge_and_unload "
            f"makes, or of an adapter of fastrm: fastrm export {path} --out MERGED; and name that folder"
        )
    return place.base


def _check_weights(path: str, found: dict) -> None:
    """Refuse files that are no whole policy: what they lack, transformers draws at random."""
    missing, heads = sorted(found["missing_keys"]), [name for name in found["unexpected_keys"] if _HEAD.match(name)]
    if missing or (heads and stored_paradigm(path) is None):  # a critic writes, and has a head besides
        what = f"lacks {shortened(missing)}" if missing else f"has a reward head ({heads[0]})"
        raise ConfigError(
            f"policy.path: {path!r} {what}, as a reward model does, and is no policy; name the language model that it "
            "was made of"
        )


def _processor(settings: PolicySection, folder: str | None, tokenizer, model_type: str):
    """Return the processor of a policy: its tokenizer alone for text, for a model that reads images these too.

    Without torchvision there is no stock processor of such a model, as its part for videos needs it; the family may
    have one for pictures, which do not.
    """
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    tokenizer.padding_side = "left"
    if model_type not in VISION_FAMILIES:
        return tokenizer
    limits = {name: value for name in ("min_pixels", "max_pixels") if (value := getattr(settings, name)) is not None}
    if folder is not None and is_torchvision_available():
        processor = AutoProcessor.from_pretrained(folder, padding_side="left", **limits)
        if not is_visual(processor):
            raise ConfigError(
                f"policy.path: {settings.path!r} is a {model_type}, and transformers finds no image processor in it; "
                "copy processor_config.json or preprocessor_config.json from the model that it was made of"
            )
        return processor
    processor = FAMILIES[model_type].image_processor(tokenizer, folder, limits)
    if processor is None:
        raise ConfigError(f"policy: {model_type} needs torchvision for its processor; install that of your torch")
    return processor


def is_visual(processor) -> bool:
    """Return whether a processor reads images too, or is a tokenizer alone."""
    return hasattr(processor, "image_processor")


def fit(
    policy, processor, questions: Sequence[Question], settings: FitSection, seed: int, update: Callable[[int], None]
) -> None:
    """Train a policy on true answers: cross entropy of the answer's tokens, AdamW, batches drawn without order.

    Args:
        update: called with the number of steps done.
    """
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=0.0)
    random = np.random.default_rng(seed)
    tokenizer = getattr(processor, "tokenizer", processor)
    for step in range(settings.steps):
        batch = [questions[n] for n in random.choice(len(questions), settings.batch)]
        answers = [question.lesson + tokenizer.eos_token for question in batch]
        inputs = encode(processor, batch, answers).to(policy.device)
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, answer in enumerate(answers):
            count = len(tokenizer(answer, add_special_tokens=False)["input_ids"])  # at the end: padding is on the left
            labels[row, -count:] = inputs["input_ids"][row, -count:]
        loss = policy(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update(step + 1)


def encode(
    processor,
    questions: Sequence[Question],
    answers: Sequence[str] | None = None,
    limits: MediaLimits = MediaLimits(),
):
    """Return the inputs of a batch of prompts, padded on the left, with answers behind them if there are any.

    Raises:
        DataError: for an image that cannot be read, or is over the limits.
    """
    prompts = [question.prompt(is_visual(processor)) for question in questions]
    texts = [processor.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in prompts]
    texts = [text + answer for text, answer in zip(texts, answers or [""] * len(texts), strict=True)]
    options = {"text": texts, "padding": True, "return_tensors": "pt", "padding_side": "left"}
    if not is_visual(processor):
        return processor(**options, add_special_tokens=False)
    images = [_decoded(question, limits) for question in questions]
    return processor(**options, **({"images": images} if any(images) else {}))


def _decoded(question: Question, limits: MediaLimits) -> list:
    try:
        return [decode_image(ref, limits) for ref in question.images]
    except RecordError as error:
        raise DataError(f"{question.origin}: {error.message} ({error.code})") from None


@torch.no_grad()
def answer(policy, processor, questions: Sequence[Question], max_tokens: int, batch: int = 64) -> list[str]:
    """Return what a policy answers when it always takes the likeliest token."""
    return [text for text, _ in answers_and_cuts(policy, processor, questions, max_tokens, batch)]


def answers_and_cuts(
    policy, processor, questions: Sequence[Question], max_tokens: int, batch: int = 64
) -> list[tuple[str, bool]]:
    """Return the answers of `answer`, each with True if it ended at `max_tokens`, in the middle."""
    policy.eval()
    tokenizer, found = getattr(processor, "tokenizer", processor), []
    for first in range(0, len(questions), batch):
        inputs = encode(processor, questions[first : first + batch]).to(policy.device)
        tokens = write_tokens(policy, tokenizer, inputs, max_tokens)
        ended = torch.isin(tokens, torch.tensor(end_tokens(policy, tokenizer), device=tokens.device)).any(1)
        found += zip(tokenizer.batch_decode(tokens, skip_special_tokens=True), (~ended).tolist(), strict=True)
    return found


def end_tokens(policy, tokenizer) -> list[int]:
    """Return the tokens that end a text: those of the model's generation_config.json and of its tokenizer."""
    said = policy.generation_config.eos_token_id
    return sorted({*(said if isinstance(said, list) else [said]), tokenizer.eos_token_id} - {None})


def write_tokens(policy, tokenizer, inputs, max_tokens: int, temperature: float = 0.0) -> torch.Tensor:
    """Return the tokens (batch, longest text) that a model writes behind prompts, padded behind their ends.

    Temperature 0 takes the likeliest token, any other draws from all tokens. Of the model's generation_config.json only
    the tokens that end a text count: its top_k, repetition_penalty and the like would change what is measured.
    """
    from transformers import GenerationConfig

    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    settings = GenerationConfig(
        max_new_tokens=max_tokens, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(policy, tokenizer) or None, **(drawn if temperature else {"do_sample": False}),
    )  # fmt: skip
    own = policy.generation_config
    policy.generation_config = GenerationConfig()  # `generate` takes from it whatever `settings` leave open
    try:
        tokens = policy.generate(**inputs, generation_config=settings)
    finally:
        policy.generation_config = own
    return tokens[:, inputs["input_ids"].shape[1] :]


def save_policy(policy, processor, folder: Path) -> None:
    """Save a policy with its processor, as `from_pretrained` reads them."""
    policy.save_pretrained(folder)
    processor.save_pretrained(folder)
