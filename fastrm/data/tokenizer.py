"""Tokenizers: load one that exists, or train a small one offline for models that start at random.

The trained one is byte-level BPE with Qwen2.5-VL's pre-tokenisation, special tokens and chat layout, or
InternVL's, so that everything downstream is the same as for the published models.
"""

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastrm.data.record import Message
from fastrm.errors import ConfigError

# Files of which a tokenizer has one; the others are older forms, from which transformers makes the first.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")

# The order fixes the ids. Source: the Qwen2.5-VL tokenizer's added tokens.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The pattern by which Qwen2 splits text before BPE (its published tokenizer.json).
_PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

DEFAULT_SYSTEM = "You are a helpful assistant."

# Qwen2.5-VL's layout: a default system turn, <|im_start|>role ... <|im_end|> turns, images and videos in place.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\\n@SYSTEM@<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
""".replace("@SYSTEM@", DEFAULT_SYSTEM)


# InternVL's layout: the same turns without a default one; an image is followed by a line break.
INTERNVL_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{{ '<IMG_CONTEXT>\\n' if part.type == 'image' else part.text }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


class ChatLayout(NamedTuple):
    """The way in which a family writes conversations.

    Attributes:
        special_tokens: in the order of their ids.
        template: for transformers' `apply_chat_template`.
        default_system: text of the system turn of a conversation without one; None: no such turn.
    """

    special_tokens: tuple[str, ...]
    template: str
    default_system: str | None


CHAT_LAYOUTS = {
    "qwen": ChatLayout(SPECIAL_TOKENS, CHAT_TEMPLATE, DEFAULT_SYSTEM),
    # Source: the InternVL3 tokenizer's added tokens, less those for boxes and quotations.
    "internvl": ChatLayout((*SPECIAL_TOKENS, "<img>", "</img>", "<IMG_CONTEXT>"), INTERNVL_TEMPLATE, None),
}


def train_tokenizer(conversations: Iterable[Sequence[Message]], vocab_size: int, layout: str = "qwen"):
    """Train a byte-level BPE on conversations as the template renders them; deterministic.

    The template's own words are counted too: they stand in every conversation, and spelt out in
    bytes the default system turn would be the longest part of a short one.

    Args:
        layout: a key of CHAT_LAYOUTS.
    """
    chat = CHAT_LAYOUTS[layout]
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(chat.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_plain_rendering(turns, chat) for turns in conversations), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat.template,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def _plain_rendering(turns: Sequence[Message], chat: ChatLayout) -> str:
    """Render a conversation by the template, without the special tokens."""
    has_system = turns[0].role == "system" or chat.default_system is None
    system = "" if has_system else f"system\n{chat.default_system}\n"
    return system + "".join(f"{turn.role}\n{turn.text}\n" for turn in turns)


def special_id(tokenizer, token: str) -> int | None:
    """Return the id of a special token; None if the tokenizer lacks it."""
    known = tokenizer.added_tokens_decoder.items()
    return next((number for number, added in known if added.special and added.content == token), None)


def load_tokenizer(path: str, setting: str = "model.tokenizer"):
    """Load a fast tokenizer with a chat template, from a folder or the hub.

    Args:
        setting: that names the path, for messages.

    Raises:
        ConfigError: if there is none, or it cannot render a conversation.
    """
    from transformers import AutoTokenizer

    if os.path.isdir(path) and not any(os.path.isfile(os.path.join(path, name)) for name in _VOCABULARIES):
        # transformers would make one without a vocabulary for some families.
        raise ConfigError(
            f"{setting} {path!r}: the folder has no tokenizer, wanted tokenizer.json and tokenizer_config.json; "
            "copy them from the model that this one was made of"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{setting} {path!r}: cannot be loaded ({reason}); wanted a folder with tokenizer.json "
            "and tokenizer_config.json, or a reachable hub id"
        ) from None
    except Exception as error:  # files of another shape may raise anything, deep inside transformers
        raise ConfigError(
            f"{setting} {path!r}: transformers cannot read its files ({type(error).__name__}: {error}); copy "
            "tokenizer.json and tokenizer_config.json again"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{setting} {path!r}: is a slow tokenizer; convert it to tokenizer.json")
    if not tokenizer.chat_template:
        raise ConfigError(f"{setting} {path!r}: has no chat template; add chat_template.jinja to the folder")
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise ConfigError(
            f"{setting} {path!r}: has the chat templates {names}, and none is the default; save "
            "the one to use as chat_template.jinja in the folder"
        )
    return tokenizer


def text_tokenizer(tokenizer):
    """Return a tokenizer of the tokenizers library that reads special tokens as text; threads may share it.

    It is a copy, whose settings are never changed again. transformers changes those of its own tokenizer in every
    call, which fails ("Already borrowed") while another thread tokenises, or changes what that thread finds.
    Its calls also spend as long again on copies and checks.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend
