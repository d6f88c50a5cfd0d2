"""Generative judges, whose verdicts stand in texts.

Texts about the responses of rows come in; verdicts and figures go out. It stands above `evaluate`, whose readers and
benchmarks it uses. Open `command.py` first.
"""
