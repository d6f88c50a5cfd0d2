"""The cost of a group's rewards against that of a generative judge: what is judged, and what the page shows."""

from bench.harness.results import load_all
from bench.rl import judge_cost
from tests.helpers.documents import text_of


def test_every_ordered_pair_is_judged_once():
    answers = judge_cost.rollouts()
    prompts = [messages[0]["content"] for messages in judge_cost.judge_prompts("So?", answers)]
    assert len(set(answers)) == 8 and len(set(prompts)) == len(prompts) == 8 * 7
    places = [(text.index(first), text.index(second)) for text, first, second in _pairs(prompts, answers)]
    assert all(first < second for first, second in places)


def _pairs(prompts, answers):
    pairs = [(first, second) for first in answers for second in answers if first != second]
    return [(text, *pair) for text, pair in zip(prompts, pairs, strict=True)]


def test_the_page_shows_the_table_of_the_results():
    [found] = load_all(judge_cost.SUFFIX)
    assert found["written_tokens"] == found["judgements"] * found["new_tokens"]
    assert "\n".join(judge_cost.table_of(found)) in text_of("docs/grpo.md")
