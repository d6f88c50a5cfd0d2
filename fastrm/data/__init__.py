"""Preference data, from the rows of files to the packs of a training step.

Files, images and videos come in, through the readers of `sources`; `prepared` makes a set of groups of them, once. Out
come packs: one row of tokens each, in which every prompt stands once, with what the model needs to read them.
Nothing here knows a model: what it must know of one is in its `ConversationEncoder`. Open `record.py` for what a
row becomes, then `packing.py` for what a pack is, then `loader.py`, which makes packs in worker processes.
"""
