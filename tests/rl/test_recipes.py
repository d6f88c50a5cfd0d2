"""The recipes of docs/rl.md, run as they stand.

That of TRL trains with TRL. For trainers that do not install on a CPU there are stand-ins: modules with the base
classes that the recipes name, called as the trainers' sources call them (versions in docs/rl.md).
"""

import asyncio
import inspect
import json
import pickle
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from fastrm.errors import DataError
from fastrm.rl.openrlhf import reward_function
from fastrm.rl.rewards import Rewards, sigmoid
from fastrm.rl.verl import score_function
from tests.helpers.documents import blocks
from tests.helpers.reward_server import CountingScorer, reward_of, reward_server
from tests.helpers.support import make_tokenizer

RECIPES = blocks("docs/rl.md", "py")
QUESTION = [{"role": "user", "content": "2 + 2?"}]
RENDERED = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
READ = [{"role": "system", "content": "Be short."}, *QUESTION]


def png():
    return Image.new("RGB", (8, 8), "red")


def encoded():
    from fastrm.data.media.images import encode_png

    return encode_png(png())


@pytest.fixture
def server():
    with reward_server(CountingScorer()) as (url, bodies):
        yield url, bodies


def run_recipe(words, url, **names):
    """Run the recipe that holds all of some words, with a server's URL in place of the page's; None: it has none."""
    (recipe,) = [recipe for recipe in RECIPES if all(word in recipe for word in words)]
    assert ('Rewards("http://127.0.0.1:8000"' in recipe) == (url is not None)
    exec(compile(recipe.replace("http://127.0.0.1:8000", url or ""), "docs/rl.md", "exec"), names)
    return names


@pytest.fixture
def stand_in(monkeypatch):
    """A function that makes a module of a trainer, with what a recipe imports of it."""

    def make(name, **attributes):
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
        module = sys.modules[name]
        module.__dict__.update(attributes)
        return module

    return make


def test_every_recipe_is_run():
    tested = inspect.getsource(sys.modules[__name__])
    words = [
        "Sample(", "JudgeReward", "GRPOTrainer", "ScoredRollouts", "score_function", "RewardedAgent",
        "openrlhf import reward_function", "RewardPlugin", "slime", "areal_function", "easyr1_function",
    ]  # fmt: skip
    assert len(RECIPES) == len(words)
    for word, recipe in zip(words, RECIPES, strict=True):
        assert word in recipe and f'["{word}"' in tested
        assert len(recipe.strip().splitlines()) <= 20


def test_first_example(server):
    names = run_recipe(["Sample("], server[0])
    assert names["rewards"]([names["Sample"]("2 + 2?", "4", truth="4")]) == [1.0]


def test_a_judge_that_learns():
    reward = run_recipe(["JudgeReward"], None)["reward"]
    said = "<think>Response 1 is better.</think><answer>1</answer>"
    assert reward(["?", "?"], [said, said], answer=["1", "2"]) == [2.0, 0.5]


def test_trl(server, tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import GRPOConfig

    from tests.helpers.policies import vision_policy

    policy, processor = vision_policy()
    row = {"prompt": QUESTION, "images": [png()], "solution": "4"}
    arguments = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, num_generations=2,
        per_device_train_batch_size=2, max_completion_length=4, max_steps=1, report_to="none", save_strategy="no",
    )  # fmt: skip
    given = {"policy": policy, "processor": processor, "arguments": arguments, "dataset": Dataset.from_list([row] * 2)}
    names = run_recipe(["GRPOTrainer"], server[0], **given)
    logged = names["trainer"].state.log_history[0]
    assert {"rewards/fastrm/mean", "rewards/fastrm_async/mean"} <= logged.keys()
    assert [len(body["groups"]) for body in server[1]] == [1, 1]


# ---- verl


class Protocol:
    """verl's DataProto as far as a reward manager uses it: rows by slices, a row by its number."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return Protocol(self.rows[place]) if isinstance(place, slice) else self.rows[place]


class ManagerBase:
    def __init__(self, config, tokenizer, compute_score):
        self.config, self.tokenizer, self.compute_score = config, tokenizer, compute_score


def verl_row(tokenizer, response, prompt, **columns):
    """A row as verl pads it: prompt on the left, response on the right."""
    tokens = tokenizer.encode(response)
    padded = torch.tensor([*tokens, *[tokenizer.pad_token_id] * (40 - len(tokens))])
    mask = torch.tensor([0, 0, 1, 1, 1] + [1] * len(tokens) + [0] * (40 - len(tokens)))
    return types.SimpleNamespace(
        batch={"responses": padded, "attention_mask": mask},
        non_tensor_batch={"raw_prompt": np.array(prompt, dtype=object), "data_source": "digits", **columns},
    )


def test_verl_reward_manager(server, stand_in):
    stand_in("verl.experimental.reward_loop.reward_manager.base", RewardManagerBase=ManagerBase)
    names = run_recipe(["ScoredRollouts"], server[0])
    tokenizer = make_tokenizer()
    # As verl's RewardLoopWorker makes it through load_reward_manager. The base class takes three of them.
    manager = names["FastrmRewards"](
        config={}, tokenizer=tokenizer, compute_score=print, reward_router_address=None, reward_model_tokenizer=None
    )
    assert isinstance(manager, ManagerBase) and manager.tokenizer is tokenizer
    parts = [{"type": "image", "image": png()}, {"type": "text", "text": "So?"}]
    prompt, truth = [{"role": "user", "content": parts}], {"ground_truth": "red"}
    rows = [verl_row(tokenizer, text, prompt, reward_model=truth, extra_info={}) for text in ("blue", "red", "a \0")]

    async def score():
        return await asyncio.gather(*(manager.run_single(Protocol([row])) for row in rows))

    with pytest.raises(DataError, match=r"BAD_TEXT.*set `unscored`"):
        asyncio.run(score())
    manager.unscored = -3.5
    blue, red, bad = asyncio.run(score())
    read = [{"role": "user", "content": [{"type": "image"}, parts[1]]}]
    assert blue["reward_score"] == sigmoid(reward_of(read, [encoded()], "blue"))
    assert red == {"reward_score": 1.0, "reward_extra_info": {"unscored": 0.0}}
    assert bad == {"reward_score": -3.5, "reward_extra_info": {"unscored": 1.0}}


def test_verl_compute_score(server):
    compute = run_recipe(["score_function"], server[0])["compute_score"]
    assert inspect.iscoroutinefunction(compute)
    common = {"data_source": "digits", "ground_truth": "4", "reward_router_address": None}
    found = asyncio.run(compute(solution_str="5", extra_info={"prompt": QUESTION, "num_turns": None}, **common))
    assert found == {"score": sigmoid(reward_of(QUESTION, (), "5")), "unscored": 0.0}
    with pytest.raises(DataError, match='extra_info has no "prompt"'):
        asyncio.run(compute(solution_str="5", extra_info={}, **common))
    bad = {"solution_str": "a \0", "extra_info": {"prompt": QUESTION}}
    with pytest.raises(DataError, match=r"BAD_TEXT.*set `unscored`"):
        asyncio.run(compute(**bad, **common))
    compute = score_function(Rewards(server[0]), unscored=-3.5)
    assert asyncio.run(compute(**bad, **common)) == {"score": -3.5, "unscored": 1.0}


# ---- OpenRLHF


class SingleTurn:
    """OpenRLHF's SingleTurnAgentExecutor, with the generation of an engine that always says the same."""

    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        before, said = hf_tokenizer.encode(prompt), hf_tokenizer.encode(llm_engine)
        output = {"prompt": prompt, "label": label, "images": images, "reward": None, "scores": None, "extra_logs": {}}
        return {**output, "observation_tokens": before + said, "action_ranges": [(len(before), len(before + said))]}


def test_openrlhf_agent_with_images(server, stand_in):
    stand_in("openrlhf.utils.agent", SingleTurnAgentExecutor=SingleTurn)
    agent = run_recipe(["RewardedAgent"], server[0])["AgentExecutor"]()
    assert isinstance(agent, SingleTurn)
    pads = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    prompt = RENDERED.replace("2 + 2?", f"{pads}So?")
    said = "blue<|im_end|>"
    output = asyncio.run(agent.execute(prompt, "red", None, 99, make_tokenizer(), said, images=[png()]))
    read = [READ[0], {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "So?"}]}]
    reward = sigmoid(reward_of(read, [encoded()], "blue"))
    assert (output["reward"], output["scores"], output["extra_logs"]) == (reward, reward, {"reward": reward})
    output = asyncio.run(agent.execute(prompt, {"answer": "blue"}, None, 99, make_tokenizer(), said, images=[png()]))
    assert output["reward"] == 1.0
    output = asyncio.run(agent.execute(prompt, "red", None, 99, make_tokenizer(), said, images=["no such file"]))
    assert output["reward"] is None and output["scores"] is None


def test_openrlhf_reward_func(server):
    reward_func = run_recipe(["openrlhf import reward_function"], server[0])["reward_func"]
    queries = [RENDERED + text for text in ("5<|im_end|>", "4", "4")]
    labels = ["4", "4", {"answer": "5", "messages": QUESTION}]
    found = reward_func(queries, [RENDERED] * 3, labels)
    wanted = [sigmoid(reward_of(READ, (), "5")), 1.0, sigmoid(reward_of(QUESTION, (), "4"))]
    assert found["rewards"].tolist() == pytest.approx(wanted)
    assert torch.equal(found["rewards"], found["scores"])
    assert torch.equal(found["extra_logs"]["reward"], found["rewards"])
    with pytest.raises(DataError, match="1 prompts"):
        reward_func(queries, [RENDERED], labels)


PADS = "<|vision_start|>{}<|vision_end|>"
# Prompts, and what the decoded tokens of prompt and response begin with.
QUERIES = {
    "qwen": (RENDERED + PADS.format("<|image_pad|>"), RENDERED + PADS.format("<|image_pad|>" * 9)),
    "internvl": (f"<IMG_CONTEXT>\n{RENDERED}", f"<img>{'<IMG_CONTEXT>' * 9}</img>\n{RENDERED}"),
    "bos": ("2 + 2?", "<s>2 + 2?"),
    "no-bos": ("<bos>2 + 2?", "2 + 2?"),
}


@pytest.mark.parametrize(("prompt", "query"), QUERIES.values(), ids=QUERIES)
def test_openrlhf_response_is_what_follows_the_prompt(prompt, query):
    """The query is decoded tokens: with a run of tokens for each image, and with the token that begins texts."""
    scorer = CountingScorer()
    label = {"answer": "4", "messages": QUESTION}
    found = reward_function(Rewards(scorer))([query + "red"], [prompt], [label])
    assert found["rewards"].tolist() == pytest.approx([reward_of(QUESTION, (), "red")])


def test_openrlhf_query_of_another_prompt_is_refused():
    with pytest.raises(DataError, match="query 1 does not begin with its prompt"):
        reward_function(Rewards(CountingScorer()))(["2 + 2? 4", "2+2? 4"], ["2 + 2?"] * 2, ["4", "4"])


# ---- ms-swift, slime, AReaL, EasyR1


class AsyncORM:
    def __init__(self, args=None, **kwargs):
        self.args = args


def test_swift(server, stand_in):
    module = stand_in("swift.rewards", AsyncORM=AsyncORM, orms={}, rm_plugins={"default": object})
    run_recipe(["RewardPlugin"], server[0])
    image = {"bytes": encoded(), "path": None}
    question = {"role": "user", "content": "<image>So?"}
    rows = [[question, {"role": "assistant", "content": text}] for text in ("red", "blue")]
    columns = {"messages": rows, "images": [[image], [dict(image)]], "solution": ["red", "red"]}
    columns |= {"prompt_id": ["1", "1"], "trainer_state": None, "is_truncated": [False, False]}
    reward_function = module.orms["fastrm"](args=None)
    rewards = [reward_of(rows[0][:1], [encoded()], text) for text in ("red", "blue")]
    assert isinstance(reward_function, AsyncORM)
    assert asyncio.run(reward_function(["red", "blue"], **columns)) == [1.0, sigmoid(rewards[1])]
    plugin = module.rm_plugins["fastrm"](model=None, template=None)
    assert plugin([{"messages": row, "images": [image], "solution": "red"} for row in rows]) == rewards
    assert [len(body["groups"]) for body in server[1]] == [1, 1]
    plugin([{"messages": rows[0], "images": [], "solution": "red"}])
    assert server[1][-1]["groups"][0]["messages"] == [question]  # a place, so that the reader misses its image
    with pytest.raises(DataError, match="does not end with the assistant's turn"):
        plugin([{"messages": rows[0][:1], "images": [image], "solution": "red"}])
    with pytest.raises(DataError, match="messages: got no column, wanted 1 rows"):
        asyncio.run(reward_function(["red"], images=[[image]]))


def test_slime(server):
    names = run_recipe(["slime"], server[0])
    pictures = {"images": [png()]}
    parts = [{"type": "image"}, {"type": "text", "text": "So?"}]
    prompt = [{"role": "user", "content": parts}]
    samples = [
        types.SimpleNamespace(prompt=RENDERED, response="5<|im_end|>", label="4", multimodal_inputs=None),
        types.SimpleNamespace(prompt=RENDERED, response="4", label="4", multimodal_inputs=None),
        types.SimpleNamespace(prompt=prompt, response="x", label=None, multimodal_inputs=pictures),
    ]
    wanted = [sigmoid(reward_of(READ, (), "5")), 1.0, sigmoid(reward_of(prompt, [encoded()], "x"))]
    assert asyncio.run(names["batched_custom_rm"](None, samples)) == wanted
    assert [asyncio.run(names["custom_rm"](None, sample)) for sample in samples] == wanted
    samples[0].response = "\0"
    with pytest.raises(DataError, match=r"without a reward: \{'BAD_TEXT': 1\}"):
        asyncio.run(names["batched_custom_rm"](None, samples))


def test_areal(server):
    reward_fn = run_recipe(["areal_function"], server[0])["reward_fn"]
    call = {"prompt": RENDERED, "prompt_ids": [1], "completion_ids": [2], "answer": "4", "query_id": "7"}
    assert reward_fn(completions="4<|im_end|>", **call) == 1.0
    assert reward_fn(completions="5", **call) == sigmoid(reward_of(READ, (), "5"))
    found = reward_fn(completions="5", messages=QUESTION, images=[png()], **call)
    assert found == sigmoid(reward_of(QUESTION, [encoded()], "5"))
    # AReaL's AsyncRewardWrapper submits this to a ProcessPoolExecutor, which pickles it.
    one = partial(reward_fn, completions="5", messages=QUESTION, images=[png()], **call)
    assert pickle.loads(pickle.dumps(one))() == found


def test_easyr1(server, tmp_path):
    names = run_recipe(["easyr1_function"], server[0])
    assert names["REWARD_TYPE"] == "batch"
    png().save(tmp_path / "a.png")
    truth = json.dumps({"prompt": "So?", "images": [str(tmp_path / "a.png")], "answer": "red"})
    inputs = [{"response": text, "response_length": 3, "ground_truth": truth} for text in ("red", "blue")]
    message = [{"role": "user", "content": "So?"}]
    reward = sigmoid(reward_of(message, [(tmp_path / "a.png").read_bytes()], "blue"))
    assert names["compute_score"](inputs) == [{"overall": 1.0}, {"overall": reward}]
    with pytest.raises(DataError, match="ground_truth: got 'red', wanted JSON"):
        names["compute_score"]([{"response": "red", "response_length": 3, "ground_truth": "red"}])
