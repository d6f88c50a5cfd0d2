"""How answers are compared: the rules of docs/rl.md, and texts over which math-verify would never end."""

import os
import threading

import pytest

from fastrm.errors import ConfigError
from fastrm.rl.answers import extract_answer, is_match
from fastrm.rl.math_check import MathChecker, equal_as_math
from tests.helpers.waiting import PATIENCE


@pytest.mark.parametrize(
    "text, answer",
    [
        ("So <answer> 12 </answer>, not <ANSWER>13</ANSWER>.", "13"),
        (r"First \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"<answer>\boxed{3}</answer>", "3"),
        ("The answer is 3.\nOr the answer is: 4.", "4."),
        ("Answer: a red bus\nThanks!", "a red bus"), ("5 + 5\n#### 10", "10"), (" a red bus ", "a red bus"),
        (r"cut off: \boxed{12", r"cut off: \boxed{12"), ("<answer>12", "<answer>12"), ("", ""),
        ("The answer isn't here", "The answer isn't here"),
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
        ("choice", "Both", "B", False), ("choice", "The answer is **B**", "B", True), ("choice", "no", "no", False),
        ("math", "7.0", "7", True), ("math", "1,000", "1000", True), ("math", "8", "7", False),
        ("math", "-.5", "-0.5", True), ("math", "NaN", "NaN", True), ("math", "five", "5", False),
        ("auto", "B.", "B", True), ("auto", "a bus", "b bus", False), ("auto", "7.00", "7", True),
        ("auto", "2 blue buses", "2 red buses", False), ("auto", "seven", ["7", "seven"], True),
        ("auto", "six", ["7", "seven"], False), ("auto", "7", 7, True),
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
        (r"\boxed{(1,2)}", "(2, 1)", False), ("}{", "5", False), ("\ud800", "5", False), ("x" * 10_000, "5", False),
    ],
)  # fmt: skip
def test_formulas_are_compared_by_math_verify(response, truth, right):
    assert is_match(response, truth, "math") is right


def test_a_formula_that_never_ends_is_stopped_and_the_next_is_compared():
    """math-verify's own limit is a signal: here it would not be allowed, in a thread that is not the main one."""
    checker, found = MathChecker(limit=1.0), []
    try:
        for question in ((r"(10^{10})!", "3"), (r"\frac{1}{2}", "0.5")):
            thread = threading.Thread(target=lambda q=question: found.append(checker(*q)))
            thread.start()
            thread.join(PATIENCE)
        assert checker.num_stopped >= 1 and found[0] is False
        checker.limit = PATIENCE
        assert checker(r"\frac{1}{2}", "0.5") is True
    finally:
        checker.close()


def test_a_process_that_was_killed_is_started_again():
    checker = MathChecker(PATIENCE)
    try:
        assert checker("1/2", "0.5")
        checker._process.kill()
        checker._process.wait()
        assert checker("1/2", "0.5")
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
