"""The configuration is strict, and every complaint says where the mistake stands and what to do."""

from pathlib import Path

import pytest

from fastrm.config import Config, load_config
from fastrm.errors import ConfigError
from tests.helpers.project import PROJECT

MINIMAL = "model:\n  path: some/model\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a text as c.yaml, in a folder of its own so that messages name it shortly."""
    monkeypatch.chdir(tmp_path)

    def load(text, *overrides):
        Path("c.yaml").write_text(text)
        return load_config("c.yaml", overrides)

    return load


def complaint(load, text, *overrides) -> str:
    with pytest.raises(ConfigError) as error:
        load(text, *overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            MINIMAL + "optim:\n  batch_pears: 3\n",
            "c.yaml:4: unknown key optim.batch_pears; did you mean optim.batch_pairs?",
        ),
        (MINIMAL + "optims:\n  lr: 1e-5\n", "c.yaml:3: unknown key optims; did you mean optim?"),
        (
            MINIMAL + "  head:\n    activations: silu\n",
            "c.yaml:4: unknown key model.head.activations; did you mean model.head.activation?",
        ),
        (
            MINIMAL + "data:\n  train:\n    - path: a.jsonl\n    - path: b.jsonl\n      wheight: 2.0\n",
            "c.yaml:7: unknown key data.train.1.wheight; did you mean data.train.1.weight?",
        ),
        (MINIMAL + "precision:\n  zzz: 1\n", "c.yaml:4: unknown key precision.zzz; keys: dtype, weights, fp8"),
    ],
    ids=["section", "top", "nested", "list", "nothing-near"],
)
def test_unknown_key_names_line_and_nearest(load, text, expected):
    assert complaint(load, text) == expected


@pytest.mark.parametrize(
    ("text", "start", "wanted"),
    [
        ("optim:\n  batch_pairs: many\n", "c.yaml:4: optim.batch_pairs: got 'many'", "valid integer"),
        ("optim:\n  batch_pairs: 2.5\n", "c.yaml:4: optim.batch_pairs: got 2.5", "valid integer"),
        ("optim:\n  batch_pairs: true\n", "c.yaml:4: optim.batch_pairs: got True", "valid integer"),
        ("optim:\n  lr: '3e-6'\n", "c.yaml:4: optim.lr: got '3e-6'", "valid number"),
        ("optim:\n  lr: 0.0\n", "c.yaml:4: optim.lr: got 0.0", "greater than 0"),
        ("optim:\n  lr: -3e-6\n", "c.yaml:4: optim.lr: got -3e-06", "greater than 0"),
        ("optim:\n  betas: [0.9]\n", "c.yaml:4: optim.betas: got [0.9]", "at least 2"),
        ("optim:\n  betas: [0.9, 1.5]\n", "c.yaml:4: optim.betas.1: got 1.5", "less than 1"),
        ("optim:\n  schedule: steps\n", "c.yaml:4: optim.schedule: got 'steps'", "'wsd' or 'constant'"),
        ("data:\n  merge_groups: 1\n", "c.yaml:4: data.merge_groups: got 1", "valid boolean"),
        ("data:\n  train: a.jsonl\n", "c.yaml:4: data.train: got 'a.jsonl'", "valid list"),
        ("data:\n  train: [a.jsonl]\n", "c.yaml:4: data.train.0: got 'a.jsonl'", "dictionary"),
        ("loss:\n  label_smoothing: 0.5\n", "c.yaml:4: loss.label_smoothing: got 0.5", "less than 0.5"),
        ("  freeze: [everything]\n", "c.yaml:3: model.freeze.0: got 'everything'", "'projector' or 'language'"),
        ("  head: {layers: 6}\n", "c.yaml:3: model.head.layers: got 6", "less than or equal to 5"),
        ("run:\n  seed: -1\n", "c.yaml:4: run.seed: got -1", "greater than or equal to 0"),
    ],
    ids=lambda value: value.split(" ")[1].rstrip(":") if value.startswith("c.yaml") else "",
)
def test_wrong_value_names_line_value_and_what_is_wanted(load, text, start, wanted):
    message = complaint(load, MINIMAL + text)
    assert message.startswith(start + "; ") and wanted in message and "\n" not in message


def test_all_mistakes_are_named_at_once(load):
    message = complaint(load, MINIMAL + "optim:\n  lr: fast\nrun:\n  sead: 1\n")
    assert [line.split(": ")[0] for line in sorted(message.splitlines())] == ["c.yaml:4", "c.yaml:6"]


@pytest.mark.parametrize("text", ["3e-6", "3E-6", "3.0e-6", "0.3e-5", "+3e-6", "0.000003"])
def test_exponents_without_point_are_numbers(load, text):
    assert load(MINIMAL + f"optim:\n  lr: {text}\n").optim.lr == 3e-6
    assert load(MINIMAL, f"optim.lr={text}").optim.lr == 3e-6


@pytest.mark.parametrize("text", ["1e999", ".inf", ".nan"])
def test_numbers_that_are_not_finite_are_refused(load, text):
    assert complaint(load, MINIMAL + f"optim:\n  lr: {text}\n").startswith("c.yaml:4: optim.lr: got ")
    assert complaint(load, MINIMAL, f"optim.lr={text}").startswith(f"override 'optim.lr={text}': optim.lr: got ")


def test_integers_may_stand_for_numbers(load):
    assert load(MINIMAL + "optim:\n  lr: 1\n").optim.lr == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim:\n  lr: 1e-5\n  lr: 2e-5\n", "c.yaml:5: key optim.lr stands twice"),
        ("model:\n  path: other\n", "c.yaml:3: key model stands twice"),
        ("data:\n  train:\n    - {path: a, path: b}\n", "c.yaml:5: key data.train.0.path stands twice"),
    ],
    ids=["leaf", "section", "in-a-list"],
)
def test_duplicate_key_is_refused(load, text, expected):
    assert complaint(load, MINIMAL + text) == expected


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [exit 1]", "!!python/name:os.system ''", "!custom 3"])
def test_tags_are_refused(load, tag):
    message = complaint(load, MINIMAL + f"run:\n  dir: {tag}\n")
    assert message.startswith("c.yaml:4: not valid YAML: could not determine a constructor for the tag")
    assert complaint(load, MINIMAL, f"run.dir={tag}").startswith(f"override {f'run.dir={tag}'!r}: ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model:\n  path: &p some/model\n  tokenizer: *p\n", 2),
        ("data: &d\n  train:\n    - {path: a}\n  eval: *d\nmodel:\n  path: b\n", 1),
    ],
    ids=["scalar", "itself"],
)
def test_aliases_are_refused(load, text, line):
    assert complaint(load, text) == f"c.yaml:{line}: YAML aliases are not accepted; repeat the value"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [1\n", "c.yaml:2: not valid YAML"),
        ("model:\n\tpath: x\n", "c.yaml:2: not valid YAML"),
        ("- a\n- b\n", "c.yaml: got a list, wanted sections such as `model:` and `data:`"),
        ("just words\n", "c.yaml: got a str, wanted sections"),
        ("", "model is missing; it has no default"),
        ("run:\n  seed: 1\n", "model is missing; it has no default"),
        ("model:\n", "c.yaml:1: model: got None"),
        ("run: 3\nmodel:\n  path: x\n", "c.yaml:1: run: got 3"),
    ],
    ids=["open-bracket", "tab", "list", "text", "empty", "no-model", "model-null", "section-not-mapping"],
)
def test_text_that_is_no_configuration(load, text, expected):
    assert expected in complaint(load, text)


def test_two_documents_are_refused(load):
    assert complaint(load, MINIMAL + "---\n" + MINIMAL) == "c.yaml:3: not valid YAML: but found another document"


@pytest.mark.parametrize(
    "value",
    ["2020-13-45", "0b_", "!!int x", "!!timestamp x", "!!bool x", "9" * 5000, "[" * 5000, "\x00"],
    ids=["date", "binary", "int", "timestamp", "bool", "digits", "deep", "control-character"],
)
def test_value_that_pyyaml_cannot_convert_is_not_valid_yaml(load, value):
    assert complaint(load, MINIMAL + f"run:\n  dir: {value}\n").startswith("c.yaml")
    assert complaint(load, MINIMAL, f"run.dir={value}").endswith(": the value is not valid YAML; quote it")


def test_key_that_is_no_text_is_refused(load):
    assert complaint(load, MINIMAL + "? [run]\n: 3\n").startswith("c.yaml")
    assert complaint(load, MINIMAL + "run: {1: 2}\n") == "c.yaml:3: run.1: got 1; keys should be strings"


def test_file_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^none\.yaml: cannot read the configuration: No such file or directory"):
        load_config("none.yaml")
    Path("latin.yaml").write_bytes(b"run: {dir: caf\xe9}\n")
    with pytest.raises(ConfigError, match=r"^latin\.yaml: not UTF-8 text"):
        load_config("latin.yaml")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("model:\n  head: {layers: 2}\n", "set exactly one of model.path and model.init"),
        (
            "model:\n  path: x\n  init: {model_type: qwen2}\n  tokenizer: {train_vocab_size: 300}\n",
            "set exactly one of model.path and model.init",
        ),
        ("model:\n  init: {hidden_size: 8}\n  tokenizer: t\n", "model.init needs model_type"),
        (
            "model:\n  init: {model_type: qwen2}\n  tokenizer: t\n  lora: {}\n",
            "model.lora needs model.path: an adapter belongs to a base model whose weights are in files",
        ),
        (MINIMAL + "  quantize: nf4\n", "model.quantize nf4 without model.lora: rounded weights cannot be trained"),
        (MINIMAL + "  lora: {dora: true}\n  quantize: nf4\n", "model.lora.dora with model.quantize nf4: DoRA reads"),
        (
            MINIMAL + "  lora: {}\n  quantize: nf4\nprecision: {fp8: rowwise}\n",
            "precision.fp8 rowwise with model.quantize nf4: they are for the same layers; set precision.fp8: off",
        ),
        (
            MINIMAL + "  lora: {}\n  quantize: nf4\nprecision: {weights: bf16}\n",
            "precision.weights bf16 with model.quantize nf4: they are for the same layers; set precision.weights: auto",
        ),
        (MINIMAL + "  lora: {}\n  fuse_projections: true\n", "set model.fuse_projections: false"),
        (MINIMAL + "  lora: {vision: true}\n  freeze: [vision]\n", "remove vision from model.freeze"),
        (MINIMAL + "  lora: {}\n  freeze: [language]\n", "remove language from model.freeze"),
        ("model:\n  init: {model_type: qwen2}\n", "model.init needs model.tokenizer"),
        (
            MINIMAL + "data: {min_pixels: 4000, max_pixels: 3000}\n",
            "data.min_pixels 4000 is above data.max_pixels 3000",
        ),
        (
            MINIMAL + "optim: {tokens_per_pack: 1000}\n",
            "optim.tokens_per_pack 1000 is below data.max_tokens_per_group 32768",
        ),
    ],
    ids=[
        "neither", "both", "no-type", "lora-random", "nf4-alone", "nf4-dora", "nf4-fp8", "nf4-bf16",
        "lora-fused", "lora-frozen-tower", "lora-frozen", "no-tokenizer", "pixels", "pack",
    ],
)
def test_combination_that_cannot_work(load, body, expected):
    message = complaint(load, body)
    assert message.startswith("c.yaml") and expected in message


def test_override_sets_values_at_every_depth(load):
    text = MINIMAL + "data:\n  train:\n    - {path: a.jsonl}\n"
    config = load(
        text, "optim.batch_pairs=4", "model.head.layers=3", "data.train.0.weight=0.5", "model.freeze=[vision]",
        "run.report_to=[tensorboard]", "data.eval=[{path: b.jsonl}]",
    )  # fmt: skip
    assert (config.optim.batch_pairs, config.model.head.layers, config.model.freeze) == (4, 3, ["vision"])
    assert config.data.train[0].weight == 0.5 and config.data.eval[0].path == "b.jsonl"


def test_override_replaces_value_of_the_file_and_the_last_one_wins(load):
    text = MINIMAL + "optim:\n  lr: 1e-5\n"
    assert load(text, "optim.lr=2e-5", "optim.lr=3e-5").optim.lr == 3e-5
    # A wrong value in the file does not matter once it is replaced.
    assert load(MINIMAL + "optim:\n  lr: fast\n", "optim.lr=2e-5").optim.lr == 2e-5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "override 'optim.lr': wanted the form section.key=value"),
        ("=3", "override '=3': wanted the form section.key=value"),
        ("optim..lr=3", "override 'optim..lr=3': wanted the form section.key=value"),
        ("optim.lr=[1", "override 'optim.lr=[1': the value is not valid YAML"),
        ("optim.lt=1.0", "override 'optim.lt=1.0': unknown key optim.lt; did you mean optim.lr?"),
        ("optim.lr=fast", "override 'optim.lr=fast': optim.lr: got 'fast'"),
        ("optim.lr=", "override 'optim.lr=': optim.lr: got None"),
        ("data.train.5.path=x", "override 'data.train.5.path=x': there is no data.train.5 to set"),
        ("data.train.².path=x", "override 'data.train.².path=x': there is no data.train.² to set"),
        ("data.train.0=3", "override 'data.train.0=3': data.train.0: got 3"),
        ("model.path=null", "set exactly one of model.path and model.init"),
    ],
)
def test_override_mistake_names_the_override(load, override, expected):
    message = complaint(load, MINIMAL + "data:\n  train:\n    - {path: a.jsonl}\n", override)
    assert message.startswith(expected) or (expected.startswith("set exactly") and expected in message)


def test_run_dir_defaults_to_the_files_name(load):
    assert load(MINIMAL).run.dir == "runs/c"
    assert load(MINIMAL, "run.dir=elsewhere").run.dir == "elsewhere"
    assert load(MINIMAL + "run:\n  seed: 3\n").run.dir == "runs/c"


def test_sections_are_frozen(load):
    config = load(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0


@pytest.mark.parametrize("path", sorted(PROJECT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_shipped_configuration_loads_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(copy) == config
    assert config.data.train


@pytest.mark.parametrize("lr", [3e-6, 1e-10, 0.1, 1.0, 1e16, 123456.789], ids=str)
def test_round_trip_keeps_floats_exactly(load, lr):
    config = Config.model_validate({"run": {"dir": "r"}, "model": {"path": "m"}, "optim": {"lr": lr}})
    assert load(config.to_yaml()) == config


@pytest.mark.parametrize("text", ["123", "1e5", "true", "null", "2020-01-01", "a: b", "ümlaut", "tab\there", ""])
def test_round_trip_keeps_texts_that_look_like_something_else(load, text):
    config = Config.model_validate({"run": {"dir": "r"}, "model": {"path": text}})
    assert load(config.to_yaml()) == config


R1_REWARD_200K = ["mm-rlhf-images", "rlaif-v", "vlfeedback", "povid", "wildvision-battle"]


def test_ablation_recipe_has_the_shares_of_the_papers_data():
    ablation = load_config(PROJECT / "configs/r1_reward_200k.yaml")
    # 100,000 of 182,627 pairs, besides all of MM-RLHF's.
    assert [source.repeat for source in ablation.data.train] == [1.0, *[0.5476] * 4]


def test_full_recipe_is_the_papers():
    config = load_config(PROJECT / "configs/full.yaml")
    assert config.model.path == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (config.model.head.layers, config.model.head.activation, config.model.freeze) == (2, "silu", ["vision"])
    assert (config.optim.lr, config.optim.batch_pairs, config.optim.weight_decay) == (3e-6, 128, 0.0)
    assert (config.optim.schedule, config.optim.warmup_ratio, config.precision.dtype) == ("cosine", 0.1, "bf16")
    assert (config.loss.center, config.loss.length_normalization) == (0.0, False)
    sets = [source.set for source in config.data.train]
    assert sets == [
        "rlaif-v", "mmpr-v1.2", *R1_REWARD_200K, "tulu-3-if", "olmo-2-mix", "ultra-hard", "wildchat-ultrafeedback",
        "swe-arena",
    ]  # fmt: skip
    assert config.model.activation_checkpointing == "full" and config.data.max_pixels == 640 * 28 * 28
