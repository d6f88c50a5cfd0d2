"""`fastrm grpo`: questions in, a trained policy and an honest report out, on TRL's trainer and a CPU."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fastrm.config import load_config, load_run
from fastrm.data.record import Message
from fastrm.errors import ConfigError, DataError, GroupError, InterruptedRun, StorageError
from fastrm.grpo.config import FitSection, GrpoConfig, QuestionsSection, RewardSection
from fastrm.grpo.evaluation import evaluate_policy
from fastrm.grpo.questions import Question, read_questions
from fastrm.grpo.report import show_report
from fastrm.grpo.rewarding import RewardFunction
from fastrm.grpo.run import timed_calls
from fastrm.rl.client import ServerError
from fastrm.rl.rewards import Rewards, sigmoid
from fastrm.train.loop import train
from tests.helpers.project import PROJECT
from tests.helpers.reward_server import CountingScorer, Reply, reward_of, reward_server
from tests.helpers.runs import TINY, fastrm_here, tiny_config, write_rows

pytest.importorskip("trl")
SETTINGS = {
    "run": {"max_steps": 2, "device": "cpu"},
    "policy": {
        "init": TINY["model"]["init"], "tokenizer": {"train_vocab_size": 300}, "min_pixels": 784, "max_pixels": 3136,
        "fit": {"data": {"path": "digits:train", "rows": [0, 40]}, "steps": 2, "batch": 4, "lr": 1e-3},
    },
    "data": {
        "train": {"path": "digits:eval", "rows": [0, 8]},
        "eval": {"path": "digits:eval", "rows": [8, 20]},
    },
    "rewards": [{"scheme": "rule", "answers": "text"}],
    "rollouts": {"num": 2, "max_tokens": 4},
    "optim": {"lr": 1e-3, "batch_prompts": 2, "micro_batch": 4, "precision": "fp32"},
}  # fmt: skip
TEXT = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}  # fmt: skip


def write(folder, **sections):
    tree = json.loads(json.dumps(SETTINGS)) | sections
    tree["run"] = {**SETTINGS["run"], "dir": str(folder / "run"), **sections.get("run", {})}
    path = folder / "grpo.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(tree))))  # without YAML's aliases
    return path


def run(folder, **sections):
    from fastrm.grpo.run import run_grpo

    return run_grpo(load_run(GrpoConfig, write(folder, **sections)))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    train(load_config(tiny_config(folder, "digits:eval", run={"max_steps": 1})))
    return str(folder / "run" / "model")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("fastrm.rl.client.random.uniform", lambda low, high: 0.01)


def test_a_run_leaves_what_it_says(tmp_path, reward_model, capfd):
    rewards = [{"scheme": "rule", "answers": "text"}, {"scheme": "hybrid", "model": reward_model, "answers": "text"}]
    code, said = fastrm_here(capfd, "grpo", write(tmp_path, rewards=rewards, judge=reward_model))
    assert not code, said
    report = json.loads((tmp_path / "run/report.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and report["training"]["steps"] == 2
    for row in rows:
        # Accuracy and the rule are counted apart, and mean the same.
        assert row["accuracy"] == pytest.approx(row["rewards/rule_0/mean"], abs=1e-6)
        assert row["reward"] == pytest.approx(row["rewards/rule_0/mean"] + row["rewards/hybrid_1/mean"], abs=1e-5)
    waited = sum(row["reward_seconds/rule_0"] + row["reward_seconds/hybrid_1"] for row in rows)
    assert report["training"]["reward_seconds"] == pytest.approx(waited) and 0 < report["training"]["reward_share"] < 1
    assert 0 < report["training"]["generation_seconds"] + waited < report["training"]["seconds"]
    show_report(report)
    assert "% into generating rollouts." in capfd.readouterr().out
    for part in ("before", "after"):
        found = report[part]
        assert found["questions"] == 12 and found["interval"][0] <= found["accuracy"] <= found["interval"][1]
        assert math.isfinite(found["judge_reward"])
    assert (tmp_path / "run/report.png").stat().st_size > 10_000


def test_the_saved_policy_answers_as_the_evaluation_after_says(tmp_path):
    from fastrm.grpo.config import PolicySection
    from fastrm.grpo.policy import load_policy

    report = run(tmp_path)
    section = PolicySection(path=str(tmp_path / "run/policy"), min_pixels=784, max_pixels=3136)
    policy, processor = load_policy(section, [], 0)
    held_out = read_questions(QuestionsSection(**SETTINGS["data"]["eval"]))
    assert evaluate_policy(policy, processor, held_out, 4, "text", None) == report["after"]


@pytest.mark.parametrize("has_torchvision", [False, True])
def test_a_folder_without_its_image_processor_is_refused(has_torchvision, tmp_path, monkeypatch):
    """Of such a folder transformers returns the tokenizer alone, and questions would be asked without their images."""
    from fastrm.grpo.config import PolicySection
    from fastrm.grpo.policy import load_policy, save_policy

    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: has_torchvision)
    policy = SETTINGS["policy"]
    questions = read_questions(QuestionsSection(**policy["fit"]["data"]))
    made = PolicySection(init=policy["init"], tokenizer=policy["tokenizer"])
    save_policy(*load_policy(made, questions, 0), tmp_path)
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    assert stored["processor_class"] == "Qwen2_5_VLProcessor", "one that transformers knows"
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"policy\.path.*processor"):
        load_policy(PolicySection(path=str(tmp_path)), [], 0)


def test_equal_seeds_give_equal_runs_and_others_do_not(tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        run(tmp_path / name, run={"seed": seed})
        rows = [json.loads(line) for line in (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()]
        found.append([(row["loss"], row["reward"], row["entropy"]) for row in rows])
    assert found[0] == found[1] != found[2]


def test_a_text_policy_learns_by_url(tmp_path):
    rows = [{"prompt": f"Is {n} even?", "answer": "yes" if n % 2 == 0 else "no"} for n in range(8)]
    source = {"path": str(write_rows(tmp_path / "questions.jsonl", rows)), "truth": "answer"}
    policy = {"init": TEXT, "tokenizer": {"train_vocab_size": 300}}
    with reward_server(CountingScorer()) as (url, bodies):
        report = run(
            tmp_path, policy=policy, data={"train": source, "eval": source}, judge=url,
            rewards=[{"scheme": "model", "model": url, "weight": 0.5}],
        )  # fmt: skip
    assert report["before"]["questions"] == 8 and report["training"]["steps"] == 2
    assert [len(body["groups"]) for body in bodies] == [8, 2, 2, 8]  # before, two steps of two questions, after


def test_a_server_that_goes_away_during_training_is_named(tmp_path):
    from fastrm.grpo.run import run_grpo

    with reward_server(CountingScorer(), [Reply(401, b"no token")]) as (url, _):
        config = load_run(GrpoConfig, write(tmp_path, rewards=[{"scheme": "model", "model": url}]))
        with pytest.raises(ServerError, match="HTTP 401: no token"):
            run_grpo(config)


def test_a_model_that_is_named_twice_is_loaded_once_on_the_process_s_device(tmp_path, reward_model):
    from fastrm.grpo.run import _open_scorers

    rewards = [{"scheme": scheme, "model": reward_model} for scheme in ("model", "hybrid")]
    config = load_run(GrpoConfig, write(tmp_path, rewards=rewards, judge=reward_model))
    scorers = _open_scorers(config, torch.device("cpu", 0))  # as accelerate names it under a launcher
    assert list(scorers) == [reward_model] and scorers[reward_model].network.device.type == "cpu"


def test_the_rollouts_generation_is_timed_and_the_policy_as_it_was():
    owner = type("Policy", (), {"generate": staticmethod(lambda seconds: time.sleep(seconds) or "answer")})()
    spent = timed_calls(owner, "generate")
    assert owner.generate(0.05) == "answer" and owner.generate(seconds=0.1) == "answer"
    with pytest.raises(TypeError):
        owner.generate("a word")
    assert len(spent) == 3 and spent[0] >= 0.05 and spent[1] >= 0.1
    del owner.generate
    assert owner.generate(0) == "answer" and len(spent) == 3


def test_the_supervised_start_teaches(tmp_path):
    from fastrm.grpo.config import PolicySection
    from fastrm.grpo.policy import fit, load_policy

    rows = [{"prompt": f"Which letter is number {n}?", "solution": "ABCD"[n]} for n in range(4)]
    source = QuestionsSection(path=str(write_rows(tmp_path / "questions.jsonl", rows)))
    questions = read_questions(source)
    policy, processor = load_policy(PolicySection(init=TEXT, tokenizer={"train_vocab_size": 300}), questions, 0)
    before = evaluate_policy(policy, processor, questions, 4, "auto", None)["accuracy"]
    fit(policy, processor, questions, FitSection(data=source, steps=60, batch=8, lr=5e-3), 0, lambda done: None)
    assert before < 1 and evaluate_policy(policy, processor, questions, 4, "auto", None)["accuracy"] == 1


def test_answers_are_matched_once_and_within_the_logged_time(monkeypatch):
    matched, logged = [], {}

    def match(response, truth, kind):
        matched.append(response)
        time.sleep(0.05)
        return response == truth

    for place in ("fastrm.rl.rewards.is_match", "fastrm.grpo.rewarding.is_match"):
        monkeypatch.setattr(place, match, raising=False)
    for scheme in ("rule", "model", "hybrid"):
        settings = RewardSection(scheme=scheme, model=None if scheme == "rule" else "http://x", answers="text")
        function = RewardFunction(settings, 0, CountingScorer())
        found = function(["2 + 2?"] * 2, ["4", "5"], ["4", "4"], log_metric=logged.__setitem__)
        assert matched == ["4", "5"] and logged["accuracy"] == 0.5
        assert logged[f"reward_seconds/{scheme}_0"] >= 0.1
        rewards = [reward_of([{"role": "user", "content": "2 + 2?"}], (), text) for text in "45"]
        assert found == {"rule": [1, 0], "model": rewards, "hybrid": [1, sigmoid(rewards[1])]}[scheme]
        matched.clear()


def test_processes_share_the_questions_of_an_evaluation(monkeypatch):
    """All ranks work: while one evaluated alone, the others waited in a collective that NCCL ends after 10 minutes."""
    questions = [Question((Message("user", (f"{n}?",)),), str(n % 2), f"file:{n}") for n in range(5)]
    shares, gathered = [], []

    def answer(policy, processor, share, max_tokens):
        shares.append([question.origin for question in share])
        return ["1" * (1 + int(question.origin[5:]) % 3) for question in share]

    def gather(rows):
        gathered.extend(rows)
        return list(gathered)

    monkeypatch.setattr("fastrm.grpo.evaluation.answer", answer)
    monkeypatch.setattr("accelerate.utils.gather_object", gather)
    judge = Rewards(CountingScorer())
    alone = evaluate_policy(None, None, questions, 4, "text", judge)
    processes = [SimpleNamespace(process_index=n, num_processes=2) for n in (1, 0)]
    found = [evaluate_policy(None, None, questions, 4, "text", judge, process) for process in processes]
    assert found[-1] == alone and alone["questions"] == 5 and 0 < alone["accuracy"] < 1
    assert sorted(shares[1] + shares[2]) == shares[0] and abs(len(shares[1]) - len(shares[2])) == 1


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["rewards.0.scheme=hybrid"], "scheme hybrid: name its model"),
        (["rewards.0.model=http://x"], "scheme rule: leave out its model"),
        (["optim.micro_batch=3"], "micro_batch 3 does not divide the 4 rollouts of a step"),
        (["rollouts.number=4"], r"unknown key rollouts.number; did you mean rollouts.num\?"),
        (["policy.path=somewhere"], "set exactly one of policy.path and policy.init"),
        (["rewards=[]"], "rewards"),
        (["optim.kl=0.1"], "optim.kl needs policy.path without policy.fit"),
        (["rewards.0.weight=0"], "rewards: all have weight 0, so that nothing would be learned"),
        (["policy.init={hidden_size: 32}"], "policy.init needs model_type"),
        (["run.dir=''"], "run.dir: got ''"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path, overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_run(GrpoConfig, write(tmp_path), overrides)


def test_things_that_are_not_there_are_named(tmp_path):
    text = {"init": TEXT, "tokenizer": {"train_vocab_size": 300}}
    with pytest.raises(ConfigError, match="a text model, but digits:eval:1 has an image"):
        run(tmp_path, policy=text)
    with pytest.raises(ConfigError, match=r"policy.path: .*none: no such folder"):
        run(tmp_path, policy={"path": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match=r"policy.init: transformers refuses it: .*nosuch"):
        run(tmp_path, policy={**text, "init": {**TEXT, "model_type": "nosuch"}})
    with pytest.raises(ConfigError, match=r"digits:eval: has 8 questions, fewer than the 16 of a step"):
        run(tmp_path, optim={**SETTINGS["optim"], "batch_prompts": 16})
    with pytest.raises(DataError, match="no questions in rows 5000 to 6000"):
        run(tmp_path, data=SETTINGS["data"] | {"eval": {"path": "digits:eval", "rows": [5000, 6000]}})


def test_rollouts_as_long_as_all_positions_are_refused(tmp_path):
    path = str(write_rows(tmp_path / "questions.jsonl", [{"prompt": f"{n}?", "solution": "4"} for n in range(2)]))
    with pytest.raises(ConfigError, match=r"rollouts.max_tokens: 1,024, but the policy has 1,024 positions"):
        run(
            tmp_path, policy={"init": TEXT, "tokenizer": {"train_vocab_size": 300}},
            data={"train": {"path": path}, "eval": {"path": path}}, rollouts={"num": 2, "max_tokens": 1024},
        )  # fmt: skip


def test_vllm_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("fastrm.grpo.run.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="got vllm, which is not installed"):
        run(tmp_path, rollouts={"backend": "vllm", "num": 2})


def test_a_folder_that_holds_a_run_is_left_as_it_is(tmp_path):
    for name in ("report.json", "metrics.jsonl"):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        (folder / name).write_text("mine")
        with pytest.raises(ConfigError, match=rf"run: holds a run already \({name}\); set run.dir"):
            run(tmp_path / name)
        assert [file.read_text() for file in folder.iterdir()] == ["mine"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"run.dir .*file: cannot be made: File exists; choose another"):
        run(tmp_path, run={"dir": str(tmp_path / "file")})


def test_files_that_are_no_policy_are_refused(tmp_path, reward_model):
    """Of a reward model transformers makes a policy with a random head, or with that of before it was trained."""
    from fastrm.grpo.config import PolicySection
    from fastrm.grpo.policy import load_policy, save_policy

    def refused(folder, said):
        with pytest.raises(ConfigError, match=said):
            load_policy(PolicySection(path=str(folder)), [], 0)

    refused(reward_model, r"policy.path: '.*model' lacks lm_head.weight, as a reward model does, and is no policy")
    questions = [Question((Message("user", ("So?",)),), "yes", "file:1")]
    made = PolicySection(init={**TEXT, "tie_word_embeddings": True}, tokenizer={"train_vocab_size": 300})
    policy, processor = load_policy(made, questions, 0)
    save_policy(policy, processor, tmp_path)
    assert load_policy(PolicySection(path=str(tmp_path)), [], 0)[1].pad_token == processor.pad_token
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"score.0.weight": torch.zeros(1, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, r"has a reward head \(score.0.weight\)")
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    refused(tmp_path, "cannot be loaded")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "chat_template.jinja").unlink()
    refused(tmp_path, "policy.path '.*': has no chat template")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    refused(tmp_path / "adapter", "policy.path: '.*adapter' is an adapter, wanted a whole policy")


def test_a_policy_without_a_pad_token_is_padded_as_trl_does(tmp_path):
    from fastrm.grpo.config import PolicySection
    from fastrm.grpo.policy import load_policy, save_policy

    questions = [Question((Message("user", (text,)),), "yes", "file:1") for text in ("So?", "Is it really so?")]
    policy, tokenizer = load_policy(PolicySection(init=TEXT, tokenizer={"train_vocab_size": 300}), questions, 0)
    tokenizer.pad_token = None
    save_policy(policy, tokenizer, tmp_path)
    policy, tokenizer = load_policy(PolicySection(path=str(tmp_path)), [], 0)
    assert evaluate_policy(policy, tokenizer, questions, 4, "auto", None)["questions"] == 2


def test_a_step_without_any_reward_ends_the_run_by_name(tmp_path):
    class Unscorable(CountingScorer):
        def score(self, groups, on_error):
            return [GroupError(number, None, "TOO_LONG", "is too long") for number, _ in enumerate(groups)]

    with reward_server(Unscorable()) as (url, _), pytest.raises(DataError, match=r"step 1: .* reward \(TOO_LONG 4\)"):
        run(tmp_path, rewards=[{"scheme": "model", "model": url}])


def test_a_run_that_is_stopped_says_what_is_left(tmp_path, monkeypatch):
    from trl import GRPOTrainer

    def stop(self, *_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(GRPOTrainer, "train", stop)
    with pytest.raises(InterruptedRun, match=r"stopped before the policy was saved; .*run holds the metrics of its"):
        run(tmp_path)


def test_full_configuration_says_where_every_value_comes_from():
    config = load_run(GrpoConfig, PROJECT / "configs/grpo/full.yaml")
    assert (config.rollouts.num, config.optim.batch_prompts, config.run.epochs) == (8, 256, 1)
    assert config.rewards[0].scheme == "hybrid"
    lines = (PROJECT / "configs/grpo/full.yaml").read_text().splitlines()
    values = [line for line in lines if ":" in line and not line.lstrip().startswith("#") and line[-1] != ":"]
    assert len(values) > 20 and all(any(mark in line for mark in ("[P]", "[T]", "[ours]")) for line in values)


def test_the_experiment_with_pretrained_weights_reads_what_the_commands_before_it_write():
    config = load_run(GrpoConfig, PROJECT / "bench/pretrained/grpo.yaml")
    trained = load_config(PROJECT / "bench/pretrained/human.yaml")
    assert config.policy.path == trained.model.path
    assert config.judge == config.rewards[0].model == f"{trained.run.dir}/model"
    assert config.data.train.path == config.data.eval.path == trained.data.train[1].path


def test_digits_configuration_measures_on_images_that_nothing_was_trained_on():
    config = load_run(GrpoConfig, PROJECT / "configs/grpo/digits.yaml")
    taught, asked, held_out = (
        {ref.key for question in read_questions(source) for ref in question.images}
        for source in (config.policy.fit.data, config.data.train, config.data.eval)
    )
    assert not taught & asked and not taught & held_out and not asked & held_out
    assert config.policy.fit.data.path == load_config(PROJECT / "configs/quickstart.yaml").data.train[0].path


def test_losses_that_are_no_numbers_stop_the_run(tmp_path, monkeypatch):
    from trl import GRPOTrainer

    from fastrm.errors import DivergedError

    def compute(self, model, inputs):
        return sum(parameter.sum() for parameter in model.parameters()) * torch.nan

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compute)
    with pytest.raises(DivergedError, match="step 1: the loss is"):
        run(tmp_path)
