"""The program that compares answers for `math_check.py`: JSON [got, wanted, seconds] a line in, a word a line out.

The word is true, false, or stopped if the comparison took more than that many seconds of the processor. Each is made
by a fork, which the kernel ends at its limit, whatever it is in; the imports, which take seconds, are made once. The
time of the processor does not grow with what else a machine does, so that load makes no answer wrong. math-verify's
own limits, which are times of a clock and need Python to run, are off.
"""

import json
import logging
import os
import re
import signal
import sys

_PROSE = re.compile(r"\n|(?<!\\)\b(?:[A-Za-z]{4,}|[A-Za-z]{2,}\s+[A-Za-z]{2,}\b)")  # a long word, or two


def compare(got: str, wanted: str) -> bool:
    """Compare two answers as math-verify does, each inside a box, or as they stand if they hold formulas in text.

    https://github.com/huggingface/Math-Verify: `parse` finds the expressions, `verify(gold, answer)` is not symmetric.
    """
    from math_verify import parse, verify

    gold, answer = (parse(_marked(text), parsing_timeout=None) for text in (wanted, got))
    return bool(gold) and bool(answer) and verify(gold, answer, timeout_seconds=None)


def _marked(text: str) -> str:
    return text if "$" in text or _PROSE.search(text) else f"\\boxed{{{text}}}"


def compare_in_fork(got: str, wanted: str, limit: float) -> str:
    """Compare two answers in a process of its own, for at most `limit` seconds of the processor.

    Returns:
        true, false, or stopped.
    """
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_PROF, limit)  # its signal ends a process, even inside a long call into C
        same = False
        try:
            same = compare(got, wanted)
        except Exception:  # sympy raises anything for what is no formula
            same = False
        finally:
            os._exit(0 if same else 1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return "stopped"
    return "true" if os.WEXITSTATUS(status) == 0 else "false"


def main() -> None:
    """Serve comparisons until the input ends."""
    logging.disable(logging.WARNING)
    compare("\\frac{1}{2}", "0.5")  # loads what is needed, before the first question
    print("ready", flush=True)
    for line in sys.stdin:
        print(compare_in_fork(*json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
