"""The needs of a run, before it runs: memory, messages between GPUs, step time, days, disk.

A configuration, a number of GPUs and assumptions come in; a plan goes out, without data, weights or a GPU. `fastrm
plan` prints it, `fastrm train --dry-run` checks a run with it. Nothing here is a measurement, and every figure's
origin is printed with it. Open `plan.py` first, then `fake_step.py`, which runs the real network on tensors without
values for its memory, and `step_time.py`.
"""
