from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sipo.prompts import PromptFormat
from sipo.training.answering import answer
from sipo.training.settings import ANSWER_TOKENS, ANSWERS, Answered


def answered(**figures: int) -> Answered:
    return Answered.model_validate({"prompts": 8, "tokens": 9.5, "empty": 0, "endless": 0, "distinct": 8} | figures)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({}, {}, None),
        ({}, {"empty": 4}, None),
        ({"empty": 1}, {"empty": 5}, "5 of 8 greedy answers are empty, and before the training 1 were"),
        ({"empty": 5}, {"empty": 8}, None),
        ({"endless": 3}, {"endless": 8}, None),  # longer answers may be better ones
        ({"distinct": 7}, {"distinct": 1}, "all of 8 greedy answers are the same, and before the training 7 were different"),
        ({"distinct": 1}, {"distinct": 1}, None),
        ({"prompts": 3}, {"prompts": 3, "empty": 3}, None),
    ],
)
def test_a_training_that_spoilt_the_answers_is_told_by_them(
    before: dict[str, int], after: dict[str, int], words: str | None
) -> None:
    assert answered(**after).fault(answered(**before)) == words


def test_answers_are_the_greedy_ones_of_each_prompt_alone(tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    end = PromptFormat.of(tiny_tokenizer).end_token_id(tiny_tokenizer)
    prompts = [list(tiny_tokenizer(text)["input_ids"]) for text in ("a", "bcd", "a", "a much longer prompt", *"efghijkl")]
    model.lm_head.weight.data[end] *= 3  # so that some end by themselves
    alone = [greedy(model, prompt, end) for prompt in list(dict.fromkeys(map(tuple, prompts)))[:ANSWERS]]
    model.train()
    found = answer(model, prompts, end_token=end)
    assert model.training
    lengths = [len(one) - (one[-1] == end) for one in alone]
    assert found.prompts == ANSWERS
    assert found.tokens == sum(lengths) / ANSWERS
    assert found.endless == sum(one[-1] != end for one in alone)
    assert found.empty == sum(length == 0 for length in lengths)
    assert found.distinct == len({tuple(one) for one in alone})


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: tuple[int, ...], end: int) -> list[int]:
    model.eval()
    made: list[int] = []
    while len(made) < ANSWER_TOKENS and (not made or made[-1] != end):
        made.append(int(model(torch.tensor([[*prompt, *made]])).logits[0, -1].argmax()))
    return made
