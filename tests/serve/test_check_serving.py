"""fastrm check-serving: right servers agree by every API; each wrong one is found out, and its fault named."""

import base64
import copy
from contextlib import nullcontext
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from fastrm.data.media.images import image_size
from fastrm.data.record import ImageRef
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ConfigError, ExactnessError, ServerError
from fastrm.evaluate.ensemble import Ensemble
from fastrm.evaluate.reward_model import RewardModel
from fastrm.limits import MediaLimits
from fastrm.model.export import save_model
from fastrm.serve.app import make_app
from fastrm.serve.check import prompts
from fastrm.serve.check.causes import Cell, Explainer
from fastrm.serve.check.clients import APIS
from fastrm.serve.check.command import Comparison, check_serving, compare, comparison_table, summary, verdict
from fastrm.serve.check.prompts import KEPT, RESIZED, checked_prompts
from fastrm.serve.protocols import vllm
from fastrm.serve.protocols.bodies import sigmoid
from fastrm.serve.rendered_text import group_of
from fastrm.serve.scheduler import Scheduler
from fastrm.serve.scorer import Scorer
from fastrm.serve.settings import ServeSettings
from fastrm.ui import Display
from tests.helpers.servers import running
from tests.helpers.support import make_model
from tests.helpers.waiting import PATIENCE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(dtype="fp32", family="qwen2_5_vl"):
    return RewardModel(make_model(family, dtype=DTYPES[dtype]), f"{dtype} in memory")


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Long prompts that are short: their length is no fault that any test here is about."""
    monkeypatch.setattr(prompts, "LONG", 60)


def server(model):
    return TestClient(make_app(Scheduler([Scorer("tiny", Ensemble([model]), 32768)]), ServeSettings()), "http://localhost")


def check(model, served, api="vllm"):
    with server(served) as client:
        return compare(model, client, api, None, Display(silent=True))


def cause(model, found):
    assert not found.agrees and "differ by more than 0.001" in summary(found)
    (line,) = [line for line in verdict(found, model, load) if line.startswith("likely cause: ")]
    return line.removeprefix("likely cause: ")


def with_template(model, template):
    network = copy.copy(model.network)
    tokenizer = copy.deepcopy(network.encoder.tokenizer)
    tokenizer.chat_template = template
    network.encoder = ConversationEncoder(tokenizer, network.encoder.vision)
    return RewardModel(network, model.weights)


@pytest.mark.parametrize("api", APIS)
def test_our_own_server_agrees_by_every_api(model, api):
    found = check(model, model, api)
    assert found.agrees and not found.left_out
    assert found.worst.difference < 1e-5
    assert {cell.prompt.kind for cell in found.cells} == {
        prompt.kind for prompt in checked_prompts(model.network.encoder)
    }


@pytest.mark.parametrize(
    "change, named",
    [
        ("{% set add_generation_prompt = true %}@", "template: the server opens another turn behind the response"),
        ("{% set whole %}@{% endset %}{{ whole.rstrip() }}", "anchor: the server's text lacks the white space"),
        ("{% set whole %}@{% endset %}{{ whole.replace(system, '') }}", "server leaves the default system turn out"),
        ("{% set whole %}@{% endset %}{{ whole.replace(system, 'You judge.') }}", "has another default system turn"),
        ("{% for m in messages %}<|im_start|>{{ m.role[0] }} {% if m.content is string %}{{ m.content }}{% else %}"
         "{% for p in m.content %}{{ p.text or '<|image_pad|>' }}{% endfor %}{% endif %}\n{% endfor %}",
         "template or tokenizer: a conversation has"),
    ],
    ids=["generation prompt", "no last line break", "no default system", "other default system", "other marks"],
)  # fmt: skip
def test_a_server_of_another_template_is_named(model, change, named):
    encoder = model.network.encoder
    turn = "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n"
    text = change.replace("@", encoder.tokenizer.chat_template)
    if "You judge" in text:
        turn = "You are a helpful assistant."
    served = with_template(model, f"{{% set system = '{turn}' %}}" + text)
    assert named in cause(model, check(model, served))


@pytest.mark.parametrize(
    "function, named",
    [
        (sigmoid, "activation: the server's rewards are the sigmoid of ours"),
        (lambda reward: 0.5 * reward + 1.0, "scale: the server's rewards are 0.5 of ours and 1 more"),
        (lambda reward: 1.0, "activation: every reward is 1, as a softmax"),
    ],
    ids=["sigmoid", "scale", "softmax"],
)
def test_a_server_that_gives_a_function_of_the_reward_is_named(model, monkeypatch, function, named):
    monkeypatch.setattr(vllm, "activated", lambda rewards, use_activation: list(map(function, rewards)))
    assert named in cause(model, check(model, model))


def with_processor(**settings):
    served = load()
    for name, value in settings.items():
        setattr(served.network.encoder.vision.processor, name, value)
    return served


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"size": {"shortest_edge": 784, "longest_edge": 784 * 12}}, "image resizing: a conversation has"),
        ({"resample": Image.Resampling.NEAREST}, "image resizing: images that need none agree"),
        ({"image_mean": [0.1, 0.2, 0.3]}, "images: even those that are kept as they are disagree"),
    ],
    ids=["pixel limits", "resampling", "normalisation"],
)
def test_a_server_that_reads_images_in_another_way_is_named(model, settings, named):
    found = check(model, with_processor(**settings))
    assert max(cell.difference for cell in found.cells if not cell.prompt.images) < 1e-5
    assert named in cause(model, found)


def test_a_server_that_does_not_read_images_is_named(model, monkeypatch):
    def without_images(messages, responses):
        for message in messages:
            if isinstance(message["content"], list):
                message["content"] = "".join(part.get("text", "") for part in message["content"])
        return group_of(messages, responses)

    monkeypatch.setattr(vllm, "group_of", without_images)
    assert "images: the server does not read them" in cause(model, check(model, model))


@pytest.mark.parametrize("dtype", ["bf16"])
def test_a_server_of_lower_precision_is_named(model, dtype):
    assert f"are of the size that {dtype} makes" in cause(model, check(model, load(dtype)))


def test_a_server_of_other_weights_has_no_named_fault(model):
    other = RewardModel(make_model("qwen2_5_vl", seed=1), "fp32")
    assert "unknown: none of the faults that are tried" in cause(model, check(model, other))


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_no_tokens_of_a_server_that_remembers_its_rewards_are_no_other_count(model, api):
    """Here of other weights, that says of every conversation that it has computed nothing."""
    rewards = np.random.default_rng(0)

    def answer(_):
        reward = rewards.normal()
        vllm = {"data": [{"probs": [reward]}], "usage": {"prompt_tokens": 0}}
        sglang = {"embedding": [reward], "meta_info": {"prompt_tokens": 0}}
        return httpx.Response(200, json=vllm if api == "vllm" else sglang)

    with httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer)) as client:
        found = compare(model, client, api, None, Display(silent=True))
    assert "unknown: none of the faults that are tried" in cause(model, found)


def test_the_table_fits_80_columns_and_counts_flips(model):
    found = check(model, RewardModel(make_model("qwen2_5_vl", seed=1), "fp32"))
    lines = comparison_table(found).as_lines(80)
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("prompts") for line in lines) == 1, "the table is in one piece"
    pairs, flipped = map(int, lines[-1].split()[-2:])
    assert pairs > 20 and 0 < flipped < pairs
    assert f"{flipped} preferences flip" in summary(found)


def compared(model, ours, served, band=1e-3):
    """Rewards of one prompt's responses, here and there."""
    prompt = checked_prompts(model.network.encoder)[0]
    pairs = enumerate(zip(ours, served, strict=True))
    return Comparison([Cell(prompt, place, one, other, (1, None)) for place, (one, other) in pairs], [], [], band)


@pytest.mark.parametrize("served, flips", [((2, 1), "1"), ((1, 1), "1"), ((1, 2), "0")], ids=["turned", "tie", "kept"])
def test_a_preference_that_a_server_turns_or_loses_is_counted_whichever_response_is_first(model, served, flips):
    for ours, theirs in (((1.0, 2.0), served), ((2.0, 1.0), served[::-1])):
        assert comparison_table(compared(model, ours, theirs)).as_lines(80)[-1].split()[-1] == flips


def test_a_reward_that_is_always_the_same_is_a_softmax_only_if_it_is_one(model):
    found = compared(model, (0.1, 0.5, 0.2, 0.9), (0.3,) * 4)
    said = Explainer(model, load, found.band).explain(found.cells)
    assert said.startswith("constant: every reward is 0.3, whatever is asked") and "softmax" not in said


def test_a_band_as_wide_as_the_rewards_themselves_proves_nothing(model):
    turned = compared(model, (0.1, 0.1004, 0.1002), (0.1004, 0.1, 0.1002))
    assert turned.worst.difference < turned.band and not turned.agrees
    said = summary(turned)
    assert "cannot tell" in said and "0.0004" in said and "--band 4e-05 or less" in said
    assert compared(model, (0.1, 0.9), (0.1004, 0.9)).agrees


def test_images_of_whole_patches_are_kept_and_others_are_not(model):
    encoder = model.network.encoder
    for prompt in checked_prompts(encoder):
        for image in prompt.images:
            ref = ImageRef(data=base64.b64decode(image.partition(",")[2]))
            size, side = encoder.measure(ref), 28
            is_kept = image_size(ref, MediaLimits()) == (size.width * side, size.height * side)
            assert is_kept == (prompt.kind == KEPT)
            assert prompt.kind in (KEPT, RESIZED)


def test_prompts_that_the_server_refuses_are_counted(model, monkeypatch):
    monkeypatch.setattr(prompts, "LONG", 600)
    scheduler = Scheduler([Scorer("tiny", Ensemble([model]), 1000)])
    with TestClient(make_app(scheduler, ServeSettings()), "http://localhost") as client:
        found = compare(model, client, "vllm", None, Display(silent=True))
    assert not found.agrees and {prompt.kind for prompt, _ in found.refused} == {"long texts"}
    assert "2 prompts are refused" in summary(found)
    assert "TOO_LONG" in verdict(found, model, load)[0]


@pytest.mark.parametrize(
    "url, api, kind, said",
    [
        ("http://127.0.0.1:1", "vllm", ServerError, "no answer .ConnectError"),
        ("127.0.0.1", "vllm", ConfigError, "--url: got '127.0.0.1', wanted one such as"),
        ("http://127.0.0.1:abc", "vllm", ConfigError, "--url: got 'http://127.0.0.1:abc', wanted one such as"),
        ("http://127.0.0.1:1", "tgi", ConfigError, "--api: got 'tgi', wanted one of"),
    ],
)
def test_a_server_that_is_away_and_bad_options_are_named(model, monkeypatch, url, api, kind, said):
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *_, **__: model)
    with pytest.raises(kind, match=said):
        check_serving(Path("model"), url, api, token=None, timeout=5, band=None, loading={"device": "cpu"})


@pytest.mark.parametrize(
    "answer, said",
    [
        (httpx.Response(401, text="no"), "HTTP 401: no; give --token"),
        (httpx.Response(404, text="lost"), "HTTP 404: lost; is --api right"),
        (httpx.Response(500, text="broken"), "HTTP 500: broken; see the server's log"),
        (httpx.Response(501, text="<html>\n  <p>501</p>\n"), "HTTP 501: <html> <p>501</p>; see the server's log"),
        (httpx.Response(200, json={"data": []}), "has another form than --api says"),
        (httpx.Response(200, text="<html>"), "has another form than --api says"),
        (httpx.Response(200, content='{"data": [{"probs": [NaN]}]}'), "is no finite number"),
    ],
    ids=["401", "404", "500", "501", "form", "html", "nan"],
)
def test_answers_that_are_no_rewards_are_named(model, answer, said):
    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(lambda request: answer))
    with client, pytest.raises(ServerError) as caught:
        compare(model, client, "vllm", None, Display(silent=True))
    assert said in str(caught.value) and str(caught.value).startswith("http://server/classify: ")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_command_compares_a_folder_with_a_url(model, tmp_path, capsys, monkeypatch, precision):
    save_model(model.network, tmp_path / "model")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)  # a path of more than 80 letters would be a line of its own
    app = make_app(Scheduler([Scorer("tiny", Ensemble([model]), 32768)]), ServeSettings())
    loading = {"device": "cpu", "dtype": precision}
    options = {"token": None, "timeout": PATIENCE, "band": 1e-3, "loading": loading}
    with running(app) as url, nullcontext() if precision == "fp32" else pytest.raises(ExactnessError, match="differ"):
        check_serving(Path("model"), url, "fastrm", **options)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    said = " ".join(said.split())
    wanted = "the server agrees" if precision == "fp32" else "of the size that fp32 makes here"
    assert wanted in said and "odd characters 12 0 " in said
