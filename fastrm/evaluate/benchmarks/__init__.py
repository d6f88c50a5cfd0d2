"""Published reward-model benchmarks: readers of their files, and their metrics as their authors compute them.

A benchmark's file comes in, and the rewards of its rows; its metrics with 95 % intervals go out, beside published
figures. Each benchmark is one module with the same few names. Open `benchmark.py` first, which says which, then
`vl_rewardbench.py`, which is short.
"""

from fastrm.evaluate.benchmarks.benchmark import BENCHMARKS, PREFIX, Benchmark, load_benchmark
from fastrm.evaluate.benchmarks.metrics import bootstrap, values_of

__all__ = ["BENCHMARKS", "PREFIX", "Benchmark", "bootstrap", "load_benchmark", "values_of"]
