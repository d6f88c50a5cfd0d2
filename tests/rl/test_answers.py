"""How answers are compared: the rules of docs/rl.md, and texts over which math-verify would never end."""

import json
import math
import os
import signal
import threading
import time
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest

from fastrm.errors import ConfigError, DataError
from fastrm.rl.answers import KINDS, extract_answer, is_match
from fastrm.rl.math_check import MathChecker, equal_as_math
from tests.helpers.waiting import PATIENCE

LONG = [
    "<answer>", "</answer>", " ", "\n", "answer ", "answer is ", "#", "\\boxed{", "\\text{", "}", "\u0315\u0300", "A, ",
]  # fmt: skip


@pytest.mark.parametrize(
    "text, answer",
    [
        ("So <answer> 12 </answer>, not <ANSWER>13</ANSWER>.", "13"),
        (r"First \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"<answer>\boxed{3}</answer>", "3"),
        ("The answer is 3.\nOr the answer is: 4.", "4."),
        ("Answer: a red bus\nThanks!", "a red bus"), ("5 + 5\n#### 10", "10"), (" a red bus ", "a red bus"),
        (r"cut off: \boxed{12", r"cut off: \boxed{12"), ("<answer>12", "<answer>12"), ("", ""),
        ("The answer isn't here", "The answer isn't here"), ("The answer is 3, and the answer is 5", "5"),
        ("The answer is A. No, wait: the answer is B", "B"), ("The answer is:\n\n5\nDone", "5"),
        ("The answer is 5. That is my answer:", "5. That is my answer:"), ("**Answer:** 5", "5"),
        ("<answer>1<answer>2</answer></answer>", "2"), ("<answer>3</answer> <answer>12", "3"),
    ],
)  # fmt: skip
def test_the_answer_of_a_text(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "kind, response, truth, right",
    [
        ("text", " A  Red bus! ", "a red bus", True), ("text", "a bus", "a red bus", False),
        ("text", "\uff21", "a", True), ("text", "7.0", "7", False), ("text", "", "", False), ("text", ".", ".", False),
        ("choice", "B", "B", True), ("choice", "(b) a bus", "B", True), ("choice", "b. a bus", "(B)", True),
        ("choice", "B: because C", "C", False), ("choice", "A red bus", "A", False), ("choice", "", "A", False),
        *(("choice", text, "B", True) for text in (
            r"\boxed{\text{B}}", r"\boxed{\textbf{(B)}\ 12}", "The answer is **B**. A bus", "**B**: bus", "$B$",
            "The answer is option B", "Option (B)", "B - a bus", "B: a bus", r"\(B\)", "B: vitamin C", "B.",
        )),
        *(("choice", text, truth, False) for truth in "AB" for text in (
            "A, B, C, D", "A. B. C.", "(A) or (B)", "A) and B)", "A: B", "A, or option B", "**A**, **B**",
            "A, b", "A-B",
        )),
        ("choice", "Both", "B", False), ("choice", "The answer is **B**", "B", True), ("choice", "no", "no", False),
        ("math", "7.0", "7", True), ("math", "1,000", "1000", True), ("math", "8", "7", False),
        ("math", "-.5", "-0.5", True), ("math", "NaN", "NaN", True), ("math", "five", "5", False),
        ("auto", "B.", "B", True), ("auto", "a bus", "b bus", False), ("auto", "7.00", "7", True),
        ("auto", "2 blue buses", "2 red buses", False), ("auto", "seven", ["7", "seven"], True),
        ("auto", "six", ["7", "seven"], False), ("auto", "7", 7, True),
        ("auto", r"\boxed{\text{yes}}", "yes", True), ("auto", "yes", r"\text{Yes}", True),
        ("auto", "B", r"\text{B}", True), ("math", "Even.", "even", True),
    ],
)  # fmt: skip
def test_kinds(kind, response, truth, right):
    assert is_match(response, truth, kind) is right


@pytest.mark.parametrize(
    "response, truth, right",
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", True), (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        (r"$\sqrt{8}$", r"2\sqrt{2}", True),
        (r"\boxed{\frac{1}{3}}", "0.5", False), ("I think that it is 5", "5", True), ("5 cm", "5", True),
        *((said, truth, False) for one, other in (
            ("5", ".5"), ("50", "$.50"), ("22", "2\u00b2"), ("105", "10\u2075"), ("12", "1,2"), ("35", "3,5"),
            ("5", "5!"), ("2", "2\u00b2"),
            ("1000", "1,00,0"), ("1000", "10,00"), ("1234", "1,234,"), ("12", "1_2"), ("10", "10\u2075"),
            ("1.5", "1,5"), ("123", "1,23"), ("1", "1,2"), ("2", "1,2"),
        ) for said, truth in ((one, other), (other, one))),
        ("2\u00b2", "4", True), ("10\u2075", "100,000", True), ("\u22125", "-5", True), ("5!", "120", True),
        ("$5$.", "5", True), ("**5**", "5", True), ("**5.**", "5", True), (r"\(5\)", "5", True), ("$50", "50", True),
        ("The answer is 5.", "5", True), ("-1,234,567.50", "-1234567.5", True), ("1,2", "1, 2", True),
        ("`5`", "5", True), ("It is 4.", "4", True), ("It is 4", "4", True), ("It is 5.", "4", False),
        (r"\boxed{(1,2)}", "(2, 1)", False), ("}{", "5", False), ("\ud800", "5", False), ("x" * 10_000, "5", False),
    ],
)  # fmt: skip
def test_formulas_are_compared_by_math_verify(response, truth, right):
    assert is_match(response, truth, "math") is right


@pytest.mark.parametrize(
    "truth, right",
    [
        (np.array(["7", "seven"]), True), (np.array("7"), True), (np.array([7]), True), (np.float32(7), True),
        (np.array(["8"], dtype=object), False), (np.array([["8"], ["7"]]), True), (("8", Decimal("7.0")), True),
        ([None, "7"], True), (None, False), ([], False), (math.nan, False),
    ],
)  # fmt: skip
def test_a_truth_is_text_a_number_or_an_array_of_them(truth, right):
    """verl reads lists of Parquet files as NumPy arrays."""
    assert is_match("7", truth) is right


@pytest.mark.parametrize("truth", [{"target": "7"}, ["7", {"target": "7"}], b"7", {"7"}, object()])
def test_a_truth_that_is_none_is_refused(truth):
    with pytest.raises(DataError, match=r"true answer: got .*, wanted text, a number, or a list of them"):
        is_match("7", truth)


@pytest.mark.parametrize("text", LONG, ids=[text[:12] for text in LONG])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_long_text_takes_time_by_its_length_alone(text, kind, monkeypatch):
    """Policies write what they like; the time per character of eight times the text is that of the text.

    Work that grows by the square takes 64 times as long; 24 leaves room for a machine that is busy.
    """
    monkeypatch.setattr("fastrm.rl.answers.equal_as_math", lambda got, wanted: False)
    taken = [min(timed(text * count, kind) for _ in range(3)) for count in (1_000, 8_000)]
    assert taken[1] < 24 * taken[0] + 0.05


def timed(text, kind):
    started = time.process_time()
    is_match("The answer is" + text, "B" if kind == "choice" else "7", kind)
    is_match(text, "B" if kind == "choice" else "7", kind)
    return time.process_time() - started


def test_a_formula_that_never_ends_is_stopped_and_the_next_is_compared():
    """math-verify's own limit is a signal: here it would not be allowed, in a thread that is not the main one."""
    checker, found, processes = MathChecker(limit=1.0), [], set()
    try:
        for question in ((r"(10^{10})!", "3"), (r"\frac{1}{2}", "0.5")):
            thread = threading.Thread(target=lambda q=question: found.append(checker(*q)))
            thread.start()
            thread.join(PATIENCE)
            processes.add(checker._process)
        assert found == [False, True] and checker.num_stopped == 1
        assert len(processes) == 1, "a formula that is stopped costs no new start"
    finally:
        checker.close()


def test_a_comparison_is_stopped_by_its_own_time_and_not_by_the_clock():
    """A machine that is busy makes no right answer wrong: here the comparison is held up, as by other processes."""
    checker = MathChecker(limit=1.0)
    try:
        assert checker("1/2", "0.5")
        os.kill(checker._process.pid, signal.SIGSTOP)
        threading.Timer(2.5, os.kill, (checker._process.pid, signal.SIGCONT)).start()
        assert checker("1/4", "0.25") and checker.num_stopped == 0
    finally:
        checker.close()


def test_formulas_that_never_end_take_no_more_than_an_allowance_together(monkeypatch):
    """A policy that writes them in every rollout must not stop its trainer for hours."""
    clock, limits = [0.0], []
    monkeypatch.setattr("fastrm.rl.math_check.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def ask(process, question):
        limits.append(json.loads(question)[2])
        return b"stopped\n"

    monkeypatch.setattr("fastrm.rl.math_check._ask", ask)
    checker = MathChecker()
    monkeypatch.setattr(checker, "_running", lambda: None)
    assert not any(checker(f"{number}!", "3") for number in range(1000))
    assert limits[:12] == [5.0] * 12 and limits[12:] == [0.25] * 988 and checker.num_stopped == 1000
    limits.clear()
    assert not checker("0!", "3") and not limits, "the first was stopped at the whole limit: it is known"
    clock[0] = 50.0
    assert not checker("999!", "3") and limits == [5.0], "a short limit is no verdict, and time brings the whole back"


def test_a_process_that_was_killed_is_started_again():
    checker = MathChecker(PATIENCE)
    try:
        assert checker("1/2", "0.5")
        checker._process.kill()
        checker._process.wait()
        assert checker("1/4", "0.25")
    finally:
        checker.close()


def test_a_forked_process_has_its_own():
    """Two that shared one would read each other's answers; AReaL and data workers fork."""
    assert equal_as_math(r"\frac{1}{2}", "0.5")
    child = os.fork()
    if child == 0:
        try:
            right = equal_as_math(r"\frac{1}{2}", "0.5") and not equal_as_math(r"\frac{1}{3}", "0.5")
            equal_as_math.close()
        finally:
            os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert equal_as_math(r"\frac{1}{2}", "0.5")


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no math here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no math here; install it \(pip install"):
        MathChecker()("1/2", "0.5")
    with pytest.raises(ConfigError, match="answers: got 'maths', wanted one of auto, text, choice, math"):
        is_match("1", "1", "maths")
