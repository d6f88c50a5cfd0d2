"""Rewards per second of `fastrm serve` and of vLLM's CPU build, which serves the same reward model beside it.

    python bench/serving/vllm_rival.py MODEL                 after make test-vllm; five minutes with a small model
    python bench/serving/vllm_rival.py MODEL --gate          only that both give the rewards of the model
    python bench/serving/vllm_rival.py MODEL --vllm FOLDER   the environment in which vLLM is installed

Both servers compute in float32 and are up during the whole run, and they are loaded in turn, fastrm first and vLLM
first in alternate rounds; vLLM keeps prefixes in its cache. First every reward of both is compared with
`RewardModel.score`; nothing is timed on a red gate. vLLM takes one conversation a request: for whole groups it has
eight clients where fastrm has one, which send the eight responses of a group one beside the other, so that as many
responses are under way. Its latency is that of a response, fastrm's that of a group. The figures go to
bench/results/<device>-serving-vllm.json.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import ROOT
from bench.harness.results import device_name, environment, file_of, write_json
from bench.serving.load import Answer, Load, closed_loop
from bench.serving.run_serving import GATED, as_json, compare, fastrm_command, line, served, serving
from bench.serving.vllm_process import vllm_serving
from bench.serving.workload import RESPONSES, Group, classify, make_groups, singles, whole
from fastrm.evaluate.reward_model import RewardModel
from fastrm.model.export_command import export_model
from fastrm.ui import Display

OPTIONS = (
    "--enable-prefix-caching", "--mm-processor-kwargs", '{"use_fast": false}',
    "--limit-mm-per-prompt", '{"image": 1, "video": 0}',
)  # fmt: skip
FASTRM, VLLM = "fastrm", "vLLM"


def reward(body: dict) -> float:
    """Return the reward in vLLM's answer to `/classify`.

    Raises:
        ValueError: if it is no answer for one conversation by a model with one label, or no finite number.
    """
    match body:
        case {"data": [{"probs": [float(found)]}]} if math.isfinite(found):
            return found
    raise ValueError(f"/classify answered {json.dumps(body)[:300]}, wanted one conversation with one finite reward")


def as_rewards(load: Load) -> Load:
    """Return a load on `/classify` with the bodies that fastrm would answer."""

    def converted(answer: Answer) -> Answer:
        return answer if answer.body is None else replace(answer, body={"rewards": [[reward(answer.body)]]})

    return Load(load.seconds, [converted(answer) for answer in load.answers])


def check(model: str, groups: list[Group], ours: str, vllm: str) -> dict[str, float]:
    """Compare the rewards of both servers with those of `RewardModel.score`; return the largest difference of each.

    Raises:
        RedGate: if a reward differs by more than rounding.
    """
    direct = RewardModel.from_pretrained(model, device="cpu", dtype="fp32")
    wanted = [value for group in direct.score([group.as_dict() for group in groups]) for value in group]
    half = len(groups) // 2  # the server would not compute a response again that it knows
    sides = {
        FASTRM: served(ours, whole(groups[:half])) + served(ours, singles(groups[half:])),
        VLLM: [_classified(vllm, body) for body in classify(groups)],
    }
    return compare(sides, wanted)


def _classified(url: str, body: bytes) -> float:
    request = urllib.request.Request(f"{url}/classify", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return reward(json.load(answer))


def vllm_version(url: str) -> str:
    """Return the version that a vLLM server says it is."""
    with urllib.request.urlopen(f"{url}/version") as answer:
        return json.load(answer)["version"]


def measure(ours: str, vllm: str, groups: Iterator[Group], options: argparse.Namespace) -> list[dict]:
    """Load both servers in turn and return the figures of each load."""
    forms = {"groups": whole(groups), "singles": singles(groups)}
    conversations, found = classify(groups), []

    def load(side: str, form: str, clients: int) -> Load:
        if side == FASTRM:
            return closed_loop(f"{ours}/v1/rewards", forms[form], clients, options.seconds, options.warm_up)
        senders = clients * (RESPONSES if form == "groups" else 1)
        return as_rewards(closed_loop(f"{vllm}/classify", conversations, senders, options.seconds, options.warm_up))

    for turn, clients, form in itertools.product(range(options.rounds), options.clients, forms):
        for side in (FASTRM, VLLM) if turn % 2 == 0 else (VLLM, FASTRM):
            found.append(as_json(side, form, clients, load(side, form, clients)) | {"round": turn})
            print(line(found[-1]), flush=True)
    return found


def ratios(found: list[dict]) -> dict[str, dict]:
    """Return by form of request and number of clients the median rates of both sides and fastrm's over vLLM's."""
    kinds = dict.fromkeys((one["requests"], one["clients"]) for one in found)
    table = {}
    for requests, clients in kinds:
        rates = {
            side: statistics.median(
                one["rewards_per_second"]
                for one in found
                if (one["side"], one["requests"], one["clients"]) == (side, requests, clients)
            )
            for side in (FASTRM, VLLM)
        }
        ratio = rates[FASTRM] / rates[VLLM] if rates[VLLM] else math.inf
        table[f"{requests}, {clients} clients"] = rates | {"ratio": ratio}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of a Qwen2-VL or Qwen2.5-VL reward model")
    parser.add_argument("--vllm", type=Path, default=ROOT / ".venv-vllm", help="the environment of make test-vllm")
    parser.add_argument("--gate", action="store_true", help="compare the rewards, and time nothing")
    parser.add_argument("--clients", type=lambda text: [int(part) for part in text.split(",")], default=[8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load")
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds before each load that do not count")
    parser.add_argument("--side", type=int, default=56, help="pixels of an image's side; a multiple of 28")
    parser.add_argument("--eager", action="store_true", help="vLLM without its compiler, where none is installed")
    parser.add_argument("--out", type=Path, default=file_of(device_name(), "-serving-vllm.json"))
    options = parser.parse_args()
    gated = list(itertools.islice(make_groups(options.side), GATED))
    with tempfile.TemporaryDirectory() as place, Display(silent=True) as display:
        folder, log = Path(place, "model"), Path(place, "vllm.log")
        export_model(options.model, folder, "vllm", display)
        more = ("--enforce-eager",) if options.eager else ()
        with (
            serving(fastrm_command(options.model, "--max-queue", "4096")) as ours,
            vllm_serving(options.vllm, folder, log, *OPTIONS, *more) as vllm,
        ):
            version = vllm_version(vllm)
            for name, difference in check(options.model, gated, ours, vllm).items():
                print(f"gate: {name}: rewards differ by {difference:.1e} at most from RewardModel.score", flush=True)
            if options.gate:
                return
            found = measure(ours, vllm, make_groups(options.side, GATED), options)
    table = ratios(found)
    for name, one in table.items():
        print(f"{name}: fastrm {one[FASTRM]:,.1f} rewards/s, vLLM {one[VLLM]:,.1f}, {one['ratio']:.2f} times")
    heads = {"device": device_name(), **environment(), "model": options.model, "side": options.side}
    heads |= {"vllm": version, "eager": options.eager}
    write_json(options.out, heads | {"closed": found, "ratios": table}, indent=2)


if __name__ == "__main__":
    main()
