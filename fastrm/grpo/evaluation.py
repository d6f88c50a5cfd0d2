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
    policy, processor, questions: Sequence[Question], max_tokens: int, answers: str, judge: Rewards | None
) -> dict:
    """Answer all questions with the likeliest tokens, and measure the answers.

    Args:
        answers: the way to compare answers.
        judge: the reward model that is asked about them, or None.

    Returns:
        accuracy with its 95 % interval, mean length in characters, the judge's mean reward, and three examples.
    """
    said = answer(policy, processor, questions, max_tokens)
    right = [is_match(text, question.truth, answers) for text, question in zip(said, questions, strict=True)]
    found = {
        "questions": len(questions),
        "accuracy": sum(right) / len(right),
        "interval": list(wilson_interval(sum(right), len(right))),
        "mean_characters": sum(map(len, said)) / len(said),
        "examples": [
            {"question": question.origin, "truth": question.truth, "answer": text}
            for question, text in list(zip(questions, said, strict=True))[:3]
        ],
    }
    if judge is None:
        return found
    rewards = judge(as_samples(questions, said))
    if None in rewards:
        raise DataError(f"the judge gave answers of the evaluation no reward: {dict(judge.num_failed)}")
    return {**found, "judge_reward": sum(rewards) / len(rewards)}


def as_samples(questions: Sequence[Question], said: Sequence[str]) -> list[Sample]:
    """Return questions and answers as rollouts."""
    return [
        Sample(question.prompt(True), text, [ref.data or ref.path for ref in question.images], question.truth)
        for question, text in zip(questions, said, strict=True)
    ]
