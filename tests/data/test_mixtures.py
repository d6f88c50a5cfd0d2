"""What a prepared set holds of its sources: merged prompts, copies, benchmarks, caps, repeats, held-out prompts."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from fastrm.config import load_config
from fastrm.data.group import MAX_MERGED_RESPONSES
from fastrm.data.prepared.content import perceptual_hash
from fastrm.data.prepared.decontaminate import _near
from fastrm.data.quarantine import Quarantine
from fastrm.data.record import ImageRef
from fastrm.data.sources import read_source
from fastrm.errors import ConfigError, DataError
from fastrm.limits import MediaLimits
from tests.helpers.prepared_sets import Made, config_of, ids
from tests.helpers.runs import text_rows, write_rows

LONG = "is an answer of more than a handful of words."


def pair(name, prompt="Is it so?", chosen="yes", rejected="no", **more) -> dict:
    return {"id": name, "prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def source(folder, stem, rows, **settings) -> dict:
    return {"path": str(write_rows(folder / f"{stem}.jsonl", rows)), **settings}


def photo(path, seed=0, size=(90, 70)):
    """A picture with something to see at every scale."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def merged_one_by_one(records) -> list[list[str]]:
    """The specification of merging: one record after the other."""
    groups, latest = [], {}
    for record in records:
        key = (record.source, record.prompt_key)
        parts = latest.get(key)
        if parts is None or sum(len(part.responses) for part in parts) + len(record.responses) > MAX_MERGED_RESPONSES:
            parts = latest[key] = []
            groups.append(parts)
        parts.append(record)
    return [[record.id for record in parts] for parts in groups]


@pytest.mark.parametrize("seed", range(3))
def test_records_of_a_prompt_merge_as_one_by_one(tmp_path, seed):
    rng = random.Random(seed)
    rows = [
        {
            "id": str(n),
            "source": rng.choice("ab"),
            "prompt": f"question {min(int(rng.expovariate(0.5)), 9)}",
            "responses": [f"answer {n} {k}" for k in range(rng.choice([2, 2, 3, 9]))],
            "preferences": [[0, 1]],
        }
        for n in range(120)
    ]
    spec = source(tmp_path, "rows", rows)
    made = Made(config_of(tmp_path, spec, data={"max_tokens_per_group": 32768}, optim={"tokens_per_pack": 32768}))
    assert ids(made.train) == merged_one_by_one(read_source(spec["path"], quarantine=Quarantine(None)))
    alone = Made(tmp_path / "config.yaml", f"run.dir={tmp_path / 'alone'}", "data.merge_groups=false")
    assert ids(alone.train) == [[str(n)] for n in range(120)]


def test_images_of_equal_bytes_merge_whatever_their_paths(tmp_path):
    photo(tmp_path / "a.png", 1)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    photo(tmp_path / "c.png", 2)
    rows = [pair(name, image=f"{name}.png", rejected=f"no {name}") for name in "abc"]
    made = Made(config_of(tmp_path, source(tmp_path, "rows", rows)))
    assert ids(made.train) == [["a", "b"], ["c"]]
    record = made.train.records[0]
    assert len(record.responses) == 3 and [(p.winner, p.loser) for p in record.preferences] == [(0, 1), (0, 2)]
    assert made.train.groups[0].first_medium != made.train.groups[1].first_medium


def test_a_merged_group_that_is_too_long_falls_apart_and_names_only_what_is_too_long_itself(tmp_path):
    rows = [pair(str(n), chosen=f"{n} " + "word " * 20, rejected=f"not {n}") for n in range(4)]
    rows.append(pair("long", chosen="x", rejected="endless " * 400))
    spec = source(tmp_path, "rows", rows)
    made = Made(config_of(tmp_path, spec, data={"max_tokens_per_group": 260}))
    assert [(row["id"], row["code"]) for row in made.refused] == [("long", "TOO_LONG")]
    assert (
        sorted(name for names in ids(made.train) for name in names) == ["0", "1", "2", "3"] and 1 < len(made.train) < 4
    )
    assert made.row(spec["path"])["refused_counting"] == {"TOO_LONG": 1}


def test_copies_are_removed_across_sources_named_and_counted(tmp_path):
    first = source(tmp_path, "first", [pair("a"), pair("b", "Other?"), pair("a2")], name="one")
    swapped = {"id": "a3", "prompt": "Is it so?", "responses": ["no", "yes"], "preferences": [[1, 0]]}
    second = source(tmp_path, "second", [swapped, pair("c", margin=1.0), pair("d", chosen="no", rejected="yes")])
    evaluated = source(tmp_path, "eval", [pair("e"), pair("e2")])
    config = config_of(tmp_path, first, second, eval=[evaluated])
    made = Made(config)
    assert ids(made.train) == [["a"], ["b"], ["c", "d"]] and ids(made.eval) == [["e", "e2"]]
    assert [(row["id"], row["code"], row["source"]) for row in made.refused] == [
        ("a2", "DUPLICATE", "one"), ("a3", "DUPLICATE", "second"),
    ]  # fmt: skip
    assert made.refused[0]["message"].endswith(f"are at {first['path']}:1")
    assert (made.row("one")["duplicates"], made.row(second["path"])["duplicates"]) == (1, 1)
    kept = Made(config, f"run.dir={tmp_path / 'kept'}", "data.deduplicate=false")
    assert ids(kept.train) == [["a", "a2"], ["b"], ["a3", "c", "d"]] and not kept.refused


def test_each_kind_of_contamination_is_found_and_counted_apart(tmp_path):
    photo(tmp_path / "bench.png", 1, (200, 150))
    photo(tmp_path / "other.png", 2, (200, 150))
    Image.open(tmp_path / "bench.png").resize((120, 90)).save(tmp_path / "small.jpg", quality=80)
    bench = source(tmp_path, "bench", [
        pair("q", "What  is this?", f"A {LONG}", f"B {LONG}", image="bench.png"),
        pair("t", "Why?", "Because", "No idea"),
        pair("s", "Whose?", "No", "Yes", image="bench.png"),
    ])  # fmt: skip
    rows = [
        pair("same image", "Another question", "C", "D", image="bench.png"),
        pair("same question", "what is THIS?", "E", "F", image="bench.png"),
        pair("looks the same", "Something", "G", "H", image="small.jpg"),
        pair("same pair", "Anything", f"b {LONG}", f"a  {LONG}", image="other.png"),
        pair("same short pair", "Whose?", "yes", "no", image="other.png"),
        pair("text pair", "why?", "no idea", "because"),
        pair("other question", "Who?", "Because", "No idea"),
        pair("same text question", "Why?", "I", "J"),
        pair("clean", "What is this?", "K", "L", image="other.png"),
    ]
    spec = source(tmp_path, "rows", rows)
    config = config_of(tmp_path, spec, data={"decontaminate": {"against": [bench["path"]]}})
    made = Made(config)
    assert made.row(spec["path"])["contaminated"] == {
        "removed": 5, "image": 2, "looks": 3, "image_question": 1, "response_pair": 2,
    }  # fmt: skip
    assert {row["id"] for row in made.refused} == {
        "same image", "same question", "looks the same", "same pair", "text pair",
    }  # fmt: skip
    assert {row["code"] for row in made.refused} == {"CONTAMINATED"}
    messages = {row["id"]: row["message"] for row in made.refused}
    assert messages["same question"].endswith("by image, looks, image_question")
    for switch, kind in (("image_hash", "image"), ("perceptual_hash", "looks"), ("image_question", "image_question"),
                         ("response_pair", "response_pair")):  # fmt: skip
        off = Made(config, f"run.dir={tmp_path / switch}", f"data.decontaminate.{switch}=false")
        assert kind not in off.row(spec["path"])["contaminated"]
    strict = Made(config, f"run.dir={tmp_path / 'strict'}", "data.decontaminate.perceptual_hash=0")
    assert strict.row(spec["path"])["contaminated"]["looks"] <= 3


def test_decontamination_without_the_benchmarks_images_says_what_to_switch_off(tmp_path):
    bench = source(tmp_path, "bench", [pair("q", image="missing.png")])
    config = config_of(
        tmp_path, source(tmp_path, "rows", text_rows(4)), data={"decontaminate": {"against": [bench["path"]]}}
    )
    with pytest.raises(DataError, match=r"bench\.jsonl:1: .*missing\.png.*set image_hash, perceptual_hash"):
        Made(config)
    switches = [f"data.decontaminate.{name}=false" for name in ("image_hash", "perceptual_hash", "image_question")]
    assert len(Made(config, *switches).train) == 4


def test_benchmark_rows_that_cannot_be_read_are_counted_aloud(tmp_path):
    (tmp_path / "bench.jsonl").write_text(json.dumps(text_rows(1)[0]) + "\n{\n")
    decontaminate = {"against": [str(tmp_path / "bench.jsonl")]}
    made = Made(config_of(tmp_path, source(tmp_path, "rows", text_rows(4)), data={"decontaminate": decontaminate}))
    assert f"1 rows of {tmp_path / 'bench.jsonl'} cannot be read and are not looked for (BAD_JSON 1)" in made.said


def test_a_perceptual_hash_survives_scaling_and_compression_and_tells_pictures_apart(tmp_path):
    limits, hashes = MediaLimits(), []
    for seed in range(20):
        path = photo(tmp_path / f"{seed}.png", seed, (300, 200))
        changed = tmp_path / f"{seed}.jpg"
        Image.open(path).resize((150, 100)).save(changed, quality=60)
        one, two = (perceptual_hash(ImageRef(path=str(file)), limits) for file in (path, changed))
        assert (one ^ two).bit_count() <= 4, seed
        hashes.append(one)
    distances = [(a ^ b).bit_count() for k, a in enumerate(hashes) for b in hashes[:k]]
    assert min(distances) > 8
    Image.new("RGB", (50, 50), "white").save(tmp_path / "plain.png")
    assert perceptual_hash(ImageRef(path=str(tmp_path / "plain.png")), limits) is None


def test_nearby_hashes_are_found_by_comparing_every_pair():
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 2**63, 50, dtype=np.uint64)
    hashes = np.concatenate([rng.integers(0, 2**63, 200, dtype=np.uint64), wanted[:10] ^ np.uint64(0b1011)])
    naive = [any((int(a) ^ int(b)).bit_count() <= 3 for b in wanted) for a in hashes]
    assert _near(hashes, wanted, 3).tolist() == naive and sum(naive) == 10
    assert not _near(hashes, np.array([], dtype=np.uint64), 3).any()


def test_repeats_are_whole_groups_and_an_exact_share_of_the_rest(tmp_path):
    one = source(tmp_path, "one", text_rows(40), repeat=1.5)
    two = source(tmp_path, "two", [pair(f"b{n}", f"Is {n} odd?") for n in range(100)], repeat=0.55)
    made = Made(config_of(tmp_path, one, two))
    found = [names[0] for names in ids(made.train)]
    times = {name: found.count(name) for name in found}
    assert sorted(times[f"t{n}"] for n in range(40)) == [1] * 20 + [2] * 20
    assert sum(name.startswith("b") for name in times) == 55 and len(found) == 60 + 55
    # Entries of the index, not copies: the index holds each group once.
    assert len(np.load(made.folder / "index" / "groups.npy")) - 1 == 40 + 55
    # Another seed of the run draws the same groups; more rows keep the order of those that were there.
    again = Made(tmp_path / "config.yaml", f"run.dir={tmp_path / 'again'}", "run.seed=5")
    assert again.train.fingerprint == made.train.fingerprint
    assert made.row(two["path"])["not_drawn_groups"] == 45


def test_a_cap_is_of_preferences_and_takes_whole_groups(tmp_path):
    rows = [
        {"id": str(n), "prompt": f"Is {n}?", "responses": ["a", "b", "c"], "preferences": [[0, 1], [1, 2], [0, 2]]}
        for n in range(30)
    ]
    config = config_of(tmp_path, source(tmp_path, "rows", rows, cap=31, repeat=2))
    made = Made(config)
    assert made.train.num_preferences == 60 and len({tuple(names) for names in ids(made.train)}) == 10
    fewer = Made(config, f"run.dir={tmp_path / 'fewer'}", "data.train.0.cap=6")
    assert {tuple(names) for names in ids(fewer.train)} < {tuple(names) for names in ids(made.train)}
    capped = Made(
        config_of(
            tmp_path,
            source(tmp_path, "a", rows),
            eval=[source(tmp_path, "b", rows, cap=9)],
            run={"dir": str(tmp_path / "e")},
        )
    )
    assert capped.eval.num_preferences == 9


def test_held_out_prompts_leave_every_source(tmp_path):
    one = source(tmp_path, "one", [pair(f"a{n}", f"Is {n}?") for n in range(50)], held_out=7)
    two = source(tmp_path, "two", [pair(f"b{n}", f"Is {n}?", "si", "non") for n in range(25, 75)])
    three = source(tmp_path, "three", [pair(f"c{n}", f"Was {n}?") for n in range(40)], held_out=0.1)
    evaluated = source(tmp_path, "eval", [pair("e", "Ever?")])
    made = Made(config_of(tmp_path, one, two, three, eval=[evaluated]))
    train, held = ([names[0] for names in ids(part)] for part in (made.train, made.eval))
    assert held[0] == "e"
    out = [name for name in held if name[0] == "a"]
    assert len(out) == 7 and sum(name[0] == "c" for name in held) == 4
    assert {name for name in held if name[0] == "b"} == {f"b{name[1:]}" for name in out if int(name[1:]) >= 25} != set()
    assert len(train) + len(held) - 1 == 140 and not set(train) & set(held)


def test_weights_ties_and_group_weights_are_those_of_the_configuration(tmp_path):
    rows = [
        {"id": "a", "prompt": "p", "responses": [{"text": t, "score": s} for t, s in (("x", 1), ("y", 1), ("z", 0))]}
    ]
    spec = source(tmp_path, "rows", rows, weight=3.0)
    config = config_of(tmp_path, spec)
    ignored = Made(config)
    assert [p.weight for p in ignored.train.records[0].preferences] == [
        3.0,
        3.0,
    ] and ignored.train.num_ties_ignored == 1
    half = Made(config, f"run.dir={tmp_path / 'half'}", "loss.ties=half")
    assert sorted(p.weight for p in half.train.records[0].preferences) == [1.5, 1.5, 3.0, 3.0]
    assert half.train.num_preferences == 4 and half.train.num_ties_ignored == 0
    group = Made(config, f"run.dir={tmp_path / 'group'}", "optim.group_weight=group")
    assert sum(p.weight for p in group.train.records[0].preferences) == pytest.approx(3.0)
    assert len({made.train.fingerprint for made in (ignored, half, group)}) == 3


def test_groups_of_ties_alone_are_refused_by_name(tmp_path):
    tied = {"id": "tie", "prompt": "p", "responses": [{"text": "x", "score": 1}, {"text": "y", "score": 1}]}
    made = Made(config_of(tmp_path, source(tmp_path, "rows", [tied, pair("a")])))
    assert [(row["id"], row["code"]) for row in made.refused] == [("tie", "ONLY_TIES")]


@pytest.mark.parametrize(
    ("key", "message"),
    [("repeat", "data.eval.0: repeat and held_out are for data.train"), ("held_out", "repeat and held_out")],
)
def test_evaluation_sources_are_not_repeated_or_held_out(tmp_path, key, message):
    path = config_of(tmp_path, {"path": "a.jsonl"}, eval=[{"path": "b.jsonl", key: 0.5}])
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_published_benchmarks_are_read_by_name(tmp_path):
    row = {
        "id": "m-1",
        "query": "<image>\nWhat now?",
        "response": [f"One {LONG}", f"Two {LONG}"],
        "human_ranking": [0, 1],
    }
    (tmp_path / "bench").mkdir()
    photo(tmp_path / "bench" / "i.png")
    path = write_rows(tmp_path / "bench" / "data.jsonl", [{**row, "image": "i.png", "query_source": "x"}])
    spec = source(
        tmp_path, "rows", [pair("a", "Else?", f"two {LONG}", f"ONE {LONG}", image="bench/i.png"), *text_rows(3)]
    )
    against = {"name": "vl_rewardbench", "path": str(path), "images": str(tmp_path / "bench")}
    made = Made(config_of(tmp_path, spec, data={"decontaminate": {"against": [against]}}))
    assert [json.loads(json.dumps(row["id"])) for row in made.refused] == ["a"]
