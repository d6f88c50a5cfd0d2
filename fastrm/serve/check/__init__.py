"""The command `fastrm check-serving`: rewards of a fixed set of prompts by URL, beside those computed here.

A model comes in with the URL of a server that is said to serve it; a table of differences goes out, with the likely
cause.
Open `command.py` first.

    prompts.py  the set: texts and images made in code
    clients.py  the set sent by each API
    causes.py   explanations of a difference, each tried on the model here
    command.py  the comparison, its table and its verdict
"""
