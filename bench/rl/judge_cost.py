"""The cost of the rewards of one group of 8 rollouts: one packed pass of a scalar model, or 56 generated judgements.

    python bench/rl/judge_cost.py JUDGE REWARD_MODEL     measure, and write bench/results/DEVICE-judge-cost.json
    python bench/rl/judge_cost.py JUDGE REWARD_MODEL --tokens 64 --batch 14 --repeats 1
    python bench/rl/judge_cost.py --table                print the table of docs/grpo.md from that file

JUDGE is the folder of a language model, REWARD_MODEL that of a reward model that `fastrm train` made of it.
Both compute in float32 with the same threads, and take turns in one process. The judge reads the prompt, two rollouts
and an instruction, as in R1-Reward (arXiv 2505.02835), once for each ordered pair of the 8 rollouts, and writes a fixed
number of tokens by transformers' `generate`, in batches. Whether its judgements are good is not measured.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from bench.harness.pages import table
from bench.harness.results import device_name, environment, file_of, write_json
from bench.harness.timing import Stopwatch
from fastrm.evaluate.reward_model import RewardModel

SUFFIX = "-judge-cost.json"
ROLLOUTS = 8
SENTENCE = "The sum of the two numbers is found by adding the ones first and then the tens, and so it is %d. "
QUESTION = "A shop sells pens in boxes of twelve and pencils in boxes of twenty. " * 6 + "How many are there in all?"
INSTRUCTION = (
    "Question:\n{question}\n\nAnswer 1:\n{first}\n\nAnswer 2:\n{second}\n\nWhich answer is better? Compare them for "
    "correctness, completeness and style, think step by step, and end with 1 or 2."
)


def rollouts(sentences: int = 3) -> list[str]:
    """Return 8 different responses of that many sentences each."""
    return ["".join(SENTENCE % (10 * row + n) for n in range(sentences)) for row in range(ROLLOUTS)]


def judge_prompts(question: str, answers: list[str]) -> list[list[dict]]:
    """Return a conversation for each ordered pair of different answers."""
    pairs = [(first, second) for first in answers for second in answers if first is not second]
    texts = [INSTRUCTION.format(question=question, first=first, second=second) for first, second in pairs]
    return [[{"role": "user", "content": text}] for text in texts]


def judge(model, tokenizer, prompts: list[list[dict]], tokens: int, batch: int) -> int:
    """Write that many tokens of judgement for each prompt, in batches; return how many tokens were written in all."""
    written = 0
    for start in range(0, len(prompts), batch):
        rows = tokenizer.apply_chat_template(
            prompts[start : start + batch], add_generation_prompt=True, return_tensors="pt", return_dict=True,
            padding=True,
        ).to(model.device)  # fmt: skip
        with torch.inference_mode():
            out = model.generate(**rows, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        written += (out.shape[1] - rows["input_ids"].shape[1]) * len(out)
    return written


def measure(folder: str, reward_model: str, tokens: int, batch: int, repeats: int) -> dict:
    """Measure both by turns, the packed pass first and last, after one pass of each that is not timed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scalar = RewardModel.from_pretrained(reward_model, dtype="fp32", check_exactness=False)
    answers = rollouts()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(scalar.network.model.device).eval()
    prompts = judge_prompts(QUESTION, answers)
    group = {"prompt": QUESTION, "responses": answers}
    scalar.score([group])
    judge(network, tokenizer, prompts[:batch], 2, batch)
    seconds: dict[str, list[float]] = {"packed": [], "judge": []}
    for turn in range(repeats + 1):
        with Stopwatch() as watch:
            scalar.score([group])
        seconds["packed"].append(watch.wall)
        if turn < repeats:
            with Stopwatch() as watch:
                written = judge(network, tokenizer, prompts, tokens, batch)
            seconds["judge"].append(watch.wall)
    lengths = [len(ids) for ids in tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]]
    return {
        "model": Path(folder).name, "rollouts": ROLLOUTS, "judgements": len(prompts), "written_tokens": written,
        "read_tokens": sum(lengths), "new_tokens": tokens, "batch": batch, "threads": torch.get_num_threads(),
        "prompt_tokens": len(tokenizer.encode(QUESTION)),
        "response_tokens": sum(len(tokenizer.encode(text)) for text in answers), "seconds": seconds,
    }  # fmt: skip


def table_of(found: dict) -> list[str]:
    """Return the lines of the table: seconds of the fastest repeat of each, and their ratio."""
    packed, judged = (min(found["seconds"][name]) for name in ("packed", "judge"))
    read = found["prompt_tokens"] + found["response_tokens"]
    judge = f"judge, {found['judgements']} ordered pairs"
    tokens = f"{found['read_tokens']:,}", f"{found['written_tokens']:,}"
    rows = [
        ("scalar model, one packed pass", f"{read:,}", "0", f"{packed:.2f}", "1"),
        (judge, *tokens, f"{judged:.1f}", f"{judged / packed:.0f} times"),
    ]
    return table(("way", "tokens read", "tokens written", "seconds", "ratio"), rows)


def results_file() -> Path:
    return file_of(device_name(), SUFFIX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="of the judge, and of the reward model")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of one judgement")
    parser.add_argument("--batch", type=int, default=14, help="judgements that are generated together")
    parser.add_argument("--repeats", type=int, default=1, help="turns of both, before a last packed pass")
    parser.add_argument("--table", action="store_true", help="print the table of what was measured")
    chosen = parser.parse_args()
    if chosen.folders:
        found = measure(*chosen.folders, chosen.tokens, chosen.batch, chosen.repeats)
        write_json(results_file(), {"device": device_name(), **environment("transformers"), **found})
    if chosen.table or chosen.folders:
        print("\n".join(table_of(json.loads(results_file().read_text()))))


if __name__ == "__main__":
    main()
