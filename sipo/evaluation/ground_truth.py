"""The objectives of the bundled data, as functions: what other data sets must ask people for is exact and free here.

All map (prompt, response) to [0, 1], are smooth enough for ties to be rare, and know nothing of models or policies. They measure
words, not truth: good for telling whether a front moved, useless for telling whether an answer is right. All are multiplied by
`sound`, so that text that only plays to the formula (nothing, one word, a word list, repetition) scores badly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import exp
from statistics import fmean


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTION_WORDS = _word_set(
    """
    a about after all also am an and any are as at be because been before being but by can could did do does doing down each
    for from get give had has have having he her here hers him his how i if in into is it its just let like make me more most
    my no nor not now of off on once only or other our out over own please she should so some such tell than that the their
    them then there these they this those through to too under until up us very was we were what when where which while who
    why will with would you your yours yourself i'm i've i'd i'll it's that's there's you're you've you'd you'll we're we've
    we'll let's he's she's they're don't doesn't didn't isn't aren't wasn't can't won't
    """
)

ADDRESS = _word_set("you your yours yourself you're you've you'd you'll we we're we'll let's our us together")

KIND_WORDS = _word_set(
    """
    admire adventure amazing appreciate appreciated awesome beautiful beautifully beloved bless blessed blessing blessings
    brave bravery bright brilliant calm care caring celebrate celebrating celebration charming cheer cheerful cheers cherish
    cherished comfort comforting compassion confidence confident congratulations cosy courage cozy cute darling dear dearest
    delight delighted delightful dream dreams embrace empathy encourage encouragement encouraging enjoy enjoyable enjoying
    excited excitement exciting fantastic favorite favourite fond forgive friend friendly friends friendship fun generous
    gentle gently gift glad gorgeous grateful gratitude great hand happier happily happiness happy heart heartfelt hearts
    heartwarming hello hi honest hope hopeful hug hugs inspire inspired inspiring joy joyful kind kindly kindness laugh
    laughing laughter listen love loved lovely loves loving luck lucky magic magical marvellous memorable memories memory nice
    normal okay patience patient peace peaceful playful pleased pleasure positive precious pride proud relax reassure
    rewarding safe self-compassion share sharing shine smile smiles smiling special splendid strength strong success support
    supporting supportive sweet sweetie thank thankful thanks thoughtful thrilled thrilling together treasure treasured trust
    understand understandable understanding unforgettable valued warm warmest warmly warmth welcome welcoming well-being
    wish wishes wishing wonderful wonderfully worry worthy
    """
)

KIND_PHRASES = (
    "by your side",
    "don't hesitate",
    "feel free",
    "good job",
    "good luck",
    "here for you",
    "here to help",
    "i'm sorry",
    "it's okay",
    "looking forward",
    "no problem",
    "not alone",
    "of course",
    "one step at a time",
    "so sorry",
    "take care",
    "take your time",
    "well done",
    "you can do",
    "you've got this",
)


def concise(prompt: str, response: str) -> float:
    """Says what was asked for in few words: coverage of the prompt's content words, traded against length.

    Brevity is 0.93 at 15 words, 1/2 at 36, 0.18 at 60. Coverage alone moves the result by a factor of 2.5. An echo of the prompt
    scores badly: full marks need five content words that are not the prompt's.
    """
    words = _words(response)
    asked, said = _stems(_words(prompt)), _stems(words)
    coverage = len(asked & said) / len(asked) if asked else 1.0
    news = min(1.0, len(said - asked) / 5)
    brevity = 1 / (1 + (len(words) / 36) ** 3)
    return sound(words) * news * (0.4 + 0.6 * coverage) * brevity


def warm(prompt: str, response: str) -> float:
    """Is kind, and speaks to the reader: the density of distinct kind words and phrases, and of words of address.

    Kind words of the prompt do not count. Both parts saturate: two kind words in 20 bring the first to 0.63.
    """
    words = _words(response)
    if not words:
        return 0.0
    text = f" {' '.join(words)} "
    kind = len(KIND_WORDS.intersection(words).difference(_words(prompt))) + sum(f" {phrase} " in text for phrase in KIND_PHRASES)
    address = sum(word in ADDRESS for word in words)
    return sound(words) * (0.75 * (1 - exp(-10 * kind / len(words))) + 0.25 * (1 - exp(-10 * address / len(words))))


def simple(prompt: str, response: str) -> float:
    """Is in plain language, in the manner of readability formulas: short words in short sentences.

    1/2 at six letters a word and 15 words a sentence, 0.9 at five and 10, 0.14 at seven and 20; ten words more are as hard as one
    letter more. Words of the prompt, function words and numbers have no letters here, so that neither the topic nor padding counts;
    each other word counts once. Full marks need five of those, and five words a sentence: fragments are no sentences. It does not
    measure whether a short word is a known one, whether the sentences hang together, or whether there are few of them.
    """
    words = _words(response)
    news = {word for word in words if not word.isdigit()} - set(_words(prompt)) - FUNCTION_WORDS
    if not news:
        return 0.0
    letters = fmean(map(len, news))
    sentences = _sentence_lengths(response)
    # Of the sentence in which the average word stands, so that a few fragments do not make up for a long one.
    length = sum(count**2 for count in sentences) / sum(sentences)
    plain = 1 / (1 + ((letters + length / 10) / 7.5) ** 10)
    return sound(words) * min(1.0, len(news) / 5) * min(1.0, length / 5) * plain


REWARDS: dict[str, Callable[[str, str], float]] = {"concise": concise, "warm": warm, "simple": simple}
"""By objective name: (prompt, response) -> [0, 1], higher is better."""


def sound(words: list[str]) -> float:
    """Is it running text at all? 1 from eight words on, if enough of them differ and enough of them are function words; 0 for none.

    English prose repeats less than half of its words at these lengths, and two words in five of it are function words.
    """
    if not words:
        return 0.0
    length = min(1.0, len(words) / 8)
    variety = min(1.0, len(set(words)) / len(words) / 0.5)
    grammar = min(1.0, sum(word in FUNCTION_WORDS for word in words) / len(words) / 0.25)
    return length * (variety * grammar) ** 2


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", text.lower().replace("’", "'"))


def _sentence_lengths(text: str) -> list[int]:
    """In words. A line's end is a sentence's; a decimal point is none, and neither is the number of a list's entry a sentence."""
    sentences = map(_words, re.split(r"[.!?…]+(?=\W|$)|\n", text))
    return [len(words) for words in sentences if any(not word.isdigit() for word in words)]


def _stems(words: list[str]) -> set[str]:
    """Content words by their first five letters, so that bake, baked and baking are nearly always one."""
    return {word[:5] for word in words if word not in FUNCTION_WORDS}
