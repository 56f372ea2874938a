"""Pairs and their tokens, on a byte-level tokenizer."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from sipo.conversation import Message, as_messages, as_prompt
from sipo.preferences import Example
from sipo.prompts import PromptFormat
from sipo.training.data import ChosenResponse, Design, TokenisedPairs, TrainingPair, alignment_pairs, pareto_rows, tokenise
from sipo.training.methods import lw_pairs

END = 0


def tokens(source: list[TrainingPair], tokenizer: PreTrainedTokenizerFast, **changes: int | None) -> TokenisedPairs:
    settings = {"max_prompt_tokens": 64, "max_response_tokens": 32, "max_pairs": None, "seed": 0} | changes
    return tokenise(source, PromptFormat.of(tokenizer), tokenizer, **settings)  # type: ignore[arg-type]


TALK = (Message(role="system", content="be kind"), Message(role="user", content="hi"))


def numbered(count: int) -> list[TrainingPair]:
    return [TrainingPair(prompt=f"p{i}", chosen=f"good {i}", rejected=f"bad {i}") for i in range(count)]


def test_alignment_pairs_follow_the_objectives_label_and_skip_examples_without_one() -> None:
    examples = [
        Example(prompt="a", response_0="a0", response_1="a1", labels={"warm": 1, "concise": 0}),
        Example(prompt="b", response_0="b0", response_1="b1", labels={"concise": 1}),
    ]
    assert list(alignment_pairs(examples, "warm")) == [{"prompt": "a", "chosen": "a1", "rejected": "a0"}]
    assert [pair["chosen"] for pair in alignment_pairs(examples, "concise")] == ["a0", "b1"]


def test_an_accepted_response_beats_both_originals_with_the_tokens_it_was_sampled_with() -> None:
    example = Example(prompt="x", response_0="y0", response_1="y1", labels={"warm": 1, "concise": 0})
    against_0 = {"prompt": "x", "chosen": "best", "rejected": "y0", "chosen_token_ids": [1, 2]}
    against_1 = against_0 | {"rejected": "y1"}
    best = ChosenResponse("best", [1, 2])
    assert pareto_rows(example, [best]) == pareto_rows(example, [best], "warm") == [against_0, against_1]
    for_warm = ChosenResponse("best", [1, 2], "warm")
    assert pareto_rows(example, [for_warm], "warm") == [against_1]
    assert pareto_rows(example, [for_warm], "concise") == pareto_rows(example, []) == []
    elsewhere = ChosenResponse("best", [], "warm")
    assert pareto_rows(example, [elsewhere], "warm") == [{"prompt": "x", "chosen": "best", "rejected": "y1"}]


@pytest.mark.parametrize(
    ("design", "learnt"),
    [
        ("both", ["c>y0", "c>y1", "d>y0", "d>y1"]),
        ("preferred", ["c>y1", "d>y1"]),
        ("preferred_and_original", ["c>y1", "d>y1", "y1>y0"]),
        ("original", ["y1>y0"]),
        ("dispreferred", ["c>y0", "d>y0"]),
    ],
)
def test_each_design_of_figure_8_has_its_preferences(design: Design, learnt: list[str]) -> None:
    example = Example(prompt="x", response_0="y0", response_1="y1", labels={"warm": 1})
    chosen = [ChosenResponse("c", [1]), ChosenResponse("d", [2])]

    def said(objective: str) -> list[str]:
        return [f"{row['chosen']}>{row['rejected']}" for row in pareto_rows(example, chosen, objective, design)]

    assert said("warm") == learnt
    assert said("concise") == ([] if design == "original" else ["c>y0", "c>y1", "d>y0", "d>y1"]), "it has no label here"


def test_tokens_are_those_of_the_prompt_format_with_one_end_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = tokens([TrainingPair(prompt="hi", chosen="yes", rejected="no")], tiny_tokenizer).train
    assert tiny_tokenizer.decode(row["prompt_ids"]) == "u:hi<end>\na:"
    assert tiny_tokenizer.decode(row["chosen_ids"]) == "yes<end>"
    assert tiny_tokenizer.decode(row["rejected_ids"]) == "no<end>"


def test_a_conversation_is_plain_json_in_pairs_and_tokenised_as_its_messages(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    example = Example(prompt=TALK, response_0="no", response_1="yes", labels={"warm": 1})
    best = [ChosenResponse("best", [1, 2])]
    made = [
        *alignment_pairs([example], "warm"),
        *lw_pairs([example], {"warm": 1.0}),
        *pareto_rows(example, best, "warm", "preferred_and_original"),
    ]
    assert [pair["prompt"] for pair in made] == [as_messages(TALK)] * 4
    for row in tokens(made, tiny_tokenizer).train:
        assert tiny_tokenizer.decode(row["prompt_ids"]) == "s:be kind<end>\nu:hi<end>\na:"


def test_a_sampled_response_keeps_the_tokens_it_was_sampled_with(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sampled = [5, 6, 7]
    (row,) = tokens([TrainingPair(prompt="hi", chosen="yes", rejected="no", chosen_token_ids=sampled)], tiny_tokenizer).train
    assert row["chosen_ids"] == sampled


def test_long_prompts_are_left_out_long_responses_lose_their_end_and_both_are_counted(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    source = [
        TrainingPair(prompt="p" * 65, chosen="a", rejected="b"),
        TrainingPair(prompt="p", chosen="a" * 40, rejected="b"),
        TrainingPair(prompt="q", chosen="same", rejected="same"),
    ]
    found = tokens(source, tiny_tokenizer)
    (row,) = found.train
    assert len(row["chosen_ids"]) == 32 and END not in row["chosen_ids"]
    assert found.left_out == {"prompts_too_long": 1, "responses_cut": 1, "identical": 1}


def test_a_tenth_is_held_out_from_forty_pairs_on(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    few = tokens(numbered(39), tiny_tokenizer)
    assert not few.held_out and few.validation == few.train and len(few.train) == 39
    enough = tokens(numbered(40), tiny_tokenizer)
    assert enough.held_out and (len(enough.train), len(enough.validation)) == (36, 4)
    assert not [row for row in enough.validation if row in enough.train]


@pytest.mark.parametrize("before", [(), TALK], ids=["text", "conversation"])
def test_both_pairs_of_a_prompt_stay_on_one_side_of_the_split(
    tiny_tokenizer: PreTrainedTokenizerFast, before: tuple[Message, ...]
) -> None:
    asked = [as_prompt([*before, Message(role="user", content=f"p{i}")]) for i in range(30)]
    examples = [Example(prompt=asked[i], response_0=f"a{i}", response_1=f"b{i}", labels={"warm": 1}) for i in range(30)]
    source = [pair for i, example in enumerate(examples) for pair in pareto_rows(example, [ChosenResponse(f"best {i}", [1, 2])])]
    found = tokens(source, tiny_tokenizer)
    prompts = [{tuple(row["prompt_ids"]) for row in side} for side in (found.train, found.validation)]
    assert found.held_out and not prompts[0] & prompts[1]
    assert len(found.train) + len(found.validation) == 60


def test_max_pairs_draws_usable_pairs_by_seed(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    source = [*numbered(20), TrainingPair(prompt="p" * 65, chosen="a", rejected="b")]
    drawn = [tokens(source, tiny_tokenizer, max_pairs=10, seed=seed).train for seed in (1, 1, 2)]
    assert [len(rows) for rows in drawn] == [10, 10, 10]
    assert drawn[0] == drawn[1] != drawn[2]
