"""What is known of a family stands in its own file; a model type outside the table is never taken for another."""

from types import SimpleNamespace

import pytest

from fastrm.config import ModelConfig
from fastrm.data.media.format import FormatSettings, VisionFormat
from fastrm.model import families
from fastrm.model.families import FAMILIES, VISION_FAMILIES, VisionFamily
from fastrm.model.vision.tower import VisionTower
from fastrm.train import step_cost
from tests.helpers import support
from tests.helpers.project import PROJECT
from tests.helpers.support import make_model

OTHER = "another_vl"


def _members(protocol) -> set[str]:
    return {*protocol.__annotations__, *(name for name in vars(protocol) if not name.startswith("_"))}


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_each_vision_family_has_all_that_the_interface_asks_for(name):
    family = FAMILIES[name]
    missing = [member for member in _members(VisionFamily) if not hasattr(family, member)]
    assert not missing
    assert family.model_type == name and issubclass(family.tower, VisionTower)


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_each_vision_family_makes_a_tower_a_format_and_costs(name):
    network = make_model(name)
    assert type(network.tower) is FAMILIES[name].tower
    form = FAMILIES[name].load_format(network.model.config, network.encoder.tokenizer, None, FormatSettings())
    assert isinstance(form, VisionFormat) and type(form) is type(network.encoder.vision)
    costs = step_cost.make_cost_model(network.model.config, ModelConfig(path="unused"))
    assert costs.per_media_token > 0 and costs.per_media_pair > 0


def test_each_vision_family_is_tested():
    assert set(VISION_FAMILIES) <= support.FAMILIES.keys()


def test_a_family_that_is_not_in_the_table_has_no_tower_no_costs_and_no_format():
    network = make_model("internvl")
    config = network.model.config
    config.model_type = OTHER
    with pytest.raises(KeyError, match=OTHER):
        families.make_tower(SimpleNamespace(config=config))
    with pytest.raises(KeyError, match=OTHER):
        step_cost.make_cost_model(config, ModelConfig(path="unused"))


def test_only_a_familys_own_files_and_the_table_name_it_in_code():
    """Of the data and the model side; published sizes stand in a table of their own."""
    own = {"families.py", "architectures.py"}
    names = [f'"{name}"' for name in VISION_FAMILIES if name != "internvl"] + ["QWEN2_VL", "QWEN2_5_VL", "QWEN3_VL"]
    found = []
    for side in ("data", "model"):
        for file in (PROJECT / "fastrm" / side).rglob("*.py"):
            if file.name in own or file.parent.name in ("vision", "media"):
                continue
            found += [f"{file.name}: {name}" for name in names if name in file.read_text()]
    assert found == []
