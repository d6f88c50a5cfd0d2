"""Plain reward functions, as AReaL and EasyR1 call them (contracts: AReaL 1.0.4, EasyR1 after 0.3.2)."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fastrm.errors import DataError
from fastrm.rl.chat_text import read_response
from fastrm.rl.rewards import Rewards
from fastrm.rl.samples import Sample


def areal_function(rewards: Rewards, *, truth: str = "answer") -> Callable[..., float]:
    """Return `reward_fn(prompt, completions, prompt_ids, completion_ids, **columns)` for AReaL: one rollout a call.

    The columns `messages` and `images` of the data go to the reward model; without messages, the rendered prompt does.
    A rollout that cannot be scored raises DataError.
    """
    return _ArealFunction(rewards, truth)


@dataclass(frozen=True)
class _ArealFunction:
    """A function that can be pickled: AReaL sends it to processes of its own."""

    rewards: Rewards
    truth: str

    def __call__(self, prompt: str, completions: str, prompt_ids=None, completion_ids=None, **columns) -> float:
        messages = prompt if columns.get("messages") is None else columns["messages"]
        truth = self.rewards.find_truths(columns, self.truth)
        (found,) = self.rewards([Sample(messages, read_response(completions), columns.get("images"), truth)])
        if found is None:
            raise DataError(f"the rollout has no reward: {dict(self.rewards.num_failed)}")
        return float(found)


def easyr1_function(rewards: Rewards) -> Callable[[Sequence[Mapping]], list[dict]]:
    """Return a function of a batch for EasyR1, whose file says ``REWARD_TYPE = "batch"``.

    EasyR1 gives it no prompt and no images: the column `ground_truth` must hold them beside the answer, as JSON text
    ``{"prompt": text or messages, "images": [path], "answer": ...}``.
    """

    def compute_score(reward_inputs: Sequence[Mapping], **_) -> list[dict]:
        found = rewards([_from_truth(one["response"], one["ground_truth"]) for one in reward_inputs])
        if None in found:
            raise DataError(f"rollouts without a reward: {dict(rewards.num_failed)}")
        return [{"overall": float(reward)} for reward in found]

    return compute_score


def _from_truth(response: str, ground_truth: str | Mapping) -> Sample:
    try:
        known = ground_truth if isinstance(ground_truth, Mapping) else json.loads(ground_truth)
        return Sample(known["prompt"], read_response(response), known.get("images"), known.get("answer"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'ground_truth: got {ground_truth!r:.80}, wanted JSON {{"prompt", "images", "answer"}}, as docs/rl.md says'
        ) from error
