"""The assumptions of `fastrm plan` without other options. Only the standard library is needed: --help is instant."""

from pathlib import Path

IMBALANCE = 1.05  # time of the slowest rank over the ranks' mean time
LATENCY_US = 5.0  # of one hop of a message, in microseconds
RESERVE_GB = 4.0  # of each GPU's memory, for the CUDA context, the communication library and fragmentation
RESULTS = Path("bench/results")  # folder of the training steps that bench/run_training.py measured
