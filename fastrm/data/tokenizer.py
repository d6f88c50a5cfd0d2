"""Tokenizers: load one that exists, or train a small one offline for models that start at random.

The trained one is byte-level BPE with Qwen2.5-VL's pre-tokenisation, special tokens and chat layout,
so that everything downstream is the same as for the published models.
"""

from collections.abc import Iterable, Sequence

from fastrm.data.record import Message
from fastrm.errors import ConfigError

# Order fixes the ids. Source: the Qwen2.5-VL tokenizer's added tokens.
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

# How Qwen2 splits text before BPE (its published tokenizer.json).
_PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

DEFAULT_SYSTEM = "You are a helpful assistant."

# Qwen2.5-VL's layout: a default system turn, <|im_start|>role ... <|im_end|> turns, images in place.
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


def train_tokenizer(conversations: Iterable[Sequence[Message]], vocab_size: int):
    """Byte-level BPE over conversations as the template renders them; deterministic.

    The template's own words are counted too: they stand in every conversation, and spelt out in
    bytes the default system turn would be the longest part of a short one.
    """
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
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_plain_rendering(turns) for turns in conversations), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def _plain_rendering(turns: Sequence[Message]) -> str:
    """What CHAT_TEMPLATE makes of a conversation, less the special tokens."""
    system = "" if turns[0].role == "system" else f"system\n{DEFAULT_SYSTEM}\n"
    return system + "".join(f"{turn.role}\n{turn.text}\n" for turn in turns)


def load_tokenizer(path: str):
    """A fast tokenizer with a chat template, from a folder or the hub.

    Raises:
        ConfigError: if there is none, or it cannot render a conversation.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.tokenizer {path!r}: cannot be loaded ({reason}); wanted a folder with tokenizer.json "
            "and tokenizer_config.json, or a reachable hub id"
        ) from None
    if not tokenizer.is_fast:
        raise ConfigError(f"model.tokenizer {path!r}: is a slow tokenizer; convert it to tokenizer.json")
    if not tokenizer.chat_template:
        raise ConfigError(f"model.tokenizer {path!r}: has no chat template; add chat_template.jinja to the folder")
    return tokenizer
