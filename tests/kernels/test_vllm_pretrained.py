"""Real pretrained weights in the real `vllm serve`: rewards of rows that somebody else wrote, and check-serving."""

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from fastrm import RewardModel, cli
from fastrm.config import HeadConfig
from fastrm.limits import MediaLimits
from fastrm.model.export import make_encoder, save_model
from fastrm.model.export_command import export_model
from fastrm.model.loading import load_backbone
from fastrm.model.network import RewardNetwork
from fastrm.ui import Display
from tests.helpers.rows import needs_data, pandalm
from tests.helpers.smollm2 import needs_smollm2
from tests.helpers.vllm_server import MISSING, check_rewards, vllm_server

pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), needs_data, needs_smollm2]


@pytest.fixture(scope="module", params=[1, 2], ids=["one layer", "two layers"])
def served(request, smollm2_folder, tmp_path_factory):
    """SmolLM2 with a new head, served, and its folder as fastrm writes it."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    backbone = load_backbone(str(smollm2_folder))
    encoder = make_encoder(
        backbone.config, AutoTokenizer.from_pretrained(smollm2_folder), None, "last_token", MediaLimits()
    )
    save_model(RewardNetwork(backbone, HeadConfig(layers=request.param), encoder), folder / "ours")
    with Display() as display:
        export_model(folder / "ours", folder / "model", "vllm", display)
    with vllm_server(folder / "model", folder / "log.txt") as server:
        yield server, folder / "ours"


def test_rows_of_others_one_by_one_and_at_once(served):
    server, folder = served
    model = RewardModel.from_pretrained(folder, device="cpu", dtype="fp32")
    check_rewards(server, model, *pandalm(6))
    check_rewards(server, model, *pandalm(6), at_once=4)


def test_check_serving_agrees(served):
    server, folder = served
    result = CliRunner().invoke(cli.app, ["check-serving", str(folder), "--url", server.url, "--api", "vllm"])
    print(result.output)
    assert result.exit_code == 0, result.output
