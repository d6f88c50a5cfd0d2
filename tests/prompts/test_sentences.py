"""Which response a text calls better in a sentence, in what judges write and think."""

import pytest

from fastrm.prompts.verdicts import Verdict, find_better, parse_better

FIRST, SECOND, TIE = Verdict.FIRST, Verdict.SECOND, Verdict.TIE


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Answer 2 is better", SECOND),
        ("At first Answer 1 is better, but all in all, **Response 2 is slightly better**.", SECOND),
        ("Both responses are equally good.", TIE),
        ("The two are equally good on style. Response 1 is better.", FIRST),
        ("Answer 1 is good, answer 2 too", None),
        ("Response 2 is not better than Response 1.", None),
        ("Response 1 is no better. Answer 2 is never better, and Response 1 is hardly better.", None),
        ("Response 1 is better, as Response 2 is not better in any way.", FIRST),
        ("Response 1 isn't better than Response 2.", None),
        ("Neither Response 1 is better nor Response 2 is better.", None),
        ("Response 1 is neither better nor worse.", None),
        ("Neither Response 1, which is short, nor Response 2 is better.", None),
        ("Neither response is better. They are both equally good.", TIE),
        ("Neither is better: both are equally good.", TIE),
        ("Neither response is perfect, but Response 1 is better.", FIRST),
        ("Neither answer is right but Answer 2 is much better.", SECOND),
        ("Another Response 2 is better", SECOND),
        ("It is true. The better response: [first]", FIRST),
        ("The better response: [second].", SECOND),
    ],
)
def test_the_last_sentence_that_is_said_is_the_verdict(text, wanted):
    assert parse_better(text) is wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("**Answer 1** is better", FIRST),
        ("Answer 1 is **better**", FIRST),
        ("__Answer 2__ is _better_", SECOND),
        ("[Response 1] is better", FIRST),
        ("'Response 1' is better", FIRST),
        ("### Verdict\n`Response 2` is better", SECOND),
        ("Response #2 is better", SECOND),
        ("Response 1 is far and away better", FIRST),
        ("Response 1 is so much better.", FIRST),
        ("Response 1 is by far the better one.", FIRST),
        ("I would say that Response 1 is better", FIRST),
        ("There is no doubt that Response 1 is better.", FIRST),
        ("Better response: **first**", FIRST),
        ("The better response: Response 2", SECOND),
        ("The better response: [2] because it is right", SECOND),
        ("The better answer is Answer 2.", SECOND),
        ("The better response: A", FIRST),
        ("The better answer is 2. It is right.", SECOND),
        ("Response 2 is better. Ideas for a better response: 1. Cite sources.", SECOND),
        ("Response 2 is better. Ideas for the better response: 1. Cite sources.", SECOND),
        ("Response 2 is better. Ideas for the better response: 1) Cite sources.", SECOND),
        ("Response 2 is better. What makes for an even better answer: A", SECOND),
        ("The better response: a more detailed one is Response 2.", None),
        ("The better response: 2 of the 3 claims are right in Response 1.", None),
        ("In accuracy Response 2 is better. Overall, **Response 1** is better.", FIRST),
    ],
)
def test_markdown_brackets_and_words_of_degree_may_stand_in_a_sentence(text, wanted):
    assert parse_better(text) is wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("I don't think Response 1 is better.", None),
        ("I don\u2019t think Response 1 is better.", None),
        ("It is not the case that Response 1 is better.", None),
        ("It is not the case, I think, that Response 1 is better.", None),
        ("It is not yet clear that Response 2 is better.", None),
        ("It is not so clear that Response 1 is better.", None),
        ("No one would say Response 2 is better.", None),
        ("It is impossible to say that Response 2 is better.", None),
        ("I disagree that Response 2 is better.", None),
        ("Response 2 is rarely better", None),
        ("Response 2 is only better in style", None),
        ("Response 2 is better in no way.", None),
        ("To say that Response 1 is better would be wrong.", None),
        ("Nor do I think Response 2 is better.", None),
        ("It is neither true nor likely that Response 1 is better.", None),
        ("Whether Response 1 is better, or Response 2 is better, is hard to say.", None),
        ("Either Response 1 or Response 2 is better.", None),
        ('I have to end with "Answer 1 is better" or "Answer 2 is better".', None),
        ("I have to end with 'Answer 1 is better' or 'Answer 2 is better'.", None),
        ("The form is: Answer 1 is better / Answer 2 is better", None),
        ('"Response 1 is better", "Response 2 is better", or "Both responses are equally good".', None),
        ("Perhaps Response 1 is better.", None),
        ("Response 1 is far from better", None),
        ("Response 1 is less better", None),
        ("Response 1 is nothing better", None),
        ("I reject the claim that Response 1 is better", None),
        ("Nothing suggests that Response 1 is better", None),
        ("There is little evidence that Response 1 is better", None),
        ("There is no evidence that Response 1 is better", None),
        ("There is no other reason why Response 1 is better", None),
        ("No sane judge would say Response 1 is better", None),
        ("Instead of saying Response 1 is better, I prefer Response 2", None),
        ("There is little doubt that Response 1 is better", FIRST),
        ("Although there is no doubt that Response 1 is better in style, I take none.", None),
        ("Since there are no hallucinations in it Response 1 is better.", FIRST),
        ("To say that Response 1 is the better one would be wrong.", None),
        ("Response 1 is better, isn't it?", None),
        ("Response 1 is better? No, Response 2 is clearly better.", SECOND),
        ("Response 2 is not accurate and Response 1 is better.", FIRST),
        ("There are no errors in it, and Response 1 is better.", FIRST),
        ("Response 1 is better than Response 2, which does not name the colour.", FIRST),
        ("Response 1 is better. I doubt that Response 2 is better.", FIRST),
        ("Response 2 is better in style. Yet it is neither right nor clear and thus Response 1 is better.", FIRST),
        ("Response 1 has style, but since it is neither accurate nor complete Response 2 is better.", SECOND),
        ("Response 1 is better in style, but since it is neither right nor clear Response 2 is better.", SECOND),
    ],
)
def test_what_is_denied_doubted_or_asked_is_not_said(text, wanted):
    assert parse_better(text) is wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Answer 2 is better as it does not refuse or answer evasively.", SECOND),
        ("Answer 1 is better since Answer 2 gets one or both of the objects wrong.", FIRST),
        ("Answer 1 is better because it follows the question/answer format.", FIRST),
        ("Response 1 is better on the basis of accuracy or response length", FIRST),
        ("Answer 1 is better, or that Answer 2 is better", None),
        ('Response 1 is better because it answers "Why is the sky blue?" correctly.', FIRST),
        ("Response 1 is better because it answers \u201cWhy is the sky blue?\u201d correctly.", FIRST),
        ("Response 1 is better as it answers 'Why is the sky blue?' correctly.", FIRST),
        ("Response 1 is better (it's clear, isn't it?).", FIRST),
        ("Response 1 is better: who would want more?", FIRST),
        ("I was asked: Response 1 is better or worse?", None),
        ('"Response 1 is better?" he asks.', None),
    ],
)
def test_a_verdict_is_not_undone_by_what_follows_it(text, wanted):
    assert parse_better(text) is wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("I do not think that\nResponse 1 is better.", None),
        ("I do not think\r\nResponse 1 is better.", None),
        ("I do not\nbelieve that Response 1 is better.", None),
        ("It is hard to say whether Answer 1 is better or\nAnswer 2 is better", None),
        ("I cannot say that Answer 1 is worse or\n**Answer 2** is better", None),
        ("The better answer is a\nlonger one.", None),
        ("The better answer is\nanswer 2", SECOND),
        ("It does not name the colour\nResponse 1 is better", FIRST),
        ("It is not that\n\nResponse 1 is better", FIRST),
        ("It is not that\n- Response 1 is better", FIRST),
        ("It is not that\n## Response 1 is better", FIRST),
        ("what it lacks is not said\nverdict: answer 1 is better", FIRST),
    ],
)
def test_a_line_that_goes_on_in_the_next_is_one_with_it(text, wanted):
    assert parse_better(text) is wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Overall, Response 1 is better, though Response 2 is better in style.", FIRST),
        ("Although Response 1 is better in style, Response 2 is better.", SECOND),
        ("Although Response 1 is better in style, I take the other.", None),
        ("While both are equally good, I have to choose.", None),
        ("Answer 1 is better than Answer 2, though both handle colors equally well.", FIRST),
    ],
)
def test_what_is_conceded_is_not_said(text, wanted):
    assert parse_better(text) is wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Both Response 1 and Response 2 are equally good.", TIE),
        ("**Both** responses perform *equally well*", TIE),
        ("Neither response is better but both are equally good.", TIE),
        ("Answer 1 is better at colours, Answer 2 is better at shapes; overall it is a tie.", TIE),
        ("It's a tie", TIE),
        ("Response 1 is better. Both responses are not equally good.", FIRST),
        ("Response 1 is better, so it is hard to say it is a tie.", FIRST),
        ("Response 1 is better. Both handle colors equally well.", FIRST),
        ("It is a tie-breaker: Response 1 is better", FIRST),
        ("They are equally good in style.", None),
        ("Overall, both are about equally good.", TIE),
        ("The two responses are both equally good.", TIE),
        ("Response 1 is better in accuracy, but overall they are equally good.", TIE),
        ("I think that they are equally good, so I cannot choose.", TIE),
        ("Response 1 is better in style. The two responses are equally good.", TIE),
        ("Response 1 is better in style. The result is a tie.", TIE),
        ("<answer>Both are equally good</answer>", TIE),
        ("Response 1 is better since it correctly says that the match is a tie.", FIRST),
        ("Response 2 is better. The object around his neck is a tie.", SECOND),
        ("Response 1 is better, since Response 2 wrongly says that it is a tie.", FIRST),
        ("Response 2 is better because its answers to all three questions are equally good.", SECOND),
        ("Response 1 is better. Its two examples are equally good.", FIRST),
        ("Response 1 is better because Response 2 claims that both are equally good.", FIRST),
        ("In accuracy Response 1 is better; in fluency both are equally good.", FIRST),
        ("Response 1 is better than I thought, they are equally good.", FIRST),
    ],
)
def test_a_tie_is_one_only_where_it_is_the_verdict(text, wanted):
    assert parse_better(text) is wanted


def test_the_place_of_a_sentence_is_that_in_the_text_itself():
    text = "**Response 1** is better, I thought. But \u201c[Response 2]\u201d is better."
    place, verdict = find_better(text)
    assert verdict is SECOND and text[place:].startswith("Response 2]")
