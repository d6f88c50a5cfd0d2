"""A policy that is a judge: preferences as questions, its reward and figures, and a run whose policy judges."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import yaml

from fastrm.config import load_config, load_run
from fastrm.errors import ConfigError, DataError
from fastrm.evaluate.options import JudgeTexts, RowOptions
from fastrm.grpo.config import GrpoConfig, QuestionsSection, RewardSection
from fastrm.grpo.evaluation import evaluate_judge
from fastrm.grpo.preferences import read_comparisons, read_lessons
from fastrm.grpo.questions import as_dataset
from fastrm.grpo.report import show_report
from fastrm.grpo.rewarding import RewardFunction
from fastrm.grpo.run import run_grpo, trl_arguments
from fastrm.judge.command import JudgeOptions
from fastrm.judge.command import evaluate_judge as evaluate_by_command
from fastrm.prompts.spec import JudgeSpec, load_spec
from fastrm.rl.judging import JudgeReward
from fastrm.train.loop import train
from tests.helpers.project import PROJECT
from tests.helpers.runs import tiny_config, write_rows
from tests.helpers.smollm2 import needs_smollm2
from tests.helpers.source_rows import png

pytest.importorskip("trl")
SPEC = JudgeSpec(parser="r1_reward", prompt="{{ question }}\n1: {{ first }}\n2: {{ second }}")
TEXT = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}  # fmt: skip
PAIRS = [
    {"id": str(n), "prompt": f"Which is larger, {n} or {n + 1}?", "chosen": str(n + 1), "rejected": str(n)}
    for n in range(8)
]


def compare(folder, lines, order="both", seed=0, left_out=None, **source):
    section = QuestionsSection(path=str(write_rows(folder / "pairs.jsonl", lines)), spec="r1_reward", **source)
    left_out = Counter() if left_out is None else left_out
    return read_comparisons(section, SPEC, order=order, seed=seed, left_out=left_out)


def test_a_preference_is_a_question_in_each_order_and_its_truth_is_the_winner_s_place(tmp_path):
    group = {"prompt": "Say a.", "responses": ["a", "b", "c"], "preferences": [[0, 1], [2, 1]]}
    found = compare(tmp_path, [PAIRS[0], group])
    asked = [(question.messages[-1].text, question.truth, question.number) for question in found]
    assert asked == [
        ("Which is larger, 0 or 1?\n1: 1\n2: 0", "1", 0), ("Which is larger, 0 or 1?\n1: 0\n2: 1", "2", 0),
        ("Say a.\n1: a\n2: b", "1", 1), ("Say a.\n1: b\n2: a", "2", 1),
        ("Say a.\n1: b\n2: c", "2", 2), ("Say a.\n1: c\n2: b", "1", 2),
    ]  # fmt: skip
    assert [row["solution"] for row in as_dataset(found)] == [truth for _, truth, _ in asked]


def test_critiques_of_completions_are_no_part_of_questions(tmp_path):
    """What a judge learns by reinforcement is the verdict alone, so that one of two critiques may be missing."""
    rated = (("a", "4"), ("b", "1"))
    completions = [{"response": text, "annotations": {"Helpfulness": {"Rating": rating}}} for text, rating in rated]
    row = {"prompt": "What?", "completions": completions}
    plain = [(one.messages, one.truth) for one in compare(tmp_path, [row])]
    completions[1]["critique"] = "Wrong: <answer>2</answer>"
    assert [(one.messages, one.truth) for one in compare(tmp_path, [row])] == plain


def test_ties_are_left_out_and_counted(tmp_path):
    tied = {"prompt": "Say a.", "responses": ["a", "A", "c"], "scores": [2, 2, 1]}
    left_out = Counter()
    found = compare(tmp_path, [tied, PAIRS[0]], left_out=left_out)
    assert [question.origin.rpartition(":")[2] for question in found] == ["1", "1", "1", "1", "2", "2"]
    assert left_out == {str(tmp_path / "pairs.jsonl"): 1}
    with pytest.raises(DataError, match="nothing but ties, and a judge learns which of two responses is better"):
        compare(tmp_path, [tied | {"scores": [1, 1, 1]}])


def test_random_orders_are_balanced_and_follow_the_seed(tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(1000)]
    first, again, other = (
        [question.truth for question in compare(tmp_path, rows, "random", seed)] for seed in (0, 0, 1)
    )
    # A fair coin leaves 450 to 550 once in 600 seeds; the seeds are fixed.
    assert first == again != other and all(450 < found.count("1") < 550 for found in (first, other))


def test_rows_of_r1_reward_are_preferences_in_both_orders_with_their_image(tmp_path):
    said = "#### [Question]:\nWhat?\n#### [Response 1]:\nA cat.\n#### [Response 2]:\nA dog.\n#### **Output Format:**\n1"
    (tmp_path / "a.png").write_bytes(png())
    parts = [{"type": "image", "image": "x"}, {"type": "text", "text": said}]
    message = json.dumps([{"role": "user", "content": parts}])
    row = {"question": "What?", "message": message, "answer": ["<answer>2</answer>"], "image": "a.png"}
    first, second = compare(tmp_path, [row])
    assert [first.messages[-1].text, first.truth] == ["What?\n1: A cat.\n2: A dog.", "2"]
    assert [second.messages[-1].text, second.truth] == ["What?\n1: A dog.\n2: A cat.", "1"]
    assert len(first.images) == len(second.images) == 1


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "So?", "chosen": "yes"}, r'pairs.jsonl:2: "rejected"'),
        ("{", r"pairs.jsonl:2: .*BAD_JSON"),
        ({"prompt": "So?", "chosen": "yes", "rejected": "no", "videos": ["a.mp4"]}, "VIDEO"),
        ({"prompt": "So?", "chosen": "yes", "rejected": "no", "images": ["b.png"]}, r"pairs.jsonl:2: .*IMAGE_MISSING"),
        ({"prompt": "So?", "chosen": "yes", "rejected": "no", "tools": [{"name": "f"}]}, "pairs.jsonl:2: .*NOT_SHOWN"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_named(tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        compare(tmp_path, [PAIRS[0], row])


def test_rows_beyond_the_file_are_named(tmp_path):
    assert len(compare(tmp_path, PAIRS, rows=[6, 8])) == 4
    with pytest.raises(DataError, match=r"has 8 rows, and rows: \[6, 9\] names more; write \[6, 8\]"):
        compare(tmp_path, PAIRS, rows=[6, 9])


def test_a_supervised_start_teaches_what_a_judge_is_trained_on(tmp_path):
    rows = [PAIRS[0] | {"chosen_reason": "True.", "rejected_reason": "False."}]
    source = QuestionsSection(path=str(write_rows(tmp_path / "pairs.jsonl", rows)), spec="r1_reward", order="both")
    lessons = read_lessons(source, SPEC, seed=0)
    assert [one.lesson for one in lessons] == [
        "<think>Response 1: True.\nResponse 2: False.</think><answer>1</answer>",
        "<think>Response 1: False.\nResponse 2: True.</think><answer>2</answer>",
    ]
    assert [one.truth for one in lessons] == ["1", "2"]


def test_rows_are_rows_of_the_file_and_numbers_those_of_its_preferences(tmp_path):
    """A list of seven has 21 preferences, whose texts are two groups."""
    group = {"prompt": "Say a.", "responses": list("abcdefg"), "scores": [7, 6, 5, 4, 3, 2, 1]}
    path = str(write_rows(tmp_path / "pairs.jsonl", [PAIRS[0], group, PAIRS[1], PAIRS[2]]))
    wanted = [("2", number) for number in range(1, 22)] + [("3", 22)]
    for order, times in (("random", 1), ("both", 2)):
        source = QuestionsSection(path=path, spec="r1_reward", order=order, rows=[1, 3])
        for found in (
            read_lessons(source, SPEC, seed=0),
            read_comparisons(source, SPEC, order=order, seed=0, left_out=Counter()),
        ):
            places = [(one.origin.rpartition(":")[2], one.number) for one in found]
            assert places == [place for place in wanted for _ in range(times)]


def test_what_the_texts_of_a_batch_are_like_is_logged():
    logged = {}
    function = RewardFunction(RewardSection(scheme="judge"), 0, None, SPEC)
    thinking = "<think>Response 1 is better.</think>"
    said = [f"{thinking}<answer>1</answer>", f"{thinking}<answer>2</answer>", "<answer>1</answer>", "I cannot say."]
    rewards = function(["?"] * 4, said, ["1"] * 4, log_metric=logged.__setitem__)
    assert rewards == [2.0, 0.5, 1.0, 0.0] and logged.pop("reward_seconds/judge_0") > 0
    assert logged == {
        "accuracy": 0.5, "format": 0.5, "consistency": 0.0, "no_verdict": 0.25, "first_place_rate": 2 / 3,
        "unscored/judge_0": 0.0,
    }  # fmt: skip
    logged.clear()
    function(["?"], ["Well."], ["1"], log_metric=logged.__setitem__)
    assert logged["no_verdict"] == 1.0 and "first_place_rate" not in logged, "there is no share of no verdicts"


def evaluate(monkeypatch, folder, write, process=None, count=4, *, is_cut=False):
    """The figures of a policy that writes `write(question)`."""

    def answers_and_cuts(policy, processor, questions, max_tokens):
        return [(write(one), is_cut) for one in questions]

    monkeypatch.setattr("fastrm.grpo.evaluation.answers_and_cuts", answers_and_cuts)
    return evaluate_judge(None, None, compare(folder, PAIRS[:count]), 8, JudgeReward(SPEC), process)


def test_figures_are_those_of_both_orders(tmp_path, monkeypatch):
    def shown_first_is_better(question):
        return "<think></think><answer>1</answer>"

    found = evaluate(monkeypatch, tmp_path, shown_first_is_better)
    assert (found["accuracy"], found["position_flip_rate"], found["first_place_rate"]) == (0.5, 1.0, 1.0)
    assert (found["questions"], found["preferences"], found["accuracy_as_released"]) == (8, 4, 1.0)
    found = evaluate(monkeypatch, tmp_path, lambda question: f"<answer>{question.truth}</answer>")
    assert (found["accuracy"], found["position_flip_rate"], found["first_place_rate"]) == (1.0, 0.0, 0.5)
    assert (found["format"], found["num_parse_failures"]) == (0.0, 0)


def test_a_policy_that_answers_neither_1_nor_2_is_wrong_and_counted(tmp_path, monkeypatch):
    found = evaluate(monkeypatch, tmp_path, lambda question: "I like both.")
    assert (found["accuracy"], found["num_parse_failures"], found["format"]) == (0.0, 8, 0.0)
    assert found["position_flip_rate"] is None and found["first_place_rate"] is None
    assert found["examples"][0] == {"question": f"{tmp_path}/pairs.jsonl:1", "truth": "1", "answer": "I like both."}


def test_a_text_that_was_cut_before_its_verdict_is_a_failure_as_in_fastrm_eval(tmp_path, monkeypatch):
    def thinks(question):
        return f"<think>Response {question.truth} says"

    found = evaluate(monkeypatch, tmp_path, thinks, is_cut=True)
    assert (found["accuracy"], found["accuracy_as_released"]) == (0.0, 1.0)
    assert found["num_parse_failures"] == found["texts_cut"] == 8
    found = evaluate(monkeypatch, tmp_path, thinks)
    assert (found["accuracy"], found["num_parse_failures"], found["texts_cut"]) == (1.0, 0, 0)


def test_processes_share_the_questions_of_an_evaluation(tmp_path, monkeypatch):
    gathered = []

    def gather(rows):
        gathered.extend(rows)
        return list(gathered)

    monkeypatch.setattr("accelerate.utils.gather_object", gather)

    def write(question):
        return f"<answer>{1 + question.number % 2}</answer>"

    alone = evaluate(monkeypatch, tmp_path, write)
    processes = [SimpleNamespace(process_index=n, num_processes=2) for n in (1, 0)]
    assert [evaluate(monkeypatch, tmp_path, write, process) for process in processes][-1] == alone


def write_config(folder, **sections):
    spec = SPEC.model_dump(include={"kind", "parser", "prompt"}) | {"generator": {"model": str(folder / "run/policy")}}
    (folder / "judge.yaml").write_text(yaml.safe_dump(spec | {"decoding": {"max_tokens": 24}}))
    source = {"path": str(write_rows(folder / "pairs.jsonl", PAIRS)), "spec": str(folder / "judge.yaml")}
    tree = {
        "run": {"dir": str(folder / "run"), "max_steps": 2, "device": "cpu"},
        "policy": {
            "init": TEXT, "tokenizer": {"train_vocab_size": 300},
            "fit": {"data": source | {"order": "both"}, "steps": 120, "batch": 8, "lr": 5e-3},
        },
        "data": {"train": source, "eval": source},
        "rewards": [{"scheme": "judge"}],
        "rollouts": {"num": 2, "max_tokens": 24},
        "optim": {"lr": 1e-4, "batch_prompts": 2, "micro_batch": 4, "precision": "fp32"},
    } | sections  # fmt: skip
    path = folder / "grpo.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(tree))))
    return path


def test_the_policy_of_a_run_is_a_judge_with_the_figures_of_its_report(tmp_path, capsys):
    report = run_grpo(load_run(GrpoConfig, write_config(tmp_path)))
    assert report["after"]["format"] > 0 and report["after"]["preferences"] == 8, "it writes verdicts"
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and {"accuracy", "format", "consistency", "no_verdict"} <= rows[0].keys()
    assert (tmp_path / "run/report.png").stat().st_size > 10_000
    options = JudgeOptions(
        RowOptions(), JudgeTexts(generations=tmp_path / "texts.jsonl"), json_out=tmp_path / "out.json"
    )
    evaluate_by_command([f"judge:{tmp_path / 'judge.yaml'}"], str(tmp_path / "pairs.jsonl"), options)
    judged = json.loads((tmp_path / "out.json").read_text())
    names = ("accuracy", "interval", "position_flip_rate", "first_place_rate", "num_parse_failures", "texts_cut")
    stored = json.loads((tmp_path / "run/report.json").read_text())["after"]
    assert {name: judged[name] for name in names} == {name: stored[name] for name in names}
    capsys.readouterr()
    show_report(report)
    said = capsys.readouterr().out
    assert "verdicts that turn when the order turns" in said and "texts in the SPEC's form" in said


@needs_smollm2
def test_smollm2_takes_a_step_as_a_judge(tmp_path, smollm2_folder):
    rows = [{"prompt": "What is 2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."}] * 2
    source = {"path": str(write_rows(tmp_path / "two.jsonl", rows)), "spec": str(tmp_path / "judge.yaml")}
    config = load_run(
        GrpoConfig,
        write_config(
            tmp_path, policy={"path": str(smollm2_folder)}, data={"train": source, "eval": source},
            rollouts={"num": 2, "max_tokens": 8}, run={"dir": str(tmp_path / "run"), "max_steps": 1, "device": "cpu"},
        ),
    )  # fmt: skip
    report = run_grpo(config)
    assert report["training"]["steps"] == 1 and report["before"]["preferences"] == 2


@pytest.mark.parametrize(
    "change, said",
    [
        ({"data": {"train": {"path": "a"}, "eval": {"path": "a"}}}, "the scheme judge needs data.train.spec"),
        ({"data": {"train": {"path": "a", "spec": "x"}, "eval": {"path": "a"}}}, "data.eval.spec: got None, and data"),
        ({"data": {"train": {"path": "a", "order": "both"}, "eval": {"path": "a"}}}, "order: belongs to spec"),
        ({"data": {"train": {"path": "a", "spec": "x", "truth": "y"}, "eval": {"path": "a"}}}, "truth: with spec"),
        ({"rewards": [{"scheme": "rule", "parts": {"format": 1.0}}]}, "parts: belong to the scheme judge"),
        ({"rewards": [{"scheme": "judge", "model": "x"}]}, "scheme judge: leave out its model"),
        ({"rewards": [{"scheme": "judge", "answers": "math"}]}, "answers: a judge's verdict is read by its SPEC's"),
        ({"rewards": [{"scheme": "rule"}]}, "the scheme rule reads a text as an answer.*set scheme: judge"),
        ({"rewards": [{"scheme": "judge"}, {"scheme": "hybrid", "model": "x"}]}, "the scheme hybrid reads a text"),
        ({"rewards": [{"scheme": "model", "model": "x"}]}, "the scheme model reads a text"),
        ({"judge": "runs/model"}, "judge: a reward model measures answers, not the verdicts of data"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path, change, said):
    with pytest.raises(ConfigError, match=said):
        load_run(GrpoConfig, write_config(tmp_path, **change))


def test_a_judge_of_single_responses_is_refused(tmp_path):
    source = {"path": str(write_rows(tmp_path / "a.jsonl", PAIRS)), "spec": "llava_critic_pointwise"}
    policy = {"init": TEXT, "tokenizer": {"train_vocab_size": 300}}
    path = write_config(tmp_path, policy=policy, data={"train": source, "eval": source})
    with pytest.raises(ConfigError, match=r"kind is pointwise; wanted a judge of kind pairwise"):
        run_grpo(load_run(GrpoConfig, path))


def test_the_shipped_experiment_measures_on_images_that_nothing_was_trained_on(monkeypatch):
    monkeypatch.chdir(PROJECT)
    config = load_run(GrpoConfig, PROJECT / "configs/grpo/judge_digits.yaml")
    spec = load_spec(config.data.train.spec)
    asked, held_out = (
        read_comparisons(source, spec, order="both", seed=0, left_out=Counter())
        for source in (config.data.train, config.data.eval)
    )
    taught = read_lessons(config.policy.fit.data, spec, seed=0)
    keys = [{ref.key for one in part for ref in one.images} for part in (taught, asked, held_out)]
    assert all(keys) and not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert spec.generator.model == f"{config.run.dir}/policy"


def test_what_stable_reinforce_clamps_cannot_occur_in_a_step(tmp_path):
    """docs/grpo.md: rollouts are learned from once, by the policy that wrote them, so that ratios are 1."""
    arguments = trl_arguments(load_run(GrpoConfig, write_config(tmp_path)), tmp_path)
    assert arguments.num_iterations == 1
    assert arguments.gradient_accumulation_steps % (arguments.steps_per_generation * arguments.num_iterations) == 0


@pytest.mark.parametrize("sections", [{}, {"model": {"init": {**TEXT, "tie_word_embeddings": True}}}])
def test_a_judge_that_was_trained_with_supervision_goes_on_by_reinforcement(tmp_path, sections):
    """The form that `paradigm: judge` taught is what the policy of grpo begins with, and it ends its texts."""
    policy, rollouts = {"path": str(tmp_path / "judge/model")}, {"num": 2, "max_tokens": 48}
    grpo = write_config(tmp_path, policy=policy, rollouts=rollouts)
    taught = {"judge": {"spec": str(tmp_path / "judge.yaml"), "order": "both"}, "optim": {"lr": 1e-2, "batch_pairs": 8}}
    made = {"run": {"dir": str(tmp_path / "judge"), "max_steps": 80}}
    path = tiny_config(tmp_path, tmp_path / "pairs.jsonl", **made, **taught, **sections)
    path.write_text("paradigm: judge\n" + path.read_text())
    train(load_config(path))
    report = run_grpo(load_run(GrpoConfig, grpo))
    assert report["before"]["format"] == 1.0 and report["training"]["steps"] == 2, report["before"]
