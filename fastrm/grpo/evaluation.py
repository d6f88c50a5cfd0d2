"""The accuracy of a policy on questions with true answers, and what a reward model thinks of it."""

from collections import defaultdict
from collections.abc import Sequence

from fastrm.errors import DataError
from fastrm.evaluate.accuracy import wilson_interval
from fastrm.evaluate.judge_figures import Judged, figures, outcome
from fastrm.grpo.policy import answer, answers_and_cuts
from fastrm.grpo.preferences import Comparison
from fastrm.grpo.questions import Question
from fastrm.rl.answers import is_match
from fastrm.rl.judging import JudgeReward
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
    first, step = _place(process)
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
        "accuracy": sum(right) / len(right),
        "interval": list(wilson_interval(sum(right), len(right))),
        **_described([questions[number] for number in numbers], said),
    }
    return found if judge is None else {**found, "judge_reward": sum(rewards) / len(rewards)}


def evaluate_judge(
    policy, processor, questions: Sequence[Comparison], max_tokens: int, judge: JudgeReward, process=None
) -> dict:
    """Let a policy that is a judge write the likeliest text on each question, and measure its verdicts.

    Args:
        questions: in both orders, without which there is no figure of position.
        process: as that of `evaluate_policy`.

    Returns:
        the figures of docs/judges.md (accuracy with its 95 % interval, position_flip_rate, first_place_rate, ties ...),
        the share of texts in the SPEC's form, their mean consistency, their mean length in characters, and three
        examples.
    """
    first, step = _place(process)
    written = answers_and_cuts(policy, processor, questions[first::step], max_tokens)
    rows = [(number, *one) for number, one in zip(range(first, len(questions), step), written, strict=True)]
    numbers, texts, cut = zip(*sorted(rows if step == 1 else _gather(rows)), strict=True)
    questions = [questions[number] for number in numbers]
    said = [judge.read(text, is_cut=is_cut) for text, is_cut in zip(texts, cut, strict=True)]
    outcomes: dict[int, dict] = defaultdict(dict)
    released: dict[int, dict] = defaultdict(dict)
    for question, one, text in zip(questions, said, texts, strict=True):
        winner_first = question.truth == "1"
        outcomes[question.number][winner_first] = outcome(one.verdict, winner_first)
        released[question.number][winner_first] = outcome(judge.read(text).verdict, winner_first)
    rows = {question.number: (question.source, question.origin) for question in questions}
    return {
        **figures([Judged(*rows[number], found, released[number]) for number, found in outcomes.items()]),
        "texts_cut": sum(cut),
        "num_parse_failures": sum(one.verdict is None for one in said),
        "format": sum(one.is_formed for one in said) / len(said),
        "consistency": sum(one.consistency for one in said) / len(said),
        **_described(questions, texts),
    }


def _place(process) -> tuple[int, int]:
    """Return the number of this process, and of how many."""
    return (0, 1) if process is None else (process.process_index, process.num_processes)


def _described(questions: Sequence[Question], said: Sequence[str]) -> dict:
    return {
        "questions": len(said),
        "mean_characters": sum(map(len, said)) / len(said),
        "examples": [
            {"question": question.origin, "truth": question.truth, "answer": text}
            for question, text in list(zip(questions, said, strict=True))[:3]
        ],
    }


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
