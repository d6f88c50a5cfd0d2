"""Prepared sets: the same whatever made them, found again, refused when they are another's."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from fastrm.config import load_config
from fastrm.data import tokenizer
from fastrm.data.prepared.content import with_digests
from fastrm.data.prepared.records import decode_record, encode_record
from fastrm.data.prepared.stored import read_manifest
from fastrm.data.record import ImageRef, Message, Preference, Record, Response, VideoRef
from fastrm.errors import ConfigError, DataError, StorageError
from fastrm.limits import MediaLimits
from fastrm.train.loop import train
from fastrm.train.metrics import read_rows
from fastrm.ui import Display
from tests.helpers.chat_templates import TRIMMED
from tests.helpers.prepared_sets import Made, config_of, contents, ids, mixed_sources, small_pieces
from tests.helpers.project import PROJECT
from tests.helpers.runs import colour_rows, fastrm, text_rows, tiny_config, write_rows
from tests.helpers.video_files import moving_frames, write_frames

DATA = PROJECT.parent / "shared" / "data"


def test_a_record_is_read_back_as_it_was_written():
    image, video = ImageRef(path="/a/b.png", digest="ab" * 32), VideoRef(path="/v", member="m.mp4", digest="cd" * 32)
    embedded = ImageRef(data=b"bytes", digest="ef" * 32)
    prompt = (Message("system", ("sys",)), Message("user", ("look ", image, video, embedded, " now\n")))
    record = Record(
        "id \u2028",
        (Response((*prompt, Message("assistant", ("yes",)))), Response((*prompt, Message("assistant", ("no", "!"))))),
        (Preference(0, 1, 0.25, 2.0), Preference(1, 0, tie=True)),
        "source",
        "file.jsonl:3",
    )
    written = []
    line = encode_record(record, lambda data, digest: written.append(data) or (7, len(data)))
    assert b"\n" not in line and set(written) == {b"bytes"}
    read = decode_record(line, "/set/media.bin")
    assert read.responses[0].messages[1].parts[3] == ImageRef(path="/set/media.bin", span=(7, 5), digest="ef" * 32)
    again = decode_record(encode_record(read, None), "elsewhere")
    assert again == read
    assert (read.id, read.preferences, read.origin, read.source) == (
        record.id, record.preferences, record.origin, record.source,
    )  # fmt: skip
    assert read.responses[1].messages[0] == prompt[0] and read.responses[1].text == "no!"
    assert read.responses[0].media[:2] == (image, video)


def test_a_set_is_the_same_to_the_byte_with_one_worker_and_with_two(tmp_path, monkeypatch):
    small_pieces(monkeypatch)
    config = config_of(tmp_path, *mixed_sources(tmp_path))
    one, two = (Made(config, f"run.dir={tmp_path / str(n)}", workers=n) for n in (1, 2))
    first, second = contents(one.folder), contents(two.folder)
    assert len([name for name in first if name.endswith("records.jsonl")]) == 6
    assert first == second


def test_training_from_sources_and_from_a_set_made_ahead_is_the_same_to_the_bit(tmp_path):
    config = config_of(tmp_path, *mixed_sources(tmp_path), run={"max_steps": 4, "log_every": 1})
    own = train(load_config(config), display=Display(silent=True))
    made = Made(config, f"run.dir={tmp_path / 'unused'}", f"data.prepared={tmp_path / 'ahead'}", workers=2)
    resolved = load_config(config, [f"run.dir={tmp_path / 'other'}", f"data.prepared={tmp_path / 'ahead'}"])
    other = train(resolved, display=Display(silent=True))
    rows = [
        [(row["loss"], row["grad_norm"]) for row in read_rows(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("run", "other")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    manifests = [read_manifest(folder) for folder in (tmp_path / "run" / "prepared", made.folder)]
    assert manifests[0]["splits"] == manifests[1]["splits"]
    assert own["eval_accuracy"] == other["eval_accuracy"] is not None
    assert own["quarantined"] == other["quarantined"] == len(made.refused) == 2


def test_a_resumed_run_finds_its_set_and_counts_its_refusals_once(tmp_path):
    sources = mixed_sources(tmp_path)
    config = config_of(tmp_path, *sources, run={"max_steps": 2})
    first = fastrm("train", config)
    assert "preparing the data in" in first.stderr and "prepared set made:" in first.stderr, first.stderr
    again = fastrm("train", config, "run.max_steps=3", "--resume", "required")
    assert again.returncode == 0, again.stderr
    assert "prepared set found:" in again.stderr and "preparing" not in again.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["quarantined"] == 2


def test_a_set_of_other_settings_is_refused_with_the_field_and_both_values(tmp_path):
    config = config_of(tmp_path, *mixed_sources(tmp_path), data={"prepared": str(tmp_path / "set")})
    Made(config)
    with pytest.raises(ConfigError) as error:
        Made(config, "data.max_pixels=1568", "data.train.1.held_out=3")
    text = str(error.value)
    assert "data.max_pixels: 3136 there, 1568 now" in text and "data.train.1.held_out: 0.2 there, 3 now" in text
    assert "prepare into another folder" in text
    # What changes nothing in it is no other setting.
    assert Made(config, "data.num_workers=1", "data.image_mean=[0,0,0]", "run.seed=7", "optim.lr=1").report is None


def test_a_set_counted_with_another_tokenizer_is_refused(tmp_path):
    config = config_of(tmp_path, *mixed_sources(tmp_path), data={"prepared": str(tmp_path / "set")})
    made = Made(config)
    path = made.folder / "tokenizer" / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["merges"].pop()
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="was counted with another tokenizer"):
        Made(config)


def test_a_runs_own_set_is_made_anew_when_settings_or_files_change(tmp_path):
    sources = mixed_sources(tmp_path)
    config = config_of(tmp_path, *sources)
    before = Made(config)
    changed = Made(config, "data.max_tokens_per_group=1024")
    assert "data.max_tokens_per_group: 2048 there, 1024 now" in changed.said and "made anew" in changed.said
    assert before.train.fingerprint == changed.train.fingerprint
    write_rows(tmp_path / "text.jsonl", text_rows(9))
    other = Made(config, "data.max_tokens_per_group=1024")
    assert f"{tmp_path / 'text.jsonl'} has changed since" in other.said
    assert other.train.fingerprint != before.train.fingerprint and other.row(sources[1]["path"])["rows"] == 9
    # The folder holds nothing of the file as it was.
    assert sorted(os.listdir(other.folder / "units")) == sorted(read_manifest(other.folder)["units"])


def test_a_shared_set_whose_file_has_changed_is_refused_and_one_whose_file_is_gone_is_not(tmp_path):
    sources = mixed_sources(tmp_path)
    config = config_of(tmp_path, *sources, data={"prepared": str(tmp_path / "set")})
    Made(config)
    text = (tmp_path / "text.jsonl").read_bytes()
    (tmp_path / "text.jsonl").unlink()
    assert Made(config).report is None
    (tmp_path / "text.jsonl").write_bytes(text + b"\n")
    with pytest.raises(ConfigError, match=r"text\.jsonl has changed since"):
        Made(config)


def test_a_file_that_joins_a_folder_of_sources_is_noticed(tmp_path):
    (tmp_path / "parts").mkdir()
    write_rows(tmp_path / "parts" / "1.jsonl", text_rows(4))
    (tmp_path / "parts" / "2.jsonl").write_text("\n")  # a file without rows is no new one later
    config = config_of(tmp_path, {"path": str(tmp_path / "parts"), "name": "parts"})
    assert Made(config).report is not None and Made(config).report is None
    write_rows(tmp_path / "parts" / "3.jsonl", text_rows(3))
    made = Made(config)
    assert f"{tmp_path / 'parts' / '3.jsonl'} is new; it is made anew" in made.said and made.row("parts")["rows"] == 7


def test_the_fingerprint_changes_with_content_and_order_but_not_with_the_folder(tmp_path):
    def fingerprint(name, rows) -> str:
        (tmp_path / name).mkdir()
        path = write_rows(tmp_path / name / "a.jsonl", rows)
        return Made(
            config_of(tmp_path / name, {"path": str(path)}, run={"dir": str(tmp_path / name)})
        ).train.fingerprint

    rows = text_rows(8)
    first = fingerprint("a", rows)
    assert fingerprint("b", rows) == first
    assert fingerprint("c", rows[::-1]) != first
    assert fingerprint("d", [{**rows[0], "margin": 0.5}, *rows[1:]]) != first
    swapped = {**rows[2], "responses": [rows[2]["rejected"], rows[2]["chosen"]], "preferences": [[1, 0]]}
    del swapped["chosen"], swapped["rejected"]
    assert fingerprint("e", [*rows[:2], swapped, *rows[3:]]) != first


def test_an_image_that_changed_after_the_set_was_made_is_refused_by_name(tmp_path):
    colour_rows(tmp_path)
    settings = {"run": {"max_steps": None, "epochs": 1}, "data": {"prepared": str(tmp_path / "set")}}
    config = config_of(tmp_path, {"path": str(tmp_path / "colours.jsonl")}, **settings)
    Made(config)
    Image.new("RGB", (56, 140), "red").save(tmp_path / "images" / "5.png")
    assert train(load_config(config), display=Display(silent=True))["quarantined"] == 1
    row = json.loads((tmp_path / "run" / "quarantine.jsonl").read_text())
    assert (row["id"], row["code"]) == ("c5", "IMAGE_CHANGED")
    assert row["message"].endswith("has another size than when it was prepared; prepare the data again")


def test_the_dry_run_says_whether_the_set_is_there_and_counts_its_preferences(tmp_path):
    from fastrm.forecast.inputs import check_inputs, count_preferences

    config = config_of(tmp_path, *mixed_sources(tmp_path), data={"prepared": str(tmp_path / "set")})
    resolved = load_config(config)
    assert ("data.prepared", "not yet") in [row[:2] for row in check_inputs(resolved)]
    made = Made(config)
    (row,) = (row for row in check_inputs(resolved) if row[0] == "data.prepared")
    assert row[1] == "found" and f"{len(made.train)} groups, {made.train.num_preferences} preferences" in row[2]
    assert count_preferences(resolved) == made.train.num_preferences


def test_groups_and_records_agree_and_survive_pickling(tmp_path):
    import pickle

    made = Made(config_of(tmp_path, *mixed_sources(tmp_path)))
    assert len(made.train) == len(made.train.groups) == len(made.train.records) > 40
    assert made.train.preference_counts.tolist() == [group.num_preferences for group in made.train.groups]
    for number, group in enumerate(made.train.groups):
        record = made.train.records[number]
        assert len(record.preferences) == group.num_preferences
        assert len(record.media) == len(group.media)
    copy = pickle.loads(pickle.dumps(made.train.records))
    assert copy[5] == made.train.records[5]


def test_a_file_in_the_place_of_the_prepared_folder_is_named(tmp_path):
    """The advice to delete it would cost the user a data file."""
    path = write_rows(tmp_path / "rows.jsonl", text_rows(4))
    with pytest.raises(StorageError, match=r"rows\.jsonl: is a file, wanted a folder for prepared data"):
        Made(config_of(tmp_path, {"path": str(path)}, data={"prepared": str(path)}))


def test_sources_without_a_usable_group_are_refused_by_reason(tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", ["{", {"prompt": "a", "chosen": "b", "rejected": "b"}])
    said = r"no usable group in 0 records \(BAD_JSON 1, IDENTICAL_RESPONSES 1\); first: .*bad\.jsonl:1: the line is not"
    with pytest.raises(DataError, match=said):
        Made(config_of(tmp_path, {"path": str(path)}, model={"tokenizer": {"train_vocab_size": 280}}))
    empty = write_rows(tmp_path / "good.jsonl", text_rows(4))
    with pytest.raises(DataError, match=r"data\.eval: no usable group"):
        Made(config_of(tmp_path, {"path": str(empty)}, eval=[{"path": str(path)}]))


def test_what_the_model_would_not_read_as_meant_is_refused_by_its_own_code(tmp_path, monkeypatch):
    monkeypatch.setitem(tokenizer.CHAT_LAYOUTS, "qwen", tokenizer.CHAT_LAYOUTS["qwen"]._replace(template=TRIMMED))
    pair = {"prompt": "What?", "chosen": "yes", "rejected": "no"}
    bad = [
        {**pair, "rejected": "yes\n"},
        {**pair, "system": "Be brief."},
        {**pair, "tools": [{"name": "f"}]},
        {**pair, "prompt": "<|im_start|>user\nWhat?<|im_end|>\n"},
        {**pair, "chosen": "yes <image>"},
        {**pair, "prompt": "<image>What?"},
    ]
    path = write_rows(tmp_path / "bad.jsonl", [*text_rows(4), *bad])
    made = Made(config_of(tmp_path, {"path": str(path)}, model={"tokenizer": {"train_vocab_size": 280}}))
    codes = {int(row["origin"].rsplit(":", 1)[1]) - 4: row["code"] for row in made.refused}
    assert codes == {
        1: "IDENTICAL_RESPONSES", 2: "UNRENDERED_KEY", 3: "UNRENDERED_KEY", 4: "RENDERED_TEMPLATE", 5: "IMAGE_COUNT",
        6: "IMAGE_COUNT",
    }  # fmt: skip
    assert len(made.train) == 4


def test_embedded_images_are_kept_in_the_set_once_in_a_unit(tmp_path):
    made = Made(config_of(tmp_path, {"path": "digits:train"}))
    sizes = [file.stat().st_size for file in made.folder.glob("units/*/media.bin")]
    distinct = {ref.key: ref.span[1] for record in made.train.records for ref in record.media}
    assert sum(sizes) == sum(distinct.values()) and len(distinct) == 1437


def test_digests_are_of_the_bytes_of_files_frames_and_archives(tmp_path):
    import hashlib
    import zipfile

    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(picture, "in.png")
    frames = tmp_path / "frames"
    frames.mkdir()
    shutil.copy(picture, frames / "1.png")
    refs = [ImageRef(path=str(picture)), ImageRef(path=str(tmp_path / "z.zip"), member="in.png"),
            ImageRef(data=picture.read_bytes()), VideoRef(path=str(frames))]  # fmt: skip
    record = Record("a", (Response((Message("user", tuple(refs)), Message("assistant", ("x",)))),), (), "s", "o")
    found = with_digests(record, MediaLimits()).responses[0].media
    digest = hashlib.sha256(picture.read_bytes()).hexdigest()
    assert [ref.digest for ref in found] == [digest] * 3 + [hashlib.sha256(digest.encode()).hexdigest()]
    # One content, one key: the pack shares what is the same.
    assert len({ref.key for ref in found[:3]}) == 1


def test_an_epochs_plan_from_a_prepared_set_holds_every_preference_once(tmp_path):
    from fastrm.data.batching import StepOrder, divide_step

    made = Made(config_of(tmp_path, *mixed_sources(tmp_path)), "data.train.0.repeat=1.5")
    order, seen = StepOrder(made.train.preference_counts, 10, 0), np.zeros(len(made.train), dtype=int)
    for _, (_, members) in zip(range(order.steps_in_epoch(0)), order.steps_from(0), strict=False):
        division = divide_step(members.tolist(), made.train.groups, 2048, 3)
        for pack in (pack for rank in range(3) for pack in division.packs(rank)):
            assert sum(made.train.groups[number].num_tokens for number in pack) <= 2048
            seen[list(pack)] += 1
    assert (seen == 1).all() and len(ids(made.train)) == 60 + 24


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder shared/data beside the project")
def test_real_images_and_texts_are_prepared_row_by_row(tmp_path):
    path = DATA / "quickstart_mix" / "train.jsonl"
    config = tiny_config(tmp_path, path, data={"max_tokens_per_group": 8192}, optim={"tokens_per_pack": 8192})
    made = Made(config, workers=2)
    row = made.row(str(path))
    assert row["rows"] == 156 == row["records"] + len(made.refused) and row["groups"] == row["records"] - row["merged"]
    assert {refusal["code"] for refusal in made.refused} <= {"EMPTY_RESPONSE"}


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder shared/data beside the project")
def test_easy_vqa_is_prepared_from_its_archives_and_trained(tmp_path):
    config = PROJECT / "configs" / "easy_vqa.yaml"
    overrides = [f"run.dir={tmp_path / 'run'}", "run.max_steps=5"]
    for split in ("train", "eval"):
        name = "train" if split == "train" else "test"
        overrides += [f"data.{split}.0.path={DATA}/easy_vqa/pairs_{name}.jsonl",
                      f"data.{split}.0.images={DATA}/easy_vqa/images_{name}.tar"]  # fmt: skip
    made = Made(config, *overrides, workers=2)
    assert made.report["sources"][0]["rows"] == 12_000 and made.report["sources"][1]["rows"] == 5_029
    assert train(load_config(config, overrides), display=Display(silent=True))["steps"] == 5


def test_frames_have_one_digest_wherever_they_are(tmp_path):
    folder = write_frames(tmp_path / "clip", moving_frames(12, 20, 10))
    in_archive = VideoRef(path=shutil.make_archive(str(tmp_path / "video"), "zip", tmp_path, "clip"), member="clip")

    def digest(ref):
        prompt = Message("user", (ref,))
        record = Record("a", (Response((prompt, Message("assistant", ("yes",)))),), (), "s", "f:1")
        return with_digests(record, MediaLimits()).media[0].digest

    assert digest(in_archive) == digest(folder)
    (tmp_path / "clip" / "frame_1.png").write_bytes(b"")
    (tmp_path / "clip" / "frame_99.png").write_bytes(b"")
    assert digest(in_archive) != digest(folder)
