"""Reward functions for TRL's `GRPOTrainer` and its relatives (contract: TRL 1.16, `RewardFunc`)."""

from collections.abc import Callable, Sequence

from fastrm.errors import DataError
from fastrm.rl.rewards import Rewards
from fastrm.rl.samples import Sample


def reward_function(rewards: Rewards, *, truth: str = "solution", name: str = "fastrm") -> Callable[..., list]:
    """Return a function for `reward_funcs`.

    Args:
        truth: the column of the true answers, for the schemes that need them.
        name: of the metric: rewards/NAME/mean.
    """

    def compute(prompts: Sequence, completions: Sequence, images: Sequence | None = None, **columns) -> list:
        truths = rewards.find_truths(columns, truth)
        return rewards(read_rollouts(prompts, completions, images, truths, columns.get("image")))

    compute.__name__ = compute.__qualname__ = name
    return compute


def async_reward_function(rewards: Rewards, *, truth: str = "solution", name: str = "fastrm") -> Callable:
    """Return a coroutine function for `reward_funcs`; TRL runs all of them at the same time, after the others."""

    async def compute(prompts: Sequence, completions: Sequence, images: Sequence | None = None, **columns) -> list:
        truths = rewards.find_truths(columns, truth)
        samples = read_rollouts(prompts, completions, images, truths, columns.get("image"))
        return await rewards.compute_async(samples)

    compute.__name__ = compute.__qualname__ = name
    return compute


def read_rollouts(
    prompts: Sequence,
    completions: Sequence,
    images: Sequence | None = None,
    truths: Sequence | None = None,
    image: Sequence | None = None,
) -> list[Sample]:
    """Return the rollouts of a call: prompts and completions are texts, or lists of messages.

    Images are those in the parts of a prompt; where it has none, those of the row's column `images` or `image`.

    Raises:
        DataError: if a column has another length than the prompts.
    """
    for name, column in (("completions", completions), ("images", images), ("image", image), ("truths", truths)):
        if column is not None and len(column) != len(prompts):
            raise DataError(f"{name}: got {len(column)}, wanted {len(prompts)}, one for each prompt")
    return [
        Sample(prompt, _text(completions[i]), _images(images, image, i), None if truths is None else truths[i])
        for i, prompt in enumerate(prompts)
    ]


def _text(completion: str | Sequence[dict]) -> str:
    """Return the text of a completion; of several messages, as with tools, the last is the answer.

    Where the last is a tool's, the rollout ended before the policy answered: what a tool said is not its answer.
    """
    if isinstance(completion, str):
        return completion
    last = completion[-1] if completion else {}
    content = last.get("content") if last.get("role", "assistant") == "assistant" else ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content or ())


def _images(images: Sequence | None, image: Sequence | None, row: int) -> Sequence | None:
    if images is not None and images[row] is not None:
        return images[row]
    return [image[row]] if image is not None and image[row] is not None else None
