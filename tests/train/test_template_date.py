"""A chat template that reads the clock, as Llama 3.x's: its date is fixed once and goes wherever the model goes."""

import datetime
import json
import shutil

import pytest
import yaml

from fastrm import RewardModel
from fastrm.config import load_config
from fastrm.data import clock
from fastrm.data.record import Message, Response
from fastrm.data.template import ConversationEncoder
from fastrm.data.tokenizer import train_tokenizer
from fastrm.errors import ConfigError
from fastrm.evaluate.files import score_file
from fastrm.evaluate.options import ModelChoice, ScoringOptions
from fastrm.limits import MediaLimits
from fastrm.train import template_date
from fastrm.train.data import prepare_ahead
from fastrm.train.loop import train
from tests.helpers.killed_runs import assert_same, outcome
from tests.helpers.runs import text_rows, tiny_config, write_rows

FIRST, LATER = datetime.date(2025, 3, 31), datetime.date(2025, 11, 9)
GROUP = {"prompt": "Is 3 even?", "responses": ["no", "yes it is"]}
TEXT_MODEL = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def day(monkeypatch):
    """A function that sets the clock of this machine, ours and that of transformers."""

    def put(date):
        for module in (clock, template_date):
            monkeypatch.setattr(module, "today", lambda: date)

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(date.year, date.month, date.day, 17, 45)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)

    put(FIRST)
    return put


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    rows = text_rows(9)
    conversations = [(Message("user", (row["prompt"],)), Message("assistant", (row["chosen"],))) for row in rows]
    made = train_tokenizer(conversations, 300)
    made.chat_template = "{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\\n' -}}" + made.chat_template
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path, tokenizer):
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(24))
    model = {"init": TEXT_MODEL, "tokenizer": str(tokenizer)}
    return tiny_config(tmp_path, rows, model=model, optim={"batch_pairs": 4}, run={"max_steps": 6, "save_every": 3})


def stock_tokens(tokenizer):
    turns = [{"role": "user", "content": "Is 3 even?"}, {"role": "assistant", "content": "no"}]
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)


def our_tokens(encoder):
    return encoder.encode(Response((Message("user", ("Is 3 even?",)), Message("assistant", ("no",))))).tokens.tolist()


def test_tokens_are_those_that_stock_has_on_the_date(tokenizer, day):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    of_the_day = stock_tokens(loaded)
    assert "31 Mar 2025" in loaded.decode(of_the_day)
    assert our_tokens(ConversationEncoder(loaded)) == of_the_day
    day(LATER)
    assert stock_tokens(loaded) != of_the_day
    assert our_tokens(ConversationEncoder(loaded, date=FIRST)) == of_the_day
    assert our_tokens(ConversationEncoder(loaded)) == stock_tokens(loaded)
    assert loaded.chat_template == AutoTokenizer.from_pretrained(tokenizer).chat_template


@pytest.mark.parametrize("start", ["", "\n", "  ", "text\n", "{% if true %}\n", "\n\n  {%- if true %}"])
def test_a_fixed_clock_changes_nothing_but_the_date(tokenizer, start, day):
    """Whatever a template begins with, also in the middle of macros, loops and formats in variables."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = start + (
        "{%- macro when(how) %}<{{ strftime_now(how) }}>{% endmacro %}\n"
        "{% if strftime_now is defined %}{% set how = \"%A, %-d '%y\" %}{{ when(how) }}{% endif %}\n"
        "{% for message in messages %}{{ message['content'] + strftime_now('%H:%M') }}\n{% endfor %}"
    ) + "{% endif %}" * ("if true" in start)
    turns = [{"role": "user", "content": "5 %"}]
    fixed, date = clock.at_date(loaded, LATER)
    assert date == LATER
    midnight = loaded.apply_chat_template(turns, tokenize=False).replace("17:45", "00:00")
    assert "<Monday, 31 '25>" in midnight
    again, date = clock.at_date(fixed, FIRST)
    assert again.apply_chat_template(turns, tokenize=False) == midnight and date == FIRST
    day(LATER)
    midnight = loaded.apply_chat_template(turns, tokenize=False).replace("17:45", "00:00")
    assert fixed.apply_chat_template(turns, tokenize=False) == midnight
    day(FIRST)
    assert clock.at_date(fixed, None)[1] == LATER and clock.at_date(loaded, None)[1] == FIRST


def test_a_run_resumes_on_another_day_to_the_bit_and_its_export_keeps_the_date(config, tmp_path, day, capsys):
    train(load_config(config))
    assert "reads the clock, which stands at 2025-03-31 (today; set model.template_date" in capsys.readouterr().err
    run = tmp_path / "run"
    expected = outcome(run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")  # as if it had been stopped at step 3
    day(LATER)
    train(load_config(config), "auto")
    errors = capsys.readouterr().err
    assert "stands at 2025-03-31 (of the run" in errors and "resumed from" in errors
    assert_same(run, expected)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["template_date"] == "2025-03-31"
    assert json.loads((run / "model" / "config.json").read_text())["fastrm"]["template_date"] == "2025-03-31"
    model = RewardModel.from_pretrained(run / "model")
    assert model.date == "2025-03-31, as in training" and model.network.encoder.date == FIRST
    moved = RewardModel.from_pretrained(run / "model", template_date="2025-11-09")
    assert moved.date == "2025-11-09, as asked for" and moved.score([GROUP]) != model.score([GROUP])
    with pytest.raises(ConfigError, match="wanted a date such as"):
        RewardModel.from_pretrained(run / "model", template_date="31 March")


def test_a_run_takes_the_date_of_its_prepared_set(config, tmp_path, day, capsys):
    shared = [f"data.prepared={tmp_path / 'shared'}"]
    prepare_ahead(load_config(config, shared))
    day(LATER)
    train(load_config(config, shared))
    errors = capsys.readouterr().err
    assert "prepared set found" in errors and "stands at 2025-03-31 (of the prepared set" in errors
    other = ["run.dir=" + str(tmp_path / "other"), "model.template_date=2025-11-09"]
    with pytest.raises(ConfigError, match=r"model.template_date: '2025-03-31' there, '2025-11-09' now"):
        train(load_config(config, [*shared, *other]))


def test_a_model_without_a_date_is_scored_on_today_and_says_so(config, tokenizer, tmp_path, day, capsys):
    train(load_config(config))
    folder = tmp_path / "run" / "model"
    kept = RewardModel.from_pretrained(folder).score([GROUP])
    stored = json.loads((folder / "config.json").read_text())
    del stored["fastrm"]["template_date"]
    (folder / "config.json").write_text(json.dumps(stored))
    shutil.copy(tokenizer / "chat_template.jinja", folder)
    assert RewardModel.from_pretrained(folder).score([GROUP]) == kept
    day(LATER)
    assert RewardModel.from_pretrained(folder).score([GROUP]) != kept
    capsys.readouterr()
    options = ScoringOptions(
        tokens_per_pack=2048, num_workers=0, device="cpu", dtype="auto",
        limits=MediaLimits(10**6, 10**6),
    )  # fmt: skip
    choice = ModelChoice((folder,), None, None, None, None)
    score_file(choice, str(write_rows(tmp_path / "groups.jsonl", [GROUP])), tmp_path / "out.jsonl", options)
    said = capsys.readouterr().err
    assert "stands at 2025-11-09, today: the model keeps no date, give it one (--template-date)" in said


def test_a_date_for_a_template_that_reads_no_clock_is_refused(tmp_path):
    config = tiny_config(tmp_path, write_rows(tmp_path / "rows.jsonl", text_rows(8)))
    with pytest.raises(ConfigError, match=r"model.template_date: the chat template does not read the clock"):
        train(load_config(config, ["model.template_date=2025-11-09"]))
    with pytest.raises(ConfigError, match=r"model.template_date"):
        load_config(config, ["model.template_date=soon"])
