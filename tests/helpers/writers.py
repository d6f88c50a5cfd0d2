"""Networks of critics and judges, their records, and their naive losses on stock transformers."""

import numpy as np
import torch
import torch.nn.functional as F

from fastrm.config import LossConfig
from fastrm.data.record import Message, Preference, Record, Response
from fastrm.data.template import TurnLoss
from fastrm.model.network import RewardNetwork
from tests.helpers import stock
from tests.helpers.support import make_image, make_model, words

CENTER, FACTOR = 0.01, 0.7
TURNS = {"critic": TurnLoss(False, FACTOR), "judge": TurnLoss(True)}
LOSSES = {"critic": LossConfig(center=CENTER), "judge": LossConfig(kind="cross_entropy")}


def _group(seed: int, num_responses: int, num_critiques: int = 1, image=None) -> Record:
    """Responses to one prompt with critiques of their own; those of one response begin alike."""
    rng = np.random.default_rng(seed)
    question, responses = words(rng, 25), []
    for _ in range(num_responses):
        text = f"Judge this. {question} Response: {words(rng, 20)}"
        prompt = Message("user", (image, text) if image is not None else (text,))
        start = words(rng, 18)
        responses += [
            Response((prompt, Message("assistant", (f"{start} {words(rng, int(rng.integers(2, 30)))}",))))
            for _ in range(num_critiques)
        ]
    count = len(responses)
    edges = tuple(Preference(a, b, 0.1, 1.0 + a) for a in range(count) for b in range(a + 1, count))
    return Record(f"g{seed}", tuple(responses), edges, "test", f"test:{seed}")


def _ratings(record: Record) -> Record:
    ratings = tuple(Preference(number, number, weight=1.0 + number) for number in range(len(record.responses)))
    return Record(record.id, record.responses, ratings, record.source, record.origin)


def writer_network(family: str, paradigm: str, **options) -> RewardNetwork:
    network = make_model(family, paradigm=paradigm, **options)
    network.encoder.turns = TURNS[paradigm]
    return network


def writer_records(family: str, paradigm: str) -> list[Record]:
    image = make_image(112, 84, 1) if "vl" in family else None
    records = [_group(1, 3), _group(2, 2, 3), _group(3, 2, image=image)]
    return records if paradigm == "critic" else [_ratings(record) for record in records]


def naive(network: RewardNetwork, records: list[Record]) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss sum, rewards or mean log probabilities), each conversation alone through the stock model, whole logits."""
    total, found = torch.zeros(()), []
    stock.set_stock_attention(network)
    for record in records:
        rewards, losses = [], []
        for response in record.responses:
            inputs = stock.stock_inputs(network.encoder, response)
            hidden = network.model(**inputs, use_cache=False).last_hidden_state[0]
            logits, targets = F.linear(hidden, network.lm_weight), inputs["input_ids"][0]  # (n, V), (n,)
            # The critique, the token that ends the turn, and a newline, which no model writes.
            written = network.encoder.tokenizer(response.text + "<|im_end|>\n")["input_ids"]
            assert targets[-len(written) :].tolist() == written
            losses.append(F.cross_entropy(logits[:-1], targets[1:], reduction="none")[-len(written) : -1])
            if network.paradigm == "critic":
                rewards.append(network.score(hidden[-1])[0])
        for edge in record.preferences:
            if network.paradigm == "judge":
                total = total + edge.weight * losses[edge.winner].sum()
                continue
            chosen, rejected = rewards[edge.winner], rewards[edge.loser]
            term = -F.logsigmoid(chosen - rejected - edge.margin) + CENTER * (chosen + rejected).square()
            total = total + edge.weight * (term + FACTOR * (losses[edge.winner].mean() + losses[edge.loser].mean()))
        found += rewards if network.paradigm == "critic" else [-part.mean() for part in losses]
    return total, torch.stack(found)
