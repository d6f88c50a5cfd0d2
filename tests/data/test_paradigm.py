"""Rows as conversations of critics and judges."""

import json

import pytest
import yaml

from fastrm.config import load_config
from fastrm.data.paradigm import TextReading, reading_of
from fastrm.data.prepared.units import open_source
from fastrm.data.record import ImageRef, Message, Preference, Record, Response, VideoRef
from fastrm.data.sources import RefusedRow
from fastrm.errors import ConfigError
from fastrm.prompts.spec import load_spec, shipped_names
from fastrm.prompts.verdicts import Verdict
from tests.helpers.rows import needs_data
from tests.helpers.source_rows import FLAT, GROUP, RATED, SAME_PAIR, SHARED, png, turns

REASONS = {"chosen_reason": "It is right.", "rejected_reason": "It is wrong."}
OF_LIST = {**GROUP, "critiques": ["Good.", "Weak.", "Best."]}
ASKED = "[Question]: What?\n\n[LMM Response]: {}\n\n[Evaluation]:"
PAIRWISE = [name for name in shipped_names() if load_spec(name).kind == "pairwise"]


@pytest.fixture
def read(tmp_path):
    """Reads rows as a paradigm does: (records, refusals)."""
    (tmp_path / "a.png").write_bytes(png())

    def written_and_read(*rows, paradigm="critic", source=None, loss=None, **section):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sections = {paradigm: section} if section else {}
        source = {"path": str(path), **(source or {})}
        config = {"paradigm": paradigm, "run": {"dir": "runs/x"}, "model": {"path": "x"}, "data": {"train": [source]}}
        config = load_config({**config, **sections, **({"loss": loss} if loss else {})})
        (file,) = open_source(config.data.train[0], reading_of(config))
        items = list(file.read())
        assert len({item.origin for item in items}) == len(rows)
        return (
            [item for item in items if not isinstance(item, RefusedRow)],
            [(item.code, item.message) for item in items if isinstance(item, RefusedRow)],
        )

    return written_and_read


@pytest.fixture
def one(read):
    """The record of a single good row."""

    def of(row, **settings):
        (record,), refused = read(row, **settings)
        assert refused == []
        return record

    return of


def said(record):
    return [response.text for response in record.responses]


def asked(record):
    return [response.messages[-2].text for response in record.responses]


# -- critics


@pytest.mark.parametrize("layout", SAME_PAIR)
def test_a_critic_reads_a_critique_for_each_response_of_a_pair_in_every_layout(one, layout):
    is_list = layout.startswith(("groups", "rated"))
    row = SAME_PAIR[layout] | ({"critiques": list(REASONS.values())} if is_list else REASONS)
    record = one(row)
    assert said(record) == ["It is right.", "It is wrong."]
    assert [text.endswith(ASKED.format(word)) for text, word in zip(asked(record), ("yes", "no"), strict=True)] == [
        True, True,
    ]  # fmt: skip
    assert record.preferences == (Preference(0, 1),)
    for response in record.responses:
        assert [message.role for message in response.messages] == ["user", "assistant"]
        assert isinstance(response.messages[0].parts[0], ImageRef)
    assert [response.text for response in record.original.responses] == ["yes", "no"]


def test_a_list_of_critiques_belongs_to_a_list_of_responses(one):
    record = one(OF_LIST)
    assert said(record) == OF_LIST["critiques"]
    assert record.preferences == (Preference(0, 1), Preference(2, 0, 0.5))
    hard = one({**RATED, "critiques": ["weak", "good"]}, source={"pairs": "hard"})
    assert said(hard) == ["good", "weak"]


def test_a_prompt_of_several_turns_is_shown_with_its_roles_and_the_spec_s_system_turn_leads(one, tmp_path):
    spec = tmp_path / "own.yaml"
    spec.write_text("kind: critic\nsystem: Be fair.\nprompt: '{{ question }} | {{ response }}'\n")
    row = {"prompt": turns("What?", "A dog.", "Sure?"), "responses": ["yes", "no"], "preferences": [[0, 1]]}
    record = one({**row, "critiques": ["a", "b"]}, spec=str(spec))
    assert [(message.role, message.text) for message in record.responses[1].messages] == [
        ("system", "Be fair."),
        ("user", "user: What?\nassistant: A dog.\nuser: Sure? | no"),
        ("assistant", "b"),
    ]


def test_a_video_of_the_prompt_is_shown(one, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    record = one({**FLAT, **REASONS, "videos": ["a.mp4"]})
    assert isinstance(record.responses[0].messages[0].parts[0], VideoRef)


@pytest.mark.parametrize(
    "row, code, message",
    [
        (FLAT, "NO_CRITIQUE", "no critique of response 0 ('yes'), response 1 ('no'); fill in chosen_reason"),
        ({**FLAT, **REASONS, "rejected_reason": " "}, "NO_CRITIQUE", "no critique of response 1 ('no')"),
        ({**FLAT, **REASONS, "chosen_reason": None}, "NO_CRITIQUE", "no critique of response 0 ('yes')"),
        ({**FLAT, **REASONS, "chosen_reason": 3}, "BAD_ROW", '"chosen_reason" is a number, wanted text'),
        ({**FLAT, **REASONS, "chosen_reason": ["x"]}, "BAD_ROW", '"chosen_reason" is a list, wanted text'),
        ({**GROUP, "critiques": ["a", "b"]}, "BAD_ROW", '"critiques" is a list, wanted a list of 3 texts'),
        ({**GROUP, "critiques": "a"}, "BAD_ROW", '"critiques" is text, wanted a list of 3 texts'),
        ({**GROUP, "critiques": ["a", 1, "c"]}, "BAD_ROW", '"critiques[1]" is a number, wanted text'),
        ({**FLAT, **REASONS, "tools": [{"name": "f"}]}, "NOT_SHOWN", "the row has tools or documents"),
    ],
)  # fmt: skip
def test_a_row_that_a_critic_cannot_use_is_refused_in_words(read, row, code, message):
    records, ((found, text),) = read(row)
    assert records == []
    assert found == code
    assert message in text


def test_only_responses_that_are_compared_need_a_critique(one):
    record = one({**GROUP, "preferences": [[0, 1]], "critiques": ["a", "b", ""]})
    assert said(record) == ["a", "b", ""]


def test_responses_of_ties_need_a_critique_where_ties_are_trained_on(one, read):
    row = {"prompt": "What?", "responses": ["a", "b"], "scores": [1, 1], "critiques": ["x", ""]}
    assert said(one(row)) == ["x", ""]
    _, ((code, message),) = read(row, loss={"ties": "half"})
    assert (code, "no critique of response 1 ('b')" in message) == ("NO_CRITIQUE", True)


def test_missing_critiques_may_be_empty(one):
    record = one({**FLAT, "chosen_reason": "ok", "rejected_reason": "\n"}, missing="empty")
    assert said(record) == ["ok", ""]


def test_rows_of_other_layouts_and_without_critiques_are_told_apart(read):
    records, refused = read({**FLAT, **REASONS}, FLAT, OF_LIST, {**GROUP, "critiques": None})
    assert [len(record.responses) for record in records] == [2, 3]
    assert [code for code, _ in refused] == ["NO_CRITIQUE", "NO_CRITIQUE"]


def test_critiques_of_rated_completions_are_read(one):
    said_of = [("a", "4", "Good."), ("b", "1", "Bad.")]
    completions = [
        {"response": text, "critique": critique, "overall_score": 1.0, "annotations": {
            name: {"Rating": rating} for name in ("helpfulness", "honesty", "instruction_following", "truthfulness")
        }}
        for text, rating, critique in said_of
    ]  # fmt: skip
    assert said(one({"instruction": "What?", "completions": completions})) == ["Good.", "Bad."]


def test_a_list_of_critiques_is_of_all_completions_those_that_are_left_out_too(read):
    rated = [{"response": text, "annotations": {"Helpfulness": {"Rating": "3"}}} for text in ("a", "", "b", "a", "c")]
    for number, one in enumerate(rated):
        one["annotations"]["Helpfulness"]["Rating"] = str(number % 3 + 1)
    row = {"prompt": "What?", "completions": rated, "critiques": ["of a", "of nothing", "of b", "of a again", "of c"]}
    records, refused = read(row)
    assert said(records[0]) == ["of a", "of b", "of c"] and len(refused) == 2
    _, refused = read(row | {"critiques": ["of a", "of b", "of c"]})
    assert refused[0][0] == "BAD_ROW" and "wanted a list of 5 texts" in refused[0][1]


def test_without_a_critic_critiques_change_nothing(read_one, one):
    plain = read_one({**FLAT, **REASONS, "rejected_reason": 3})
    assert plain.responses == read_one(FLAT).responses
    assert plain.responses[0].critique == ""
    assert read_one({**GROUP, "critiques": "x", "thinking": 1}).original is None


def test_columns_name_the_critiques(one):
    row = {**FLAT, "good": "It is right.", "bad": "It is wrong."}
    record = one(row, source={"columns": {"chosen_reason": "good", "rejected_reason": "bad"}})
    assert said(record) == list(REASONS.values())


def test_equal_responses_with_other_critiques_are_still_identical(read):
    _, ((code, _),) = read({**FLAT, "rejected": "yes", **REASONS})
    assert code == "IDENTICAL_RESPONSES"


# -- judges


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_judge_reads_two_texts_of_a_preference_and_the_parser_reads_the_verdicts(one, name):
    spec = load_spec(name)
    record = one({**FLAT, **REASONS}, paradigm="judge", spec=name, order="both")
    assert [spec.parse(text) for text in said(record)] == [Verdict.FIRST, Verdict.SECOND]
    assert record.preferences == (Preference(0, 0), Preference(1, 1))
    straight, turned = asked(record)
    assert straight.index("yes") < straight.index("no", straight.index("yes"))
    assert straight != turned
    noun = "Answer" if name.startswith("unified") else "Response"
    assert f"{noun} 1: It is right.\n{noun} 2: It is wrong." in said(record)[0]
    assert f"{noun} 1: It is wrong.\n{noun} 2: It is right." in said(record)[1]


def test_without_critiques_a_judge_learns_the_verdict_alone(one):
    record = one(FLAT, paradigm="judge", order="both")
    assert said(record) == ["<think></think><answer>1</answer>", "<think></think><answer>2</answer>"]


@pytest.mark.parametrize("left", [{"rejected_reason": "It is wrong."}, {**REASONS, "chosen_reason": " "}])
def test_a_judge_refuses_a_row_in_which_one_of_two_responses_has_a_critique(read, left):
    """Where only wrong responses are explained, whether there is a critique would be the verdict."""
    records, ((code, message),) = read({**FLAT, **left}, paradigm="judge")
    assert records == [] and code == "NO_CRITIQUE"
    assert "no critique of response 0 ('yes'), but of others" in message


def test_a_judge_needs_critiques_of_the_responses_that_are_compared_alone(read, one):
    rows = {"prompt": "What?", "responses": ["a", "b", "c"], "critiques": ["Good.", "Weak.", None]}
    assert len(said(one({**rows, "preferences": [[0, 1]]}, paradigm="judge"))) == 1
    _, ((code, message),) = read({**rows, "preferences": [[0, 1], [1, 2]]}, paradigm="judge")
    assert code == "NO_CRITIQUE" and "response 2 ('c')" in message


@pytest.mark.parametrize("name", PAIRWISE)
def test_texts_without_thinking_are_counted(one, name):
    reading = reading_of(load_config({
        "paradigm": "judge", "judge": {"spec": name}, "run": {"dir": "runs/x"}, "model": {"path": "x"},
        "data": {"train": [{"path": "x"}]},
    }))  # fmt: skip
    assert reading.count_bare(one(FLAT, paradigm="judge", spec=name, order="both")) == 2
    assert reading.count_bare(one({**FLAT, **REASONS}, paradigm="judge", spec=name, order="both")) == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Response 1 is better. It names the dog, and the other one calls it a cat.", 0),
        ("The better response: [first]\nIt names the dog.", 0),
        ("It names the dog.\nResponse 1 is better", 0),
        ("Response 2 is better because it counts three cups.", 0),
        ("**Response 1 is better.**", 1),
        ("The better response: [first]", 1),
        ("Response 1 is better", 1),
    ],
)
def test_reasons_before_and_behind_a_verdict_are_thinking(one, text, count):
    row = {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": text}]}
    reading = TextReading("judge", "{{ question }} {{ first }} {{ second }}", parser="better")
    assert reading.count_bare(one(row, paradigm="judge", spec="llava_critic_pairwise")) == count


def test_thinking_is_about_the_responses_as_they_are_given(one):
    row = {"prompt": "What?", "responses": ["no", "yes"], "preferences": [[1, 0]], "critiques": ["x", "y"]}
    record = one({**row, "thinking": "<think>The second names it.</think>"}, paradigm="judge", order="both")
    assert said(record) == ["<think>The second names it.</think><answer>2</answer>"]


def test_random_orders_are_of_the_seed_and_the_row_and_both_occur(read):
    rows = [{**FLAT, "id": str(number), "prompt": f"What is {number}?"} for number in range(40)]
    first, _ = read(*rows, paradigm="judge", seed=0)
    again, _ = read(*rows[::-1], paradigm="judge", seed=0)
    other, _ = read(*rows, paradigm="judge", seed=1)
    verdicts = [load_spec("r1_reward").parse(said(record)[0]) for record in first]
    assert 8 < verdicts.count(Verdict.FIRST) < 32
    assert [said(record) for record in again[::-1]] == [said(record) for record in first]
    assert [said(record) for record in other] != [said(record) for record in first]


def test_copies_of_a_row_are_shown_in_one_order_whichever_response_stands_first(read):
    def rows(*, swapped):
        for number in range(40):
            responses = [f"It is {number}.", f"About {number}."]
            places = [1, 0] if swapped else [0, 1]
            yield {
                "prompt": f"What is {number}?", "responses": [responses[place] for place in places],
                "preferences": [[places.index(number % 2), places.index(1 - number % 2)]],
            }  # fmt: skip

    found, _ = read(*rows(swapped=False), paradigm="judge")
    copies, _ = read(*rows(swapped=True), paradigm="judge")
    assert [asked(record) for record in copies] == [asked(record) for record in found]
    assert [said(record) for record in copies] == [said(record) for record in found]
    verdicts = [load_spec("r1_reward").parse(said(record)[0]) for record in found]
    assert 8 < verdicts.count(Verdict.FIRST) < 32


def test_random_orders_differ_between_images_and_not_between_places_of_their_files():
    """With few answers, as in digits, an order by texts alone would be the same for every image."""
    reading = TextReading("judge", "{{ question }} {{ first }} {{ second }}", parser="better")

    def orders(folder):
        found = []
        for number in range(40):
            asked = Message("user", (ImageRef(path=f"{folder}/{number}.png"), "Which?"))
            responses = tuple(Response((asked, Message("assistant", (text,)))) for text in ("one", "two"))
            record = Record(str(number), responses, (Preference(0, 1),), "s", f"f:{number}")
            found += said(reading.convert(record))
        return found

    assert 8 < orders("here").count("Response 1 is better") < 32 and orders("here") == orders("there/it/is")


def test_a_judge_learns_each_preference_with_its_weight_and_no_ties(one, read):
    record = one(GROUP, paradigm="judge", order="both")
    assert [p.winner for p in record.preferences] == [0, 1, 2, 3]
    tie = {"prompt": "What?", "responses": ["a", "b"], "scores": [1, 1]}
    _, ((code, _),) = read(tie, paradigm="judge")
    assert code == "ONLY_TIES"


@pytest.mark.parametrize(
    "row, code, message",
    [
        ({**FLAT, "thinking": 3}, "BAD_ROW", '"thinking" is a number, wanted text'),
        ({**GROUP, "thinking": "x"}, "BAD_ROW", '"thinking" is about two responses, and the row has 3'),
        (
            {"prompt": "What?", "responses": ["a", "b"], "preferences": [[0, 1]], "thinking": "So <answer>2</answer>"},
            "BAD_VERDICT", "holds the verdict second",
        ),
        (
            {**FLAT, "thinking": "The first is right."},
            "BAD_ROW", '"thinking" beside "chosen" and "rejected" would always end in the verdict 1; write "responses"',
        ),
        (
            {"messages": turns("Which is better?", "I do not say.")},
            "BAD_VERDICT", "holds no verdict for the parser r1_reward",
        ),
    ],
)  # fmt: skip
def test_a_row_that_a_judge_cannot_use_is_refused_in_words(read, row, code, message):
    records, ((found, text),) = read(row, paradigm="judge")
    assert records == []
    assert found == code
    assert message in text


def test_a_judge_s_texts_of_a_long_list_come_in_parts_that_lose_none(read):
    row = {"prompt": "What?", "responses": [f"answer {n}" for n in range(10)], "scores": list(range(10))}
    parts, refused = read(row, paradigm="judge")
    assert refused == []
    assert [len(part.responses) for part in parts] == [16, 16, 13]
    assert len({part.id for part in parts}) == 1
    assert [len(part.original.preferences) for part in parts] == [45, 0, 0]
    for part in parts:
        assert part.preferences == tuple(Preference(number, number) for number in range(len(part.responses)))
    assert len({response.key for part in parts for response in part.responses}) == 45
    ((whole,), _) = read({**row, "critiques": ["x"] * 10})
    assert len(whole.responses) == 10


def test_responses_to_different_prompts_are_not_compared(read):
    row = {
        "conversation_a": turns("Hi", "Hello", "Why?", "a"), "conversation_b": turns("Hi", "Ho", "Why?", "b"),
        "winner": "model_a",
    }  # fmt: skip
    _, ((code, _),) = read(row, paradigm="judge")
    assert code == "NOT_SHOWN"


def test_a_conversation_with_a_verdict_is_trained_on_as_it_stands(one):
    text = "<think>The first is right.</think><answer>1</answer>"
    record = one({"messages": turns("Compare: A, B", text), "images": ["a.png"]}, paradigm="judge")
    assert said(record) == [text]
    assert asked(record) == ["Compare: A, B"]
    assert record.preferences == (Preference(0, 0),)


def test_r1_reward_s_rows_are_trained_on_as_they_stand(one):
    text = (
        "Judge.\n### [Question]:\nWhat?\n### [Response 1]:\nno\n### [Response 2]:\nyes\n### **Output Format:**\n1 or 2"
    )
    chat = [{"role": "user", "content": [{"type": "image", "image": "/else/x.jpg"}, {"type": "text", "text": text}]}]
    row = {"question": "What?", "message": json.dumps(chat), "answer": ["<answer>2</answer>"], "image": "a.png"}
    record = one(row, paradigm="judge")
    assert said(record) == ["<answer>2</answer>"]
    (image, shown) = record.responses[0].messages[0].parts
    assert shown == text
    assert image.path.endswith("a.png")
    assert [response.text for response in record.original.responses] == ["no", "yes"]


@pytest.mark.parametrize("answer", [2, "2", "<answer>2</answer>", ["<answer> 2 </answer>"]])
def test_a_judge_s_thinking_and_answer_are_its_text(one, read_json_rows, answer):
    row = {"prompt": "<image>Compare: A, B", "images": ["a.png"], "thinking": "B names it.", "answer": answer}
    record = one(row, paradigm="judge")
    assert said(record) == ["<think>B names it.</think><answer>2</answer>"]
    assert isinstance(record.responses[0].messages[0].parts[0], ImageRef)
    assert [code for _, code, _ in read_json_rows(row)[1]] == ["NO_PREFERENCE"]


@pytest.mark.parametrize("answer", [3, 1.0, True, "Response 1", ["1", "2"], []])
def test_an_answer_that_is_no_number_of_a_response_is_refused(read, answer):
    _, ((code, message),) = read({"prompt": "Compare", "thinking": "x", "answer": answer}, paradigm="judge")
    assert code == "BAD_PREFERENCE"
    assert "wanted 1 or 2" in message


def test_llava_critic_s_rows_are_trained_on_whole_with_their_spec(one, read):
    question = "<image>\nQuestion: [What?]\nThe first response: [yes]\nThe second response: [no]\nASSISTANT:"
    judged = "It is true. The better response: [first]"
    row = {"image": "a.png", "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": judged}]}
    record = one(row, paradigm="judge", spec="llava_critic_pairwise")
    assert said(record) == [judged]
    assert asked(record)[0].endswith("ASSISTANT:")
    _, ((code, message),) = read(row, paradigm="judge", spec="r1_reward")
    assert code == "BAD_VERDICT"
    assert "set the SPEC that it was written for" in message


# -- settings


def test_a_spec_of_another_kind_is_refused():
    base = {"run": {"dir": "runs/x"}, "model": {"path": "x"}}
    for paradigm, spec in (("critic", "r1_reward"), ("judge", "llava_critic_pointwise"), ("judge", "mm_rlhf_reward")):
        config = load_config({**base, "paradigm": paradigm, paradigm: {"spec": spec}})
        with pytest.raises(ConfigError, match=f"{paradigm}.spec {spec}: is a SPEC of kind"):
            reading_of(config)


@pytest.mark.parametrize("data", [{"train": [{}, {"margin": 0.5}]}, {"eval": {"hard": [{}, {"margin": 0.5}]}}])
def test_a_margin_of_a_judge_s_source_is_refused(data):
    def with_paths(found):
        if isinstance(found, dict):
            return {name: with_paths(some) for name, some in found.items()}
        return [{"path": "rows.jsonl", **source} for source in found]

    base = {"run": {"dir": "runs/x"}, "model": {"path": "x"}, "data": {"train": [{"path": "x.jsonl"}]}}
    base["data"] |= with_paths(data)
    place = "data.train.1" if "train" in data else "data.eval.hard.1"
    with pytest.raises(ConfigError, match=rf"{place}.margin with paradigm judge, which has no rewards; remove it"):
        load_config({**base, "paradigm": "judge"})
    load_config({**base, "paradigm": "critic"})


def test_a_critic_s_spec_has_no_parser(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"kind": "critic", "parser": "score", "prompt": "x"}))
    with pytest.raises(ConfigError, match="a critic writes no verdict: leave it out"):
        load_spec(str(path))
    path.write_text(yaml.safe_dump({"kind": "critic", "prompt": "{{ first }}"}))
    config = load_config(
        {"run": {"dir": "x"}, "model": {"path": "x"}, "paradigm": "critic", "critic": {"spec": str(path)}}
    )
    with pytest.raises(ConfigError, match="'first' is undefined; it has question, response"):
        reading_of(config)


# -- rows that others wrote


@needs_data
def test_critiques_that_others_wrote_are_read(read):
    lines = (SHARED / "reward_benches" / "mm_reward_bench.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    media = {"ignore": ["image", "video"]}  # they are not beside the project
    records, refused = read(*rows, source=media)
    critiques = [text for row in rows for text in (row["chosen_reason"], row["rejected_reason"])]
    assert (len(records), refused) == (170, [])
    assert [text for record in records for text in said(record)] == critiques
    judged, refused = read(*rows, paradigm="judge", source=media, order="both")
    assert (len(judged), refused) == (170, [])
    parse = load_spec("r1_reward").parse
    assert {tuple(map(parse, said(record))) for record in judged} == {(Verdict.FIRST, Verdict.SECOND)}


@needs_data
def test_preferences_that_others_wrote_without_critiques_are_refused_or_judged(read):
    rows = json.loads((SHARED / "pandalm" / "testset-v1.json").read_text())[:60]
    records, refused = read(*rows)
    assert all(one.tie for record in records for one in record.preferences)  # left out later, as loss.ties says
    assert {code for code, _ in refused} == {"NO_CRITIQUE", "EMPTY_RESPONSE"}
    judged, refused = read(*rows, paradigm="judge")
    assert {code for code, _ in refused} <= {"ONLY_TIES", "EMPTY_RESPONSE", "IDENTICAL_RESPONSES"}
    assert len(judged) > 30
