"""The cost and findings of checking a model against stock transformers, on random groups with and without an image.

    python bench/models/check_exactness.py runs/SmolLM2-135M-Instruct --dtype fp32
    python bench/models/random_model.py Qwen2.5-VL-7B-Instruct runs/two-layers --layers 2 --vocabulary 20000
    python bench/models/check_exactness.py runs/two-layers --dtype bf16

The head is random. Times are of the check alone, without loading.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bench  # noqa: F401  (the kernels' path)
from fastrm.config import Config
from fastrm.data.group import GroupSize, encode_group
from fastrm.data.tokenizer import load_tokenizer
from fastrm.evaluate.reward_model import DTYPES
from fastrm.model.exactness import ROUNDINGS, Agreement, check_network, describe
from fastrm.model.samples import pick_samples
from fastrm.train.setup import make_network
from tests.helpers.support import make_image, make_record


def measure(path: str, dtype: str) -> list[Agreement]:
    """Check a backbone with products and weights in this dtype; print a line for each kind of input."""
    network = make_network(_config(path, dtype), load_tokenizer(path)).eval()
    for parameter in network.model.parameters():  # and no buffer: frequencies of rotary embeddings stay float32
        parameter.data = parameter.data.to(DTYPES[dtype])
    records = [make_record(1, num_responses=4, prompt_words=40)]
    if network.is_vision:
        records.append(make_record(2, num_responses=4, prompt_words=40, images=[make_image(336, 252, 1)]))
    groups = [encode_group(record, network.encoder) for record in records]
    found = []
    for kind, sample in pick_samples(
        [GroupSize.of(group) for group in groups], groups.__getitem__, network.encoder
    ).items():
        started = time.perf_counter()
        parts = check_network(network, sample)
        seconds = time.perf_counter() - started
        for part in parts:
            layers, roundings = "all" if part.whole else "two", part.difference * ROUNDINGS / part.bound
            print(
                f"{kind}: {layers} layers in {part.dtype}: difference {part.difference:.1e}, bound {part.bound:.1e}, "
                f"{roundings:.1f} roundings"
            )
        print(f"{kind}: {seconds:.1f} s")
        found += parts
    return found


def _config(path: str, dtype: str) -> Config:
    precision = {"dtype": "fp32" if dtype == "fp32" else "bf16"}
    return Config.model_validate({"model": {"path": path, "freeze": ["language"]}, "precision": precision})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="folder or hub id of a backbone")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    arguments = parser.parse_args()
    print(describe(measure(arguments.path, arguments.dtype)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
