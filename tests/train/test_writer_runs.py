"""Runs of critics and judges: what they learn, what they save, who can load it, and that a resumed run is the run."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from fastrm.config import HeadConfig, load_config
from fastrm.data.batching import PackPlan
from fastrm.data.loader import PackBuilder
from fastrm.data.tokenizer import load_tokenizer
from fastrm.errors import ConfigError, StorageError
from fastrm.evaluate.accuracy import PreferenceMeter
from fastrm.evaluate.options import JudgeTexts
from fastrm.judge.command import choose
from fastrm.judge.local import LocalModel
from fastrm.judge.questions import JudgeQuestion
from fastrm.model import export
from fastrm.model.adopt import adopt_for
from fastrm.model.architectures import find_architecture, meta_network
from fastrm.model.export import load_model, save_model
from fastrm.model.export_command import export_model
from fastrm.model.loading import open_backbone
from fastrm.model.network import RewardNetwork
from fastrm.prompts.spec import DecodingSection, GeneratorSection, load_spec
from fastrm.prompts.template import PromptTemplate
from fastrm.train.engine import LocalEngine, Update
from fastrm.train.export_checkpoint import export_checkpoint
from fastrm.train.metrics import read_rows
from fastrm.train.progress import Progress
from fastrm.train.setup import make_network
from fastrm.ui import Display
from tests.helpers import stock
from tests.helpers.lora_runs import lora_config
from tests.helpers.runs import TEXT_MODEL, run, tiny_config, write_rows
from tests.helpers.support import make_model
from tests.helpers.writers import writer_network, writer_records

CRITIQUES = ["It is right: {} is even or odd as said.", "It is vague, and says nothing about {}."]


def _rows(count: int, start: int = 0) -> list[dict]:
    return [
        {
            "id": f"t{n}", "prompt": f"Is {n} even?", "chosen": "yes it is" if n % 2 == 0 else "no it is not",
            "rejected": "maybe", "chosen_reason": CRITIQUES[0].format(n), "rejected_reason": CRITIQUES[1].format(n),
        }
        for n in range(start, start + count)
    ]  # fmt: skip


def _config(folder, paradigm, **sections):
    rows = write_rows(folder / "rows.jsonl", _rows(40))
    held_out = write_rows(folder / "held_out.jsonl", _rows(12, 100))
    sections = {"run": {"save_every": 3, "eval_every": 3}, **sections}
    path = tiny_config(folder, rows, held_out, **sections)
    path.write_text(f"paradigm: {paradigm}\n" + path.read_text())
    return path


def _text_model() -> dict:
    return {"model": {"init": {**TEXT_MODEL, "tie_word_embeddings": True}}}


@pytest.mark.parametrize("sections", [{}, _text_model()], ids=["untied-vision", "tied-text"])
@pytest.mark.parametrize("paradigm", ["critic", "judge"])
def test_a_run_learns_and_leaves_a_model_that_stock_classes_write_with(paradigm, sections, tmp_path):
    path = _config(tmp_path, paradigm, **{"optim": {"lr": 5e-3}, **sections})
    run(path)
    rows = _metrics(tmp_path)
    steps, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "eval/loss" in row]
    assert evaluations[-1]["eval/loss"] < 0.98 * evaluations[0]["eval/loss"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    if paradigm == "critic":
        assert all(row["loss"] == pytest.approx(row["preference_loss"] + row["critique_loss"]) for row in steps)
        assert summary["eval_accuracy"] == evaluations[-1]["eval/accuracy"]
    else:
        assert "eval/accuracy" not in evaluations[-1] and summary["eval_accuracy"] is None
        assert summary["eval_loss"] == evaluations[-1]["eval/loss"] == summary["best_value"]
    folder = tmp_path / "run" / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["fastrm"]["paradigm"]["kind"] == paradigm and config["fastrm"]["paradigm"]["spec"]["prompt"]
    kind = AutoModelForCausalLM if sections else AutoModelForImageTextToText
    assert config["architectures"] == [type(kind.from_pretrained(folder)).__name__]
    model, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and all(name.startswith("score.") for name in found["unexpected_keys"])
    assert bool(found["unexpected_keys"]) == (paradigm == "critic")
    if paradigm == "critic":
        assert _critique_loss(model, folder) == pytest.approx(evaluations[-1]["eval/critique_loss"], rel=1e-5)


def _critique_loss(model, folder) -> float:
    """The mean over the held-out preferences of the mean losses of both critiques, of the stock model's own logits."""
    encoder = load_model(folder, behind_critique=True).encoder
    template = PromptTemplate(load_spec("mm_rlhf_reward").prompt, ("response",))
    losses = []
    for row in _rows(12, 100):
        for name in ("chosen", "rejected"):
            asked = template.fill(question=row["prompt"], response=row[name])
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row[f"{name}_reason"]}]
            text = encoder.tokenizer.apply_chat_template(turns, tokenize=False)
            ids = encoder.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            count = len(encoder.tokenizer(row[f"{name}_reason"] + "<|im_end|>\n")["input_ids"])
            with torch.no_grad():
                logits = model.eval()(input_ids=ids).logits[0]
            losses.append(float(F.cross_entropy(logits[-count - 1 : -2], ids[0, -count:-1])))
    return sum(losses) / 12


_SMALL = {
    "precision": {"dtype": "bf16", "weights": "bf16"}, "optim": {"states": "8bit"},
    "model": {"activation_checkpointing": "full"},
}  # fmt: skip


@pytest.mark.parametrize(
    "paradigm, settings", [("critic", {}), ("judge", {}), ("critic", _SMALL)], ids=["critic", "judge", "small critic"]
)
def test_a_resumed_run_is_the_run_to_the_bit(paradigm, settings, tmp_path):
    path = _config(tmp_path, paradigm, **settings)
    run(path)
    wanted, rows = load_file(tmp_path / "run" / "model" / "model.safetensors"), _metrics(tmp_path)
    assert "lm_head.weight" in wanted
    shutil.rmtree(tmp_path / "run" / "model")
    run(path, resume=str(tmp_path / "run" / "checkpoints" / "step-00000003"))
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert _without_times(_metrics(tmp_path)) == _without_times(rows)


def test_a_checkpoint_keeps_the_prompt_that_was_trained_on_whatever_becomes_of_the_spec(tmp_path):
    spec = tmp_path / "own.yaml"
    spec.write_text("kind: critic\nprompt: '{{ question }} | {{ response }}'\n")
    path = _config(tmp_path, "critic", critic={"spec": str(spec)}, run={"max_steps": 1}, **_text_model())
    run(path)
    folder = tmp_path / "run"
    wanted, prepared = (folder / "model" / "config.json").read_text(), _files(folder)
    spec.write_text("kind: critic\nprompt: 'Another: {{ question }} | {{ response }}'\n")
    with pytest.raises(ConfigError, match=r"critic\.spec .*own\.yaml: is not the SPEC that .*step-00000001 was"):
        run(path, "run.max_steps=2", resume="auto")
    assert _files(folder) == prepared
    for name in ("edited", "gone"):
        with Display() as display:
            export_checkpoint(folder, 1, tmp_path / name, "transformers", display)
        assert (tmp_path / name / "config.json").read_text() == wanted
        spec.unlink(missing_ok=True)


def _files(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "paradigm, first, then",
    [
        ("critic", {"decoding": {"max_tokens": 7, "temperature": 1.0}, "votes": 3}, {"decoding": {"max_tokens": 9}}),
        ("judge", {"order": "round_robin", "decoding": {"max_tokens": 7}}, {"order": "bracket", "votes": 1}),
    ],
    ids=["critic", "judge"],
)
def test_the_export_writes_as_its_spec_says_which_may_change_on_resume(paradigm, first, then, tmp_path):
    spec, folder = tmp_path / "own.yaml", tmp_path / "run"
    base = {"extends": {"critic": "mm_rlhf_reward", "judge": "r1_reward"}[paradigm]}
    path = _config(tmp_path, paradigm, run={"max_steps": 1}, **_text_model(), **{paradigm: {"spec": str(spec)}})
    for steps, said in enumerate((first, then), 1):
        spec.write_text(json.dumps(base | said))
        run(path, f"run.max_steps={steps}", resume="no" if steps == 1 else "auto")
        _, found = choose([str(folder / "model")], JudgeTexts())
        wanted = load_spec(str(spec)).model_dump()
        assert found.model_dump() == wanted | {"generator": found.generator.model_dump()}
        assert found.generator.model == str(folder / "model")


def test_the_preferences_of_a_judges_run_are_not_its_texts(tmp_path, capfd):
    """Two texts of a preference in both orders, one where the thinking says the order; lists are several groups."""
    listed = {"id": "l", "prompt": "Which?", "responses": list("abcdef"), "scores": [6, 5, 4, 3, 2, 1]}
    thought = {"id": "t", "prompt": "Which one?", "responses": ["b", "a"], "preferences": [[1, 0]], "thinking": "a."}
    path = _config(tmp_path, "judge", judge={"order": "both"}, run={"max_steps": None, "epochs": 1}, **_text_model())
    write_rows(tmp_path / "rows.jsonl", [*_rows(7), listed, thought])
    summary = run(path)
    assert summary["preferences"] == 7 + 15 + 1
    assert _metrics(tmp_path)[-1]["preferences"] == summary["preferences"]
    said = " ".join(capfd.readouterr().err.split())
    assert f"with {2 * (7 + 15) + 1} texts from" in said and "steps of 8 texts in" in said


def test_the_parts_of_a_critics_loss_are_drawn_and_may_choose_the_best_step(tmp_path):
    stopping = {"metric": "eval/critique_loss", "patience": 9}
    run(_config(tmp_path, "critic", run={"max_steps": 3, "eval_every": 1, "early_stopping": stopping}, **_text_model()))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    losses = {row["step"]: row["eval/critique_loss"] for row in _metrics(tmp_path) if "eval/critique_loss" in row}
    assert len(losses) == 3 and summary["best_metric"] == stopping["metric"]
    assert summary["best_value"] == min(losses.values()) == losses[int(summary["best_checkpoint"].rpartition("-")[2])]
    page = (tmp_path / "run" / "report.html").read_text()
    assert ">loss of preferences<" in page and ">loss of critiques, times critic.lm_weight<" in page
    assert Image.open(tmp_path / "run" / "report.png").height == 3 * 385  # three rows of panels: six of them
    with pytest.raises(ConfigError, match="which no evaluation makes"):
        load_config(_config(tmp_path, "judge", run={"early_stopping": stopping}))


def _base_that_ends_turns(folder):
    """A base whose likeliest token is always the one that ends its template's turns, which its tokenizer calls another.
    """
    network = make_model("llama")
    tokenizer, end = network.encoder.tokenizer, network.encoder.tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.pad_token
    network.model.config.eos_token_id = tokenizer.eos_token_id
    stock.save_stock_checkpoint(folder, network, torch.float32)
    weights = load_file(folder / "model.safetensors")
    # Every state has one large element, and the LM head reads that one alone.
    weights["model.embed_tokens.weight"][:, 0] = 100.0
    weights["model.norm.weight"].fill_(1.0)
    weights["lm_head.weight"].zero_()[end, 0] = 1.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = {"top_k": 7, "eos_token_id": tokenizer.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(said))
    return folder, [tokenizer.eos_token_id, end]


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "adapters"])
def test_texts_of_a_base_whose_tokenizer_ends_them_otherwise_end_where_turns_were_learnt_to(lora, tmp_path):
    base, ends = _base_that_ends_turns(tmp_path / "base")
    model = {"path": str(base), "lora": lora}
    path = _config(tmp_path, "judge", optim={"lr": 1e-9}, run={"max_steps": 1, "save_every": 1})
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model": model, "check_exactness": False}))
    run(path)
    folder = tmp_path / "run" / "model"
    with Display(silent=True) as display:
        export_checkpoint(tmp_path / "run", 1, tmp_path / "step", "transformers", display, merge=lora is not None)
        export_model(folder, tmp_path / "again", "transformers", display)
    for place in (folder, tmp_path / "step", tmp_path / "again"):
        said = json.loads((place / "generation_config.json").read_text())
        assert said == {"top_k": 7, "eos_token_id": ends}
    tokenizer = load_tokenizer(str(tmp_path / "again"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Which?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    for place, count in ((base, 9), (tmp_path / "again", 1)):
        writes = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        tokens = writes.generate(**prompt, do_sample=False, max_new_tokens=9)[0, prompt["input_ids"].shape[1] :]
        assert tokens.tolist() == ends[1:] * count
    question = JudgeQuestion("x", (0, 1), "", "Which?", (), "", "x:1")
    (written,) = LocalModel(GeneratorSection(model=str(tmp_path / "again")), DecodingSection()).write([question])
    assert (written.text, written.is_cut, written.size.written) == ("", False, 1)


def _metrics(folder) -> list[dict]:
    return read_rows(folder / "run" / "metrics.jsonl")


def _without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if "second" not in name and "wait" not in name} for row in rows]


@pytest.mark.parametrize("paradigm", ["critic", "judge"])
def test_adapters_are_merged_into_a_model_that_writes_as_they_do(paradigm, tmp_path):
    peft = pytest.importorskip("peft")
    path = lora_config(tmp_path, data={"eval": [{"path": str(write_rows(tmp_path / "held_out.jsonl", _rows(6)))}]})
    write_rows(tmp_path / "rows.jsonl", _rows(24))
    path.write_text(f"paradigm: {paradigm}\n" + path.read_text())
    run(path)
    adapter, merged = tmp_path / "run" / "model", tmp_path / "merged"
    assert (adapter / "value_head.safetensors").exists() == (paradigm == "critic")
    with pytest.raises(ConfigError, match=f"is a {paradigm}, not a reward model"):
        export_model(adapter, tmp_path / "vllm", "vllm", Display(silent=True))
    export_model(adapter, merged, "transformers", Display(silent=True), torch.float32)
    assert json.loads((merged / "config.json").read_text())["fastrm"]["paradigm"]["kind"] == paradigm
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    ids = torch.arange(5, 45)[None]
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    stock_base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with_adapter = peft.PeftModel.from_pretrained(stock_base, adapter).eval()
    with torch.no_grad():
        wanted, found = with_adapter(input_ids=ids).logits, whole(input_ids=ids).logits
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        with with_adapter.disable_adapter():
            assert (with_adapter(input_ids=ids).logits - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_files_without_an_lm_head_are_refused_and_those_of_a_critic_train_on(tmp_path):
    network = make_model("llama")
    stock.save_stock_checkpoint(tmp_path / "base", network, torch.float32)
    path = _config(tmp_path, "critic")
    tree = json.loads(json.dumps(load_config(path).model_dump(mode="json")))
    tree["model"] = {"path": str(tmp_path / "base")}
    tree["data"]["prepared"] = None
    path.write_text(json.dumps(tree))
    run(path)
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118
    tree["model"]["path"], tree["run"]["dir"] = str(tmp_path / "run" / "model"), str(tmp_path / "again")
    path.write_text(json.dumps(tree))
    run(path)
    tree |= {"paradigm": "reward", "model": {"path": str(tmp_path / "base")}, "critic": None}
    tree["run"]["dir"] = str(tmp_path / "plain")
    path.write_text(json.dumps(tree))
    run(path)
    tree |= {"paradigm": "critic", "model": {"path": str(tmp_path / "plain" / "model")}}
    tree["run"]["dir"] = str(tmp_path / "no-lm-head")
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"lm_head.weight is not in the files.*name the language model that"):
        run(path)


@pytest.mark.parametrize("paradigm", ["critic", "judge"])
def test_the_gradient_of_a_step_does_not_depend_on_the_packs(paradigm):
    network, records = writer_network("qwen2_5_vl", paradigm), writer_records("qwen2_5_vl", paradigm)
    tree = {"paradigm": paradigm, "model": {"path": "unused"}, "precision": {"dtype": "fp32"}}
    loss = {"center": 0.01} if paradigm == "critic" else {}
    config = load_config(tree | {"run": {"dir": "unused"}, "loss": loss})
    builder, found = PackBuilder(records, network.encoder, share=True), []
    for cut in ([[0, 1, 2]], [[2], [0], [1]], [[1, 2], [0]]):
        engine = LocalEngine(network, config)
        for members in cut:
            engine.accumulate(builder[PackPlan(tuple(members), 0, False)].pack)
        scale = engine._weight_sum
        found.append({name: p.grad / scale for name, p in network.named_parameters()})
        assert all(part > 0 for part in engine._loss_sum.view(-1))
        engine.discard()
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert (other[name] - gradient).abs().max() <= 1e-6 + 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("family", ["llama", "internvl"])
def test_an_lm_head_of_its_own_is_used_whatever_the_config_says_of_ties(family, tmp_path):
    """InternVL's config has tied embeddings where it does not say otherwise; stock ties none of two different ones."""
    _untied_base(tmp_path / "base", family)
    kind = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    wanted = kind.from_pretrained(tmp_path / "base").lm_head.weight
    tree = {"paradigm": "judge", "run": {"dir": str(tmp_path / "run")}, "model": {"path": str(tmp_path / "base")}}
    config = load_config(tree)
    network = make_network(config, load_tokenizer(str(tmp_path / "base")))
    assert torch.equal(network.lm_weight, wanted)
    assert not torch.equal(network.lm_weight, network.language.embed_tokens.weight)
    forecast = meta_network(find_architecture(config.model)[0], config.model, config.paradigm)
    sizes = [{name: part.shape for name, part in one.named_parameters()} for one in (network, forecast)]
    assert sizes[0] == sizes[1], "what plan and --dry-run size is another model"
    save_model(network, tmp_path / "export")
    assert torch.equal(kind.from_pretrained(tmp_path / "export").lm_head.weight, wanted)


def _untied_base(folder, family: str) -> None:
    """Write a base whose config says that its LM head is tied, which is not the one in its files."""
    network = make_model(family)
    network.model.config.tie_word_embeddings = False
    stock.save_stock_checkpoint(folder, network, torch.float32)
    place = folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"tie_word_embeddings": True}))


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "adapters"])
def test_a_checkpoint_of_a_run_with_an_lm_head_of_its_own_is_the_runs_model_to_the_byte(lora, tmp_path):
    if lora is not None:
        pytest.importorskip("peft")
    _untied_base(tmp_path / "base", "llama")
    tree = yaml.safe_load(_config(tmp_path, "critic", run={"max_steps": 1, "save_every": 1}).read_text())
    tree["model"] = {"path": str(tmp_path / "base")} | ({} if lora is None else {"lora": lora})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    run(tmp_path / "config.yaml")
    with Display() as display:
        export_checkpoint(tmp_path / "run", 1, tmp_path / "out", "transformers", display)
    assert _files(tmp_path / "out") == {
        name.replace(str(tmp_path / "run" / "model"), str(tmp_path / "out")): content
        for name, content in _files(tmp_path / "run" / "model").items()
    }


def test_an_lm_head_takes_no_memory_until_it_is_read_and_counts_in_what_is_needed(tmp_path, monkeypatch):
    network = make_model("llama", paradigm="judge")
    network.writer = {"kind": "judge", "spec": {"kind": "pairwise", "parser": "r1_reward", "prompt": "{{ first }}"}}
    save_model(network, tmp_path / "judge")
    opened = open_backbone(str(tmp_path / "judge"))
    made = RewardNetwork(opened.model, HeadConfig(), paradigm="judge")
    assert made.lm_head.weight.is_meta and not network.lm_head.weight.is_meta
    backbone = opened.num_bytes(lambda *_: torch.float32)
    monkeypatch.setattr(export, "available_memory", lambda: backbone + network.lm_head.weight.nbytes)
    assert torch.equal(load_model(tmp_path / "judge", writes=True).lm_weight, network.lm_weight)
    monkeypatch.setattr(export, "available_memory", lambda: backbone + network.lm_head.weight.nbytes - 1)
    with pytest.raises(StorageError, match=r"the weights take .* of host memory are available"):
        load_model(tmp_path / "judge", writes=True)


def test_models_that_cannot_become_critics_or_judges_are_named(tmp_path):
    save_model(make_model("qwen2", pooling="mean"), tmp_path / "mean")
    config = load_config({"paradigm": "critic", "run": {"dir": "unused"}, "model": {"path": str(tmp_path / "mean")}})
    with pytest.raises(ConfigError, match=r"reads the mean over all tokens, a critic's the last one; set model\.head"):
        adopt_for(config)
    config = load_config({"paradigm": "judge", "run": {"dir": "unused"}, "model": {"path": str(tmp_path / "mean")}})
    assert adopt_for(config)[1].startswith("left out, since a judge has no reward head: score.0.")
    stock.save_stock_checkpoint(tmp_path / "base", make_model("llama"), torch.float32)
    model = {"path": str(tmp_path / "base"), "freeze": ["language"]}
    config = load_config({"paradigm": "judge", "run": {"dir": "unused"}, "model": model})
    with pytest.raises(ConfigError, match=r"model\.freeze: leaves nothing to train, since a judge has no reward"):
        make_network(config, load_tokenizer(str(tmp_path / "base")))


def test_a_step_whose_records_were_all_refused_is_averaged_like_others():
    progress = Progress()
    for parts in ((1.0, 2.0), (0.0, 0.0)):
        progress.count_step(0, PreferenceMeter(), Update(sum(parts), 1.0, True, parts))
    progress.count_seconds(1.0, 0.0)
    row = progress.take_row(1, 1e-3)
    assert (row["loss"], row["preference_loss"], row["critique_loss"]) == (1.5, 0.5, 1.0)
