"""Scoring and measuring: rewards for groups, accuracy on preferences, published benchmarks, ensembles.

A reward model's folder comes in, with groups, preferences or a benchmark's files; rewards and figures with intervals
go out. Open `reward_model.py` for the public `fastrm.RewardModel`, `scoring.py` for how packs are run without a
gradient, `command.py` for `fastrm eval`.
"""
