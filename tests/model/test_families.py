"""A vision family that is entered in the list of families alone is an error, never taken for another."""

from types import SimpleNamespace

import pytest

from fastrm.config import ModelConfig
from fastrm.limits import MediaLimits
from fastrm.model import export, towers
from fastrm.model.families import VISION_FAMILIES
from fastrm.train import step_cost
from tests.helpers.support import make_model

OTHER = "another_vl"


@pytest.fixture(scope="module")
def config():
    """A config of InternVL under another name."""
    config = make_model("internvl").model.config
    config.model_type = OTHER
    return config


def test_each_vision_family_has_a_tower_and_costs():
    assert towers.TOWERS.keys() == step_cost.MEDIA_COSTS.keys() == set(VISION_FAMILIES)


def test_a_vision_family_without_a_tower_is_an_error(config, monkeypatch):
    monkeypatch.setattr(towers, "VISION_FAMILIES", (*VISION_FAMILIES, OTHER))
    with pytest.raises(KeyError, match=OTHER):
        towers.make_tower(SimpleNamespace(config=config))


def test_a_vision_family_without_a_media_format_is_an_error(config, monkeypatch):
    monkeypatch.setattr(export, "VISION_FAMILIES", (*VISION_FAMILIES, OTHER))
    tokenizer = make_model("internvl").encoder.tokenizer
    with pytest.raises(KeyError, match=f"{OTHER} has no media format"):
        export.make_encoder(config, tokenizer, None, "last_token", MediaLimits())


def test_a_vision_family_without_costs_is_an_error(config):
    with pytest.raises(KeyError, match=OTHER):
        step_cost.make_cost_model(config, ModelConfig(path="unused"))
