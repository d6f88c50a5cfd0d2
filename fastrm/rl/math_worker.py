"""The program that compares answers for `math_check.py`: a JSON list [got, wanted] a line in, true or false a line out.

Its time is bounded by whoever started it, so that math-verify's own limits, which need signals, are off.
"""

import json
import logging
import re
import sys

_PROSE = re.compile(r"\n|(?<!\\)\b[A-Za-z]{4,}")


def compare(got: str, wanted: str) -> bool:
    """Compare two answers as math-verify does, each inside a box, or as they stand if they hold formulas in text.

    https://github.com/huggingface/Math-Verify: `parse` finds the expressions, `verify(gold, answer)` is not symmetric.
    """
    from math_verify import parse, verify

    gold, answer = (parse(_marked(text), parsing_timeout=None) for text in (wanted, got))
    return bool(gold) and bool(answer) and verify(gold, answer, timeout_seconds=None)


def _marked(text: str) -> str:
    return text if "$" in text or _PROSE.search(text) else f"\\boxed{{{text}}}"


def main() -> None:
    """Serve comparisons until the input ends."""
    import math_verify  # noqa: F401  (seconds: before the first question)

    logging.disable(logging.WARNING)
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            same = compare(*json.loads(line))
        except Exception:  # sympy raises anything for what is no formula
            same = False
        print("true" if same else "false", flush=True)


if __name__ == "__main__":
    main()
