"""Rewards per second and latency of `fastrm serve`, beside the same model as transformers computes it.

    python bench/serving/run_serving.py MODEL                 all loads; seven minutes with a small model
    python bench/serving/run_serving.py MODEL --gate          only that all sides give the same rewards
    python bench/serving/run_serving.py MODEL --seconds 5 --clients 1,8

First every reward of every side is compared with `RewardModel.score`; nothing is timed on a red gate. Each load is
requests of whole groups (eight responses to one image), or of single responses sent one after another, as trainers
send rollouts. The figures go to bench/results/<device>-serving.json.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import ROOT
from bench.harness.results import device_name, environment, file_of, write_json
from bench.serving.load import Load, closed_loop, open_loop
from bench.serving.stock import StockModel
from bench.serving.workload import RESPONSES, Group, make_groups, singles, whole
from fastrm.evaluate.reward_model import RewardModel

CLIENTS = (1, 8, 64, 256, 1000)
GATED = 8  # groups that the gate looks at
TOLERANCE = 1e-4  # of rewards, in float32
SHARE_OF_CAPACITY = 0.7
BATCHES = (1, 8, 32)


class RedGate(Exception):
    """The error of sides that do not give the same rewards."""


@contextmanager
def serving(command: list[str]) -> Iterator[str]:
    """Start a server with a free port, wait until it prints its URL, and end it at last."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            for line in process.stdout:
                if (place := line.find("http://")) >= 0:
                    yield line[place:].split()[0].rstrip("/,;")
                    break
            else:
                raise SystemExit(f"{' '.join(command)}: ended without an address")
        finally:
            process.terminate()


def fastrm_command(model: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "fastrm.cli", "serve", model, "--port", "0", "--device", "cpu", *options]


def stock_command(model: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("stock.py")), model]


def check(model: str, groups: list[Group], ours: str, stock: str) -> dict[str, float]:
    """Compare the rewards of all sides with those of `RewardModel.score`; return the largest difference of each.

    Raises:
        RedGate: if a reward differs by more than rounding.
    """
    direct = RewardModel.from_pretrained(model, device="cpu", dtype="fp32")
    wanted = [reward for group in direct.score([group.as_dict() for group in groups]) for reward in group]
    batched = StockModel(model)
    flat = [(group.prompt, group.image, response) for group in groups for response in group.responses]
    half = len(groups) // 2  # the server would not compute a response again that it knows
    sides = {
        "fastrm, groups and singles": served(ours, whole(groups[:half])) + served(ours, singles(groups[half:])),
        "transformers, one at a time": served(stock, singles(groups)),
        "transformers, batches of 8": [
            reward for start in range(0, len(flat), 8) for reward in batched.rewards(flat[start : start + 8])
        ],
    }
    return compare(sides, wanted)


def compare(sides: dict[str, list[float]], wanted: list[float]) -> dict[str, float]:
    """Return the largest difference of each side's rewards from those that are wanted.

    Raises:
        RedGate: if a reward differs by more than rounding.
    """
    differences = {
        name: max(abs(one - other) for one, other in zip(found, wanted, strict=True)) for name, found in sides.items()
    }
    for name, difference in differences.items():
        if difference > TOLERANCE:
            raise RedGate(f"{name}: a reward differs by {difference:.1e} from RewardModel.score")
    return differences


def served(url: str, bodies: Iterator[bytes]) -> list[float]:
    """Return the rewards by a server, each body sent once, one after another."""
    found = []
    for body in bodies:
        request = urllib.request.Request(f"{url}/v1/rewards", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            found += [reward for group in json.load(answer)["rewards"] for reward in group]
    return found


def in_batches(model: str, groups: Iterator[Group], size: int, seconds: float) -> float:
    """Return the rewards per second of transformers on padded batches, with no server around it."""
    stock = StockModel(model)
    flat = ((group.prompt, group.image, response) for group in groups for response in group.responses)
    stock.rewards(list(itertools.islice(flat, size)))
    begin = time.perf_counter()
    done, spent = 0, 0.0
    while spent < seconds:
        done += len(stock.rewards(list(itertools.islice(flat, size))))
        spent = time.perf_counter() - begin
    return done / spent


def as_json(kind: str, requests: str, clients: int | None, load: Load) -> dict:
    """Return the figures of a load."""
    return {
        "side": kind, "requests": requests, "clients": clients, "rewards_per_second": load.rewards_per_second,
        "p50_ms": 1000 * load.latency(0.5), "p99_ms": 1000 * load.latency(0.99), "answers": len(load.good),
        "failed": load.failed,
    }  # fmt: skip


def measure(model: str, groups: Iterator[Group], options: argparse.Namespace) -> dict:
    """Run all loads and return their figures."""
    forms = {"groups": whole(groups), "singles": singles(groups)}
    found: dict = {"closed": [], "open": [], "batches": []}
    with serving(fastrm_command(model, "--max-queue", "4096")) as url:
        target = f"{url}/v1/rewards"
        for clients, (name, bodies) in itertools.product(options.clients, forms.items()):
            begin, computed = time.perf_counter(), pack_seconds(url)
            load = closed_loop(target, bodies, clients, options.seconds, options.warm_up)
            outside = 1 - (pack_seconds(url) - computed) / (time.perf_counter() - begin)
            found["closed"].append(as_json("fastrm", name, clients, load) | {"outside_packs": outside})
            print(line(found["closed"][-1]), flush=True)
        for name, bodies in forms.items():
            capacity = max(one["rewards_per_second"] for one in found["closed"] if one["requests"] == name)
            rate = SHARE_OF_CAPACITY * capacity / (RESPONSES if name == "groups" else 1)
            load = open_loop(target, bodies, rate, options.seconds, options.warm_up)
            found["open"].append(as_json("fastrm", name, None, load) | {"requests_per_second": rate})
            print(line(found["open"][-1]), flush=True)
    with serving(stock_command(model)) as url:
        load = closed_loop(f"{url}/v1/rewards", forms["singles"], 8, options.seconds, options.warm_up)
        found["closed"].append(as_json("transformers, one at a time", "singles", 8, load))
        print(line(found["closed"][-1]), flush=True)
    for size in BATCHES:
        rate = in_batches(model, groups, size, options.seconds)
        found["batches"].append({"side": f"transformers, batches of {size}", "rewards_per_second": rate})
        print(f"transformers, batches of {size}: {rate:,.1f} rewards/s", flush=True)
    return found


def pack_seconds(url: str) -> float:
    """Return the seconds for which a server of fastrm has computed packs since its start."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("fastrm_pack_seconds_total "))


def line(one: dict) -> str:
    who = f"{one['clients']} clients" if one["clients"] else f"{one['requests_per_second']:.1f} requests/s"
    failed = f", failed {one['failed']}" if one["failed"] else ""
    return (
        f"{one['side']}, {one['requests']}, {who}: {one['rewards_per_second']:,.1f} rewards/s, "
        f"p50 {one['p50_ms']:,.0f} ms, p99 {one['p99_ms']:,.0f} ms{failed}"
    )


def goals(found: dict) -> dict[str, dict]:
    """Return the goals with what was reached."""

    def best(side: str, requests: str) -> float:
        return max(
            one["rewards_per_second"] for one in found["closed"] if (one["side"], one["requests"]) == (side, requests)
        )

    groups = [one for one in found["closed"] if (one["side"], one["requests"]) == ("fastrm", "groups")]
    fastest = max(groups, key=lambda one: one["rewards_per_second"])
    tail = {one["requests"]: one["p99_ms"] / one["p50_ms"] for one in found["open"]}
    reached = {
        "singles over groups, at least": (best("fastrm", "singles") / best("fastrm", "groups"), 0.85, ">="),
        "groups over one conversation at a time, at least": (
            best("fastrm", "groups") / best("transformers, one at a time", "singles"), 4, ">="
        ),
        "p99 over p50 at 70 % of capacity, groups, under": (tail["groups"], 2, "<"),
        "p99 over p50 at 70 % of capacity, singles, under": (tail["singles"], 2, "<"),
        "share of the time outside packs where groups are fastest, under": (fastest["outside_packs"], 0.05, "<"),
    }  # fmt: skip
    return {
        name: {"wanted": wanted, "reached": value, "met": value >= wanted if sign == ">=" else value < wanted}
        for name, (value, wanted, sign) in reached.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of a Qwen2-VL or Qwen2.5-VL reward model")
    parser.add_argument("--gate", action="store_true", help="compare the rewards, and time nothing")
    parser.add_argument("--clients", type=lambda text: [int(part) for part in text.split(",")], default=CLIENTS)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds before each load that do not count")
    parser.add_argument("--side", type=int, default=56, help="pixels of an image's side")
    parser.add_argument("--out", type=Path, default=file_of(device_name(), "-serving.json"))
    options = parser.parse_args()
    gated = list(itertools.islice(make_groups(options.side), GATED))
    with serving(fastrm_command(options.model)) as ours, serving(stock_command(options.model)) as stock:
        differences = check(options.model, gated, ours, stock)
    for name, difference in differences.items():
        print(f"gate: {name}: rewards differ by {difference:.1e} at most from RewardModel.score")
    if options.gate:
        return
    found = measure(options.model, make_groups(options.side, GATED), options)
    found = {"device": device_name(), **environment(), "model": options.model, "side": options.side} | found
    found["goals"] = goals(found)
    for name, goal in found["goals"].items():
        print(f"{name} {goal['wanted']}: {goal['reached']:.2f}{'' if goal['met'] else ' (missed)'}")
    write_json(options.out, found, indent=2)


if __name__ == "__main__":
    main()
