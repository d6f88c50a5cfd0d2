"""Folders of `fastrm export --for vllm` served by the real `vllm serve` on a CPU: its rewards are fastrm's.

`make test-vllm` installs vLLM and runs them; each model takes a server of its own, a minute or two.
"""

import numpy as np
import pytest
from PIL import Image

from fastrm import RewardModel
from fastrm.config import HeadConfig
from fastrm.data.template import ConversationEncoder
from fastrm.model.export import save_model
from fastrm.model.export_command import export_model
from fastrm.ui import Display
from tests.helpers.support import FAMILIES, TEXT, make_model
from tests.helpers.vllm_server import MISSING, check_rewards, conversation, vllm_server

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

ONE, BIASED = HeadConfig(layers=1, bias=False), HeadConfig(layers=1)
# name: family, head, pooling, anchor
MODELS = {
    "text, one layer": ("qwen2", ONE, "anchor", "last_token"),
    "text, two layers": ("qwen2", HeadConfig(), "anchor", "last_token"),
    "text, mean": ("qwen2", BIASED, "mean", "last_token"),
    "Llama, end of turn": ("llama", HeadConfig(), "anchor", "end_of_turn"),
    "Qwen3, three layers": ("qwen3", HeadConfig(layers=3, activation="tanh"), "anchor", "last_token"),
    "Qwen2-VL, one layer": ("qwen2_vl", BIASED, "anchor", "last_token"),
    "Qwen2-VL, two layers": ("qwen2_vl", HeadConfig(), "anchor", "last_token"),
    "Qwen2.5-VL, one layer": ("qwen2_5_vl", ONE, "anchor", "last_token"),
    "Qwen2.5-VL, two layers": ("qwen2_5_vl", HeadConfig(), "anchor", "last_token"),
    "Qwen2.5-VL, mean": ("qwen2_5_vl", HeadConfig(), "mean", "last_token"),
    "InternVL, one layer": ("internvl", BIASED, "anchor", "last_token"),
    "InternVL, two layers": ("internvl", HeadConfig(), "anchor", "last_token"),
    "InternVL, end of turn": ("internvl", ONE, "anchor", "end_of_turn"),
}
RESPONSES = ["yes, a red cat", "no", "so the dog sits on 2"]
# vLLM has attention on a CPU for heads of 32 and more.
WIDE = {**TEXT, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
VISION = {
    "qwen2_vl": {"embed_dim": 64, "hidden_size": 64},
    "qwen2_5_vl": {"hidden_size": 64, "out_hidden_size": 64},
    "internvl": {"hidden_size": 64},
}
IMAGE_OPTIONS = ("--mm-processor-kwargs", '{"use_fast": false}', "--limit-mm-per-prompt", '{"image": 3, "video": 0}')


def wide(family: str) -> dict:
    spec = FAMILIES[family]
    if family not in VISION:
        return {**spec, **WIDE, **({"head_dim": 32} if family == "qwen3" else {})}
    text = {**spec["text_config"], **WIDE}
    if family != "internvl":
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
    return {**spec, "text_config": text, "vision_config": {**spec["vision_config"], **VISION[family]}}


@pytest.fixture(scope="module", params=MODELS)
def served(request, tmp_path_factory):
    """A served model, and the same in fastrm."""
    family, head, pooling, anchor = MODELS[request.param]
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, wide(family))
        network = make_model(family, head=head, pooling=pooling)
    network.encoder = ConversationEncoder(network.encoder.tokenizer, network.encoder.vision, anchor=anchor)
    save_model(network, folder / "ours")
    with Display() as display:
        export_model(folder / "ours", folder / "model", "vllm", display)
    options = IMAGE_OPTIONS if family in VISION else ()
    with vllm_server(folder / "model", folder / "log.txt", *options) as server:
        yield server, RewardModel(network)


def image(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_one_by_one(served):
    prompts = ["Is this a cat?", "1 2\n\n so  \t ?!", "a"]
    check_rewards(*served, *({"prompt": prompt, "responses": RESPONSES} for prompt in prompts))


def test_a_long_prompt(served):
    check_rewards(*served, {"prompt": "the red dog sits on " * 120, "responses": RESPONSES})


def test_sixty_four_at_once_that_share_a_prompt(served):
    responses = [f"answer {number} the red " * (1 + number % 7) for number in range(64)]
    check_rewards(*served, {"prompt": "Is this a cat?", "responses": responses}, at_once=64)


def test_images_kept_and_resized_one_and_several(served):
    server, model = served
    if not model.network.is_vision:
        pytest.skip("a text model")
    kept, resized = image(84, 56, 1), image(90, 125, 2)
    groups = [[kept], [resized], [image(640, 480, 3)], [kept, resized], [resized, kept, image(56, 112, 4)]]
    check_rewards(
        server, model, *({"prompt": "which one?", "images": images, "responses": RESPONSES} for images in groups)
    )


def test_sixty_four_at_once_that_share_an_image(served):
    server, model = served
    if not model.network.is_vision:
        pytest.skip("a text model")
    responses = [f"answer {number} the red " * (1 + number % 7) for number in range(64)]
    check_rewards(server, model, {"prompt": "so?", "images": [image(90, 125, 5)], "responses": responses}, at_once=64)


def test_pooling_gives_the_same_and_the_raw_reward_is_the_default(served):
    server, model = served
    group = {"prompt": "Is this a cat?", "responses": ["no"]}
    ((wanted,),) = model.score([group])
    body = conversation(group, "no")
    _, pooled = server.ask("/pooling", body | {"task": "classify", "use_activation": False})
    _, plain = server.ask("/classify", body)
    assert pooled["data"][0]["data"][0] == pytest.approx(wanted, abs=1e-5)
    assert plain["data"][0]["probs"][0] == pytest.approx(wanted, abs=1e-5)


def test_score_is_refused_by_the_plugin_and_means_nothing_in_stock_vllm(served):
    server, model = served
    status, answer = server.ask("/score", {"queries": "Is this a cat?", "documents": RESPONSES})
    wanted = model.score([{"prompt": "Is this a cat?", "responses": RESPONSES}])[0]
    network = model.network
    if network.head_settings.layers > 1 or network.pooling == "mean" or network.encoder.anchor != "last_token":
        assert status == 400 and "send its messages to /classify" in answer["error"]["message"]
    else:
        found = [entry["score"] for entry in answer["data"]]
        assert np.abs(np.array(found) - wanted).min() > 1e-3


def test_a_text_without_the_anchor_is_an_error_to_that_request_alone(served):
    server, model = served
    if model.network.encoder.anchor != "end_of_turn":
        pytest.skip("every text has a last token")
    status, answer = server.ask("/classify", {"input": "no turn ends here", "use_activation": False})
    assert status >= 400 and "data" not in answer
    check_rewards(server, model, {"prompt": "Is this a cat?", "responses": RESPONSES})
