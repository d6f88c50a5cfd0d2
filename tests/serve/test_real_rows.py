"""Served rewards of rows that others wrote equal those of the model: real weights on text, and real photos."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fastrm.config import HeadConfig
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reward_model import RewardModel
from fastrm.limits import MediaLimits
from fastrm.model.exactness import ROUNDINGS
from fastrm.model.export import make_encoder
from fastrm.model.loading import load_backbone
from fastrm.model.network import RewardNetwork
from fastrm.serve.app import make_app
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.settings import ServeSettings
from tests.helpers.rows import captions, needs_data, pandalm
from tests.helpers.servers import running
from tests.helpers.smollm2 import needs_smollm2
from tests.helpers.support import make_model
from tests.helpers.waiting import PATIENCE


def ask(url, group):
    answer = httpx.post(f"{url}/v1/rewards", json={"groups": [group]}, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    return answer.json()["rewards"][0]


def served(model, groups, **settings):
    """The rewards of groups, which twelve clients ask for at once."""
    scheduler = Scheduler([Scorer("model", Ensemble([model]), 16384)], **settings)
    with running(make_app(scheduler, ServeSettings())) as url, ThreadPoolExecutor(12) as clients:
        return list(clients.map(lambda group: ask(url, group), groups))


def singles(groups):
    return [{**group, "responses": [response]} for group in groups for response in group["responses"]]


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    """A reward model with the pretrained weights, and a new head."""
    torch.manual_seed(0)
    backbone = load_backbone(str(smollm2_folder))
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    encoder = make_encoder(backbone.config, tokenizer, None, "last_token", MediaLimits())
    network = RewardNetwork(backbone, HeadConfig(), encoder)
    network.set_kernels(torch.float32, attention="sdpa")
    return RewardModel(network)


@needs_data
@needs_smollm2
def test_pretrained_weights_give_served_rewards_of_somebody_elses_rows(smollm2):
    groups = pandalm(3)
    wanted = np.array(smollm2.score(groups))
    alone = np.reshape([smollm2.score([single])[0][0] for single in singles(groups)], wanted.shape)
    # Another pack is another matrix product. The band is what that changes by measure, without the server: each
    # response is scored by itself, and the differences bound others as in fastrm/model/exactness.py.
    rounding = np.sqrt(np.mean((alone - wanted) ** 2))
    band = ROUNDINGS * rounding + np.finfo(np.float32).eps * np.abs(wanted).max()
    assert band < 1e-3 * np.ptp(wanted)
    np.testing.assert_allclose(served(smollm2, groups), wanted, rtol=0, atol=band)
    found = [reward for [reward] in served(smollm2, singles(groups[:2]))]
    np.testing.assert_allclose(found, wanted[:2].ravel(), rtol=0, atol=band)


@needs_data
def test_real_cartoons_and_captions_give_the_rewards_of_the_model():
    model = RewardModel(make_model("qwen2_5_vl"))
    groups, sent = captions(6)
    wanted = model.score(groups)
    assert served(model, sent) == wanted
    found = [reward for [reward] in served(model, singles(sent), window_ms=100)]
    np.testing.assert_allclose(found, [reward for rewards in wanted for reward in rewards], rtol=0, atol=1e-6)
