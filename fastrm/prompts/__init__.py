"""Prompts of judges and critics, and what is read from the texts that they write.

A SPEC, a YAML file, and texts come in; prompts and verdicts go out. It knows no rows, tokens or models. Open `spec.py`
first.
"""
