"""Every published set, in its published layout: read as `set: NAME`, by range, and from the hub."""

import json
import re
import zipfile
from dataclasses import replace
from typing import get_args

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from fastrm.data.media.images import decode_image
from fastrm.data.media.videos import VideoSettings, open_video
from fastrm.data.quarantine import Quarantine
from fastrm.data.record import ImageRef, Record
from fastrm.data.sources import FORMATS, RefusedRow, hub, published, read_source, source_files
from fastrm.data.sources.layouts import LAYOUTS
from fastrm.data.sources.published import PUBLISHED
from fastrm.data_config import SourceConfig
from fastrm.errors import DataError
from fastrm.limits import MediaLimits
from tests.helpers.project import PROJECT
from tests.helpers.published_sets import BUILDERS
from tests.helpers.runs import fastrm
from tests.helpers.source_rows import read


def pairs_of(records):
    """(prompt text, number of media, winner, loser or "tie") of every preference."""
    found = []
    for record in records:
        for p in record.preferences:
            winner, loser = record.responses[p.winner], record.responses[p.loser]
            prompt = "|".join(m.text for m in winner.messages[:-1])
            found.append((prompt, len(winner.media), winner.text, "tie" if p.tie else loser.text))
    return found


def test_every_published_set_has_a_reader_test():
    assert set(BUILDERS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_set_is_read_as_published(tmp_path, name):
    expected = BUILDERS[name](tmp_path)
    records, refused = read(tmp_path, set=name, **expected.options)
    assert pairs_of(records) == expected.pairs
    assert [code for _, code, _ in refused] == expected.refused
    assert {record.source for record in records} == {name}
    for ref in [ref for record in records for ref in record.media if isinstance(ref, ImageRef)]:
        assert decode_image(ref, MediaLimits()).size == (4, 4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_ranges_of_rows_give_what_a_whole_read_gives(tmp_path, name):
    expected = BUILDERS[name](tmp_path)
    for file in source_files(tmp_path, set=name, **expected.options):
        whole = list(file.read())
        num_rows = file.count_rows()
        assert num_rows >= max(int((item.origin).rpartition(":")[2]) for item in whole)
        for size in (1, 2, 3):
            parts = [item for start in range(0, num_rows, size) for item in file.read(start, start + size)]
            assert parts == whole


# Whose keys tell the layout; the others' keys are those of flat rows, or it takes the set to find the images.
DETECTED = sorted(set(PUBLISHED) - {"mmpr-v1.0", "mmpr-v1.1", "mmpr-v1.2"})


@pytest.mark.parametrize("name", DETECTED)
def test_layout_is_detected_from_the_keys(tmp_path, name):
    expected = BUILDERS[name](tmp_path)
    named = source_files(tmp_path, set=name, **expected.options)
    detected = [replace(file, format="auto") for file in named]
    assert [list(file.read()) for file in detected] == [list(file.read()) for file in named]


def test_partial_refusals_leave_the_record_alive(tmp_path):
    BUILDERS["vlfeedback"](tmp_path)
    (file,) = source_files(tmp_path, set="vlfeedback")
    first, second = list(file.read(0, 1))
    assert isinstance(first, RefusedRow) and first.partial and isinstance(second, Record)
    assert first.origin == second.origin
    assert first.message == "left out, without a numeric rating: completions[1]"
    (whole,) = file.read(1, 2)
    assert not whole.partial
    assert whole.message.startswith("1 of 2 completions can be used, wanted 2 or more: left out, without a numeric")


def test_folder_of_frames_in_the_archive_of_mm_rlhf_is_a_video(tmp_path):
    BUILDERS["mm-rlhf"](tmp_path)
    records, _ = read(tmp_path, set="mm-rlhf")
    (ref,) = [ref for record in records for ref in record.media if ref.member == "video/clip"]
    with open_video(ref, VideoSettings(), MediaLimits()) as video:
        assert video.header == (2, 4, 4, 24.0)


def test_rows_are_kept_or_refused_whatever_parts_they_lost(tmp_path):
    BUILDERS["vlfeedback"](tmp_path)
    (file,) = source_files(tmp_path, set="vlfeedback")
    quarantine = Quarantine(None)
    records = list(read_source(tmp_path, set="vlfeedback", quarantine=quarantine))
    assert quarantine.partial_counts["RATING_MISSING"] > 0
    assert len(records) + quarantine.total == file.count_rows()


def test_repeat_time_of_mmpr_is_the_repeat_of_its_file(tmp_path):
    BUILDERS["mmpr-v1.2"](tmp_path)
    assert [file.repeat for file in source_files(tmp_path, set="mmpr-v1.2")] == [1.0, 3.0, 0.5]


@pytest.mark.parametrize(
    "change, part",
    [
        ({"repeat_time": 0}, "has repeat_time 0, wanted a number above 0"),
        ({"repeat_time": True}, "has repeat_time True"),
        ({"annotation": "x/a.jsonl"}, 'wanted one below "annotations"'),
        ({"root": "images/../.."}, 'wanted one below "images"'),
        ({"root": None}, 'has no "root" and "annotation"'),
    ],
)
def test_malformed_meta_of_mmpr_is_a_data_error(tmp_path, change, part):
    BUILDERS["mmpr-v1.0"](tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta["single"].update(change)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="single") as caught:
        source_files(tmp_path, set="mmpr-v1.0")
    assert part in str(caught.value)


def test_mmpr_is_read_unpacked_too(tmp_path):
    expected = BUILDERS["mmpr-v1.0"](tmp_path)
    for name in ("annotations", "images"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as archive:
            archive.extractall(tmp_path)
        (tmp_path / f"{name}.zip").unlink()
    records, _ = read(tmp_path, set="mmpr-v1.0")
    assert pairs_of(records) == expected.pairs
    assert all(decode_image(ref, MediaLimits()).size == (4, 4) for record in records for ref in record.media)


def test_pairs_of_a_set_can_be_chosen(tmp_path):
    hard = BUILDERS["ultra-hard"](tmp_path).pairs
    assert pairs_of(read(tmp_path, set="ultra-all", pairs="hard")[0]) == hard
    assert pairs_of(read(tmp_path / "evol_instruct.jsonl", pairs="hard")[0]) == hard
    assert len(pairs_of(read(tmp_path / "evol_instruct.jsonl")[0])) > len(hard)


def test_hard_pairs_without_scores_are_refused(tmp_path):
    BUILDERS["rlaif-v"](tmp_path)
    _, refused = read(tmp_path, set="rlaif-v", pairs="hard")
    assert {code for _, code, _ in refused} == {"NO_SCORES"}


def test_vlfeedback_columns_of_lists_are_completions_too(tmp_path):
    BUILDERS["vlfeedback"](tmp_path)
    path = tmp_path / "vlfeedback_80k.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    before = pairs_of(read(tmp_path, set="vlfeedback")[0])[:3]
    row["completions"] = {key: [c[key] for c in row["completions"]] for key in row["completions"][0]}
    path.write_text(json.dumps(row))
    assert pairs_of(read(tmp_path, set="vlfeedback")[0]) == before


@pytest.mark.parametrize(
    "name, missing, part",
    [
        ("povid", None, "comes without its images, COCO train2014 or train2017; set `images` to their folder"),
        ("vlfeedback", "merged_images.zip", 'merged_images.zip" is missing; wanted it, or the folder "merged_images"'),
        ("vlfeedback", "vlfeedback_80k.jsonl", "has no vlfeedback_80k.jsonl; wanted the files of MMInstruction/VLF"),
        ("mmpr-v1.2", "meta.json", 'meta.json" is missing; wanted meta.json, annotations and images'),
        ("mmpr-v1.2", "annotations.zip", "is there; download the annotations"),
        ("nothing", None, 'data set "nothing" is not known; see `fastrm data sets`'),
        ("rlaif", None, 'did you mean "rlaif-v"?'),
    ],
)
def test_incomplete_copy_is_a_data_error_that_says_what_is_missing(tmp_path, name, missing, part):
    if name in BUILDERS:
        BUILDERS[name](tmp_path)
    if missing:
        (tmp_path / missing).unlink()
    with pytest.raises(DataError) as caught:
        read_source(tmp_path, set=name, quarantine=Quarantine(None))
    assert part in str(caught.value)


def test_set_without_path_is_read_from_the_hub(tmp_path, monkeypatch):
    expected = BUILDERS["vlfeedback"](tmp_path)
    asked = []

    def snapshot_download(repo, *, repo_type, allow_patterns):
        asked.append((repo, repo_type, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert pairs_of(read(None, set="vlfeedback")[0]) == expected.pairs
    assert asked == [("MMInstruction/VLFeedback", "dataset", ["vlfeedback_80k.jsonl", "merged_images.zip*"])]


def test_unreachable_hub_says_what_to_do(monkeypatch):
    def snapshot_download(*args, **options):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(DataError) as caught:
        source_files(set="rlaif-v")
    assert str(caught.value) == (
        'data set "openbmb/RLAIF-V-Dataset" cannot be read from the hub: '
        f"{constants.ENDPOINT}: no route to host; without access to the hub copy the set's files to this machine "
        "and set `path` to their folder"
    )


def test_hub_repository_is_read_by_configuration_and_split(tmp_path, monkeypatch):
    """`datasets` itself finds the files, here of a local copy of a repository."""
    repository = tmp_path / "owner" / "name"
    for config, split, text in (("a", "train", "1"), ("b", "train", "2"), ("b", "test", "3")):
        folder = repository / config
        folder.mkdir(parents=True, exist_ok=True)
        row = {"prompt": "What?", "chosen": f"good {text}", "rejected": "bad", "image": []}
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "image": "x.png"}))
    configs = (
        "- config_name: a\n  data_files: a/train.jsonl\n"
        "- config_name: b\n  data_files:\n  - split: train\n    path: b/train.jsonl\n"
        "  - split: test\n    path: b/test.jsonl\n"
    )
    (repository / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for spec, text in (("owner/name/a", "1"), ("owner/name/b", "2"), ("owner/name/b:test", "3")):
        records, refused = read(f"hub:{spec}")
        assert [record.responses[0].text for record in records] == [f"good {text}"] * 2
        assert refused == []
    with pytest.raises(DataError, match="has no split dev; wanted one of train, test"):
        read("hub:owner/name/b:dev")


@pytest.mark.parametrize("spec", ["name", "a/b/c/d", "../x", "a/b:", "/etc/passwd"])
def test_malformed_hub_name_is_a_data_error(spec):
    with pytest.raises(DataError, match="wanted hub:owner/name"):
        hub.hub_files(spec)


def test_hub_files_in_other_formats_are_refused(monkeypatch):
    monkeypatch.setattr(hub, "repository_files", lambda repo, config: {"train": ["hf://datasets/a/b@main/x.csv"]})
    with pytest.raises(DataError, match=r"x\.csv"):
        hub.hub_files("a/b")


def test_configuration_reads_a_set(tmp_path):
    expected = BUILDERS["ultra-hard"](tmp_path)
    source = SourceConfig(set="ultra-hard", path=str(tmp_path))
    records, _ = read(source.path, set=source.set, pairs=source.pairs, format=source.format, name=source.name)
    assert pairs_of(records) == expected.pairs


def test_table_of_sets_names_all_of_them():
    result = fastrm("data", "sets")
    assert result.returncode == 0, result.stderr
    for one in published.PUBLISHED.values():
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{one.name} ")]
        assert one.hub in line and one.licence in line and one.role in line


@pytest.mark.parametrize(("width", "shown"), [(80, 3), (160, 5), (250, 7)])
def test_table_of_sets_has_the_columns_that_fit(monkeypatch, capsys, width, shown):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    published.print_sets()
    text = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    names = ("name", "in the paper", "pairs", "hub id", "layout", "images", "licence")
    assert [name for name in names if re.search(rf"\b{name}\b", text.splitlines()[2])] == list(names[:shown])
    (line,) = [line for line in text.splitlines() if line.startswith("wildchat-ultrafeedback ")]
    assert "kept, in Others 63k [P]" in line and max(map(len, text.splitlines())) <= width
    said = " ".join(text.split())
    assert (f"A wider terminal also shows: {', '.join(names[shown:])}." in said) == (shown < len(names))


def test_page_has_a_line_for_every_set_and_layout():
    page = (PROJECT / "docs" / "data_sources.md").read_text()
    sets = page.partition("## Layouts")[0].splitlines()
    for one in PUBLISHED.values():
        (line,) = [line for line in sets if line.startswith(f"| {one.name} |")]
        for value in (one.hub, one.role, one.num_pairs, one.layout, one.licence, *one.files):
            assert value in line
        source = yaml.safe_load(line.rpartition("`{")[2].partition("}`")[0].join("{}"))
        assert SourceConfig.model_validate(source).set == one.name
    order = [line.split("|")[1].strip() for line in page.partition("| layout | keys")[2].splitlines() if "|" in line]
    assert [name for name in order if name in LAYOUTS] == list(LAYOUTS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_download_of_a_set_has_all_that_reading_it_needs(tmp_path, monkeypatch, name):
    """The hub's own filter of file names, on the published layout."""
    (tmp_path / "hub").mkdir()
    expected = BUILDERS[name](tmp_path / "hub")
    names = [str(file.relative_to(tmp_path / "hub")) for file in (tmp_path / "hub").rglob("*") if file.is_file()]

    def snapshot_download(repo, *, repo_type, allow_patterns):
        for kept in filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / "cache" / kept).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cache" / kept).write_bytes((tmp_path / "hub" / kept).read_bytes())
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert pairs_of(read(None, set=name, **expected.options)[0]) == expected.pairs


def test_a_row_is_scored_with_all_its_responses(tmp_path):
    """Those without a rating too, which training leaves out; and rows that training refuses."""
    BUILDERS["vlfeedback"](tmp_path)
    (training,) = source_files(tmp_path, set="vlfeedback")
    scoring = training.requiring(preferences=False)
    scored = {record.origin: [response.text for response in record.responses] for record in scoring.read()}
    trained = {record.origin: record for record in training.read() if isinstance(record, Record)}
    assert len(scored) == 3 > len(trained)
    for origin, record in trained.items():
        texts = [response.text for response in record.responses]
        assert [text for text in scored[origin] if text in texts] == texts
    assert any("unrated" in texts for texts in scored.values())
    assert not any(response.text == "unrated" for record in trained.values() for response in record.responses)


def test_configuration_knows_every_layout():
    assert get_args(SourceConfig.model_fields["format"].annotation) == FORMATS
