import pytest

from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reward_model import RewardModel
from fastrm.serve.scorer import Scorer
from tests.helpers.support import make_model


@pytest.fixture(scope="module")
def model():
    return RewardModel(make_model("qwen2_5_vl"))


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer("tiny", Ensemble([model]), 8192)
