"""Scores in the forms that pointwise judges write."""

import pytest

from fastrm.prompts.scores import parse_score


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Score: 85", 85.0),
        ("Score:85", 85.0),
        ("score = 85", 85.0),
        ("Score - 85", 85.0),
        ("Score \u2014 85", 85.0),
        ("**Score:**\n\n85", 85.0),
        ("| No errors | Score | 85 |", 85.0),
        ('{"final_score": 85}', 85.0),
        ("<score>85</score>", 85.0),
        ("Score: [85]", 85.0),
        ("Score (85)", 85.0),
        (r"Final Score: $\boxed{85}$", 85.0),
        ("Score: -1", -1.0),
        ("Score: .5", 0.5),
        ("Score: 1,000", 1000.0),
        ("Score: 1,234,567.5", 1234567.5),
        ("score is -1", -1.0),
        ("The score is 85", 85.0),
        ("I give it a score of 85.", 85.0),
        ("Score 85/100", 85.0),
        ("Score: 85 out of 100", 85.0),
        ("Final score is: **85**", 85.0),
        ("Score: +5", 5.0),
        ("Score: 85\n10 points were lost for style", 85.0),
        ("Score: 45\n\nNeeds work.", 45.0),
        ("Score: 72\nShould also mention the colour.", 72.0),
        ("Score: 72\nneeds work", 72.0),
        ("Final Score: 85\n\nIs it\nsafe? Yes.", 85.0),
        ("Score: 85 means it is good", 85.0),
        ("Score: 85 (could it be better?)", 85.0),
        ("Score: 4: good", 4.0),
        ("**Score:** 85: accurate", 85.0),
        ("Score: 85 = good", 85.0),
        ("Score: 8 - 1 point deducted", 8.0),
        ("Score: 8 - 2 errors", 8.0),
        ("With no errors the final score is 85.", 85.0),
    ],
)
def test_the_number_of_a_score_is_read_as_it_stands(text, wanted):
    assert parse_score(text) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Score (1-100): 85", 85.0),
        ("Score (1\u2013100): 85", 85.0),
        ("**Final Score (0-100):** 85", 85.0),
        ("Score [1-10]: 7", 7.0),
        ("Score [1, 10]: 7", 7.0),
        ("Score: (1-100) 85", 85.0),
        ("Score (0-100)\n85", 85.0),
        ("Score (1 = bad, 100 = excellent): 85", 85.0),
        ("Score out of 100: 85", 85.0),
        ("Score/100: 85", 85.0),
        ("Score from 1 to 10: 7", 7.0),
        ("Score, on a scale from 1 to 10: 7", 7.0),
        ("On a scale from 1 to 100, the score is 85.", 85.0),
    ],
)
def test_a_scale_is_not_the_score(text, wanted):
    assert parse_score(text) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Final Score: 20 + 30 + 35 = 85", 85.0),
        ("Final Score: 20+30+35=**85**/100", 85.0),
        ("Total score: 4 + 5 = 9", 9.0),
        ("Overall score: 4 x 20 = 80", 80.0),
        ("Overall score: 4 * 20 = 80", 80.0),
        ("Final average score: (4+5)/2 = 4.5", 4.5),
        ("Final Score: 20 (truth) + 30 (style) = 50", 50.0),
        ("Score: 100 - 15 = 85", 85.0),
        ("Overall score: 8 + 7 + 9 = 24 / 3 = 8", 8.0),
        ("Score: 85/100 = 0.85", 85.0),
        ("Final Score: 20 + 30 + 35", None),
        ("Final Score: 20 (truth) + 30 (style)", None),
        ("Score: (20+30)+35", None),
        ("Score: 9 = 4 + 5", None),
        ("Score: 10 - 2 points = 8", None),
    ],
)
def test_of_a_sum_its_value_is_the_score(text, wanted):
    assert parse_score(text) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Score: 7 at first. **Final Score**: 72.5/100", 72.5),
        ("Final score: 7\nAccuracy score: 8", 7.0),
        ("Accuracy score: 8\nClarity score: 6\nOverall quality score: 7", 7.0),
        ("Accuracy score: 8. Clarity score: 6. The final score is 7.", 7.0),
        ("Score: 7. No, it is right.\nScore: 8", 8.0),
        ("Score: 85. A score 100 would need more.", 85.0),
        ("Score: 85. It misses a score of 100 by the colour.", 85.0),
        ("A score of 100 would need more. It gets a score of 85.", 85.0),
        ("I would not give a score of 100. It gets a score of 85.", 85.0),
        ("It gets a score of 85. Yes, the score is 85.", 85.0),
        ("Maximum score: 100. It gets a score of 85.", 85.0),
    ],
)
def test_of_several_scores_the_stated_one_counts(text, wanted):
    assert parse_score(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "72",
        "A score cannot be given to this image of 2021.",
        "Score: N/A (1-100)",
        "Score: 1-100",
        "Score: 4 to 5",
        "a score of 4 or 5",
        "Score: 4 - 5",
        "Score: 4 - 4.5",
        "Score: 4 - 5 points",
        "Score: 4: 5",
        "I give no score of 85.",
        "Score: 7,5",
        "Score: 1.2.3",
        "Score: 10 000",
        "Score: 85th",
        "Score 1: 23\nScore 2: 21",
        "Accuracy score: 8\nClarity score: 6",
        "A score of 7 for style and a score of 5 for truth.",
        "A score of 100 would need more.",
        "I would not give a score of 100.",
        "The highest score is 100, and I cannot judge.",
        "Score: 85?",
        "<think>Score: 80, or so",
        "<think>Score: 80</think> I cannot say.",
    ],
)
def test_what_can_be_read_in_two_ways_is_no_score(text):
    assert parse_score(text) is None


def test_what_was_thought_before_does_not_count():
    assert parse_score("<think>Final score: 80?</think> Score: 70") == 70.0
