"""Generative judges, whose verdicts stand in texts.

Rows of preferences and texts about them come in; verdicts and figures go out. It stands above `grpo`, whose reading of
language models it uses. Open `command.py` first.
"""
