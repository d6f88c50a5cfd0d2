"""GRPO with a reward model, on TRL's trainer: the command `fastrm grpo`.

A configuration comes in, which names a policy, questions with true answers and rewards; the trained policy, its
accuracy before and after, and what the rewards did on the way go out. Open `run.py` for the run, `config.py` for its
settings, `policy.py` for policies, `evaluation.py` for the accuracy of one, `preferences.py` for one that is a judge.
"""
