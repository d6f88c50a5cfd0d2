"""A reward function and a reward-model plugin for ms-swift (contract: ms-swift 4.6, `swift/rewards`)."""

from collections.abc import Sequence

from fastrm.errors import DataError
from fastrm.rl.rewards import Rewards
from fastrm.rl.samples import Sample


class RewardFunction:
    """A mix-in for ms-swift's `AsyncORM`; `orms["fastrm"]` is the class that takes it.

    That class has the attribute `rewards`, and may have `truth`, the column of the true answers.
    """

    rewards: Rewards
    truth = "solution"

    async def __call__(self, completions: Sequence[str], **columns) -> list[float | None]:
        """Compute a reward for each completion; `messages` ends with it, and `images` is the row's."""
        return await self.rewards.compute_async(_read(completions, columns, self.rewards, self.truth))


class RewardPlugin:
    """A plugin for `rm_plugins`, which ms-swift makes with its own model and template and calls with rows.

    The class that derives from it has the attribute `rewards`; ms-swift's model is not used, so that the head may be of
    any kind.
    """

    rewards: Rewards
    truth = "solution"

    def __init__(self, model: object = None, template: object = None):
        self.model, self.template = model, template

    def __call__(self, inputs: Sequence[dict], **_) -> list[float | None]:
        """Compute a reward for each row, whose `messages` end with the completion."""
        turns = [row["messages"] for row in inputs]
        if any(row[-1]["role"] != "assistant" for row in turns):
            raise DataError("messages: got a row that does not end with the assistant's turn, which is what is scored")
        columns = {key: [row.get(key) for row in inputs] for key in {key for row in inputs for key in row}}
        return self.rewards(_read([row[-1]["content"] for row in turns], columns, self.rewards, self.truth))


def _read(completions: Sequence[str], columns: dict, rewards: Rewards, truth: str) -> list[Sample]:
    messages = columns.get("messages")
    if messages is None or len(messages) != len(completions):
        got = "no column" if messages is None else f"{len(messages)} rows"
        raise DataError(f"messages: got {got}, wanted {len(completions)} rows, one for each completion")
    images, truths = (
        values or [None] * len(completions) for values in (columns.get("images"), rewards.find_truths(columns, truth))
    )
    return [
        Sample(row[:-1] if row[-1]["role"] == "assistant" else row, completion, pictures or None, answer, True)
        for completion, row, pictures, answer in zip(completions, messages, images, truths, strict=True)
    ]
