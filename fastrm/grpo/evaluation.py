"""The accuracy of a policy on questions with true answers, and what a reward model thinks of it."""

from collections.abc import Sequence

from fastrm.errors import DataError
from fastrm.evaluate.accuracy import wilson_interval
from fastrm.grpo.policy import answer
from fastrm.grpo.questions import Question
from fastrm.rl.answers import is_match
from fastrm.rl.rewards import Rewards
from fastrm.rl.samples import Sample


def evaluate_policy(
    policy,
    processor,
    questions: Sequence[Question],
    max_tokens: int,
    answers: str,
    judge: Rewards | None,
    process=None,
) -> dict:
    """Answer all questions with the likeliest tokens, and measure the answers.

    Several processes answer and measure a share each, at once: what one did alone could outlast the time that the
    others wait for it, 10 minutes with NCCL.

    Args:
        answers: the way to compare answers.
        judge: the reward model that is asked about them, or None.
        process: accelerate's state of this process, one of several that all call this; None: there is one.

    Returns:
        accuracy with its 95 % interval, mean length in characters, the judge's mean reward, and three examples.
    """
    first, step = (0, 1) if process is None else (process.process_index, process.num_processes)
    share = questions[first::step]
    said = answer(policy, processor, share, max_tokens)
    rewards = [None] * len(share) if judge is None else judge(as_samples(share, said))
    if judge is not None and None in rewards:
        raise DataError(f"the judge gave answers of the evaluation no reward: {dict(judge.num_failed)}")
    rows = [
        (number, text, is_match(text, questions[number].truth, answers), reward)
        for number, text, reward in zip(range(first, len(questions), step), said, rewards, strict=True)
    ]
    numbers, said, right, rewards = zip(*sorted(rows if step == 1 else _gather(rows)), strict=True)
    found = {
        "questions": len(numbers),
        "accuracy": sum(right) / len(right),
        "interval": list(wilson_interval(sum(right), len(right))),
        "mean_characters": sum(map(len, said)) / len(said),
        "examples": [
            {"question": questions[number].origin, "truth": questions[number].truth, "answer": text}
            for number, text in list(zip(numbers, said, strict=True))[:3]
        ],
    }
    return found if judge is None else {**found, "judge_reward": sum(rewards) / len(rewards)}


def _gather(rows: list[tuple]) -> list[tuple]:
    """Return the rows of all processes."""
    from accelerate.utils import gather_object  # of the extra grpo

    return gather_object(rows)


def as_samples(questions: Sequence[Question], said: Sequence[str]) -> list[Sample]:
    """Return questions and answers as rollouts."""
    return [
        Sample(question.prompt(True), text, question.encoded_images(), question.truth)
        for question, text in zip(questions, said, strict=True)
    ]
