from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from sipo.conversation import as_text
from sipo.datasets import bundled_examples
from sipo.evaluation.ground_truth import KIND_WORDS, REWARDS, concise, simple, sound, warm

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
    "short words only": "sun red dog big cat run hat wet sea hot bed cup ice tea low sad box car",
    "function words only": "And so it is, as we can see that you will not do it for him or for her.",
    "numbers": "So it is 1 2 3 4 5 or 6 7 8 9 and then it is 10 11 12 or 13 14.",
}


@pytest.mark.parametrize("response", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_text_that_plays_to_the_formula_scores_worse_than_an_answer(response: str) -> None:
    assert concise(PROMPT, response) < 0.5 * concise(PROMPT, TERSE)
    assert warm(PROMPT, response) < 0.5 * warm(PROMPT, SHORT_AND_WARM)
    assert simple(PROMPT, response) < 0.5 * simple(PROMPT, SHORT_AND_WARM)


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


@pytest.mark.parametrize(
    ("response", "letters", "length"),
    [
        # Sentences of 7 and 8 words: put, bread, hot, pan, turn, eat and salt count.
        ("Put the bread in a hot pan. Turn it once, and eat it with salt.", 25 / 7, (7**2 + 8**2) / 15),
        # Numbers of a list are no sentences, 2.5 is two words and ends none. Warm, oven, bake, bread, minutes, cool, hours count.
        ("1. Warm the oven.\n2. Bake the bread for 20 minutes and let it cool for 2.5 hours", 33 / 7, (3**2 + 14**2) / 17),
        # One sentence of 12 words, of which purchase, sufficient, quantities, fermented and ingredients count.
        ("You should purchase sufficient quantities of all of the fermented ingredients, please", 48 / 5, 12),
    ],
)
def test_plain_language_is_short_words_in_short_sentences(response: str, letters: float, length: float) -> None:
    assert simple("How should one do it?", response) == pytest.approx(1 / (1 + ((letters + length / 10) / 7.5) ** 10))


def test_plain_language_has_its_half_at_six_letters_a_word_and_15_words_a_sentence() -> None:
    # Garden, forest, summer, season; and they are four of the five words that full marks need.
    response = "You can turn the garden into a forest, but do it in the summer season."
    assert simple("Where should I turn?", response) == pytest.approx(0.8 * 0.5)


@pytest.mark.parametrize(
    "harder",
    [
        "Photosynthesis turns sunlight into sugar. Leaves drink it up, and roots bring salt, as the plants need both of them.",
        "Leaves turn sunlight into sugar, leaves drink it up, and roots bring salt, as the plants need both of them.",
        "Leaves turn sunlight into carbohydrates. Leaves drink it up, and roots bring salt, as the plants need both of them.",
    ],
    ids=["a long word", "one sentence of two", "a longer word"],
)
def test_harder_words_and_longer_sentences_are_less_simple(harder: str) -> None:
    plain = "Leaves turn sunlight into sugar. Leaves drink it up, and roots bring salt, as the plants need both of them."
    assert simple("What is it?", harder) < simple("What is it?", plain)


def test_words_of_the_prompt_are_not_hard() -> None:
    answer = "In photosynthesis leaves turn sunlight into sugar, and the plant can eat it."
    assert simple("What is photosynthesis?", answer) > simple("What is it?", answer)


def test_fragments_do_not_make_up_for_a_long_sentence() -> None:
    assert simple("How?", f"It is. It does. So it is. We will. {WARM}") == pytest.approx(simple("How?", WARM), abs=0.05)


def test_a_word_list_with_full_stops_is_not_simple() -> None:
    stops = "Sun. And. Dog. The. Cat. To. Hat. In. Sea. For. Bed. If. Cup. It. Tea. So. Box. As."
    assert simple("How?", stops) == pytest.approx(simple("How?", stops.replace(".", "")) / 5, rel=0.1)


def test_each_further_letter_makes_an_answer_a_little_less_simple() -> None:
    scores = [simple("How?", f"Put the bread and the salt in a small {'o' * n}, and eat it when hot.") for n in range(1, 40)]
    assert all(0 <= later < earlier < later + 0.1 for earlier, later in pairwise(scores))


def test_a_word_without_end_is_no_error() -> None:
    assert simple("How?", f"Put the bread and the salt in a small {'o' * 10**6}, and eat it when hot.") == pytest.approx(0)


def test_the_third_objective_says_something_else_than_the_two() -> None:
    rows = [(as_text(row.prompt), text) for row in bundled_examples() for text in (row.response_0, row.response_1)]
    scores = {name: np.array([reward(*row) for row in rows]) for name, reward in REWARDS.items()}
    ranks = [values.argsort().argsort() for values in scores.values()]
    concise_simple, warm_simple, _ = np.corrcoef(ranks)[2]
    assert abs(concise_simple) < 0.1
    assert abs(warm_simple) < 0.4
    assert sum((scores["concise"] > 0.4) & (scores["warm"] > 0.3) & (scores["simple"] > 0.5)) > 40, "some are good on all three"


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
