from __future__ import annotations

from collections import Counter

import pytest

from sipo.datasets import bundled_examples
from sipo.evaluation.ground_truth import KIND_WORDS, REWARDS, concise, sound, warm

PROMPT = "I have my first job interview on Monday and I can't sleep. Any advice?"
TERSE = "Write down three answers for the job interview on Monday, then sleep with the phone in another room and an alarm set."
WARM = (
    "Oh, I am so sorry to hear that, my dear friend, and I understand how you feel. It is an exciting day and you are wonderful, "
    "so smile, breathe gently, be proud of how far you have come, and believe that all of those who love you will be cheering, "
    "because the people there will be lucky to meet somebody as kind as you are."
)
SHORT_AND_WARM = "Good luck with your job interview, dear friend: sleep well, be proud, and on Monday you will shine."

DEGENERATE = {
    "empty": "",
    "no words": "!!! ... ???",
    "one word": "Wonderful",
    "kind words only": "Wonderful lovely kind dear happy joy love sweet proud brave warm gentle caring thankful bright smile",
    "a kind word repeated": "love " * 30,
    "a kind phrase repeated": "you are so kind and " * 12,
    "an echo": PROMPT,
    "words of the prompt only": "First job interview Monday sleep advice",
}


@pytest.mark.parametrize("response", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_text_that_plays_to_the_formula_scores_worse_than_an_answer(response: str) -> None:
    assert concise(PROMPT, response) < 0.5 * concise(PROMPT, TERSE)
    assert warm(PROMPT, response) < 0.5 * warm(PROMPT, SHORT_AND_WARM)


def test_the_two_objectives_conflict_on_a_terse_and_a_warm_answer() -> None:
    assert concise(PROMPT, TERSE) > concise(PROMPT, WARM) + 0.2
    assert warm(PROMPT, WARM) > warm(PROMPT, TERSE) + 0.2


def test_one_answer_can_beat_both_on_both() -> None:
    for reward in REWARDS.values():
        assert reward(PROMPT, SHORT_AND_WARM) > max(reward(PROMPT, TERSE), reward(PROMPT, WARM))


def test_each_further_word_makes_an_answer_less_concise() -> None:
    longer = [TERSE + " Be calm and breathe, as the day goes on." * n for n in range(4)]
    scores = [concise(PROMPT, text) for text in longer]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 4


def test_leaving_out_what_was_asked_makes_an_answer_less_concise() -> None:
    # Same length; none of the prompt's words.
    assert concise(PROMPT, TERSE.replace("job interview on Monday, then sleep", "large dinner at Easter, then cook")) < concise(
        PROMPT, TERSE
    )


def test_kind_words_of_the_prompt_earn_nothing() -> None:
    answer = "The lovely garden is to the left of the house and has a gate."
    assert warm("Where is the lovely garden?", answer) < warm("Where is the garden?", answer)


def test_speaking_to_the_reader_is_warmer() -> None:
    assert warm("How?", "You can put your tea on the shelf by your door.") > warm(
        "How?", "One can put the tea on the shelf by the door."
    )


def test_a_typographic_apostrophe_is_an_apostrophe() -> None:
    assert warm("How?", "Don’t hesitate, as you’ve got this and it will go well.") == warm(
        "How?", "Don't hesitate, as you've got this and it will go well."
    )


def test_rewards_stay_between_0_and_1_and_rarely_tie() -> None:
    examples = bundled_examples()
    for reward in REWARDS.values():
        scores = [reward(row.prompt, text) for row in examples for text in (row.response_0, row.response_1)]
        assert 0 <= min(scores) < max(scores) <= 1
        chance_of_a_tie = sum(count**2 for count in Counter(scores).values()) / len(scores) ** 2
        assert chance_of_a_tie < 0.05


def test_running_text_is_sound_and_a_word_list_is_not() -> None:
    assert sound(TERSE.lower().split()) == 1
    assert sound(sorted(KIND_WORDS)) < 0.01
