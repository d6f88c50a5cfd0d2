"""Training: steps, evaluations, checkpoints, metrics, and the report at the end; on one process or on many ranks.

A configuration comes in; a run folder goes out, with metrics, checkpoints and the exported model. A run that was
killed goes on to the bit. Open `loop.py` first, then `engine.py` for what happens to a gradient, and `checkpoint.py`
for what survives a crash.
"""
