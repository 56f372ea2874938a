"""What a policy answers: loss and reward accuracy do not show one that says nothing, or the same to everybody.

Greedy answers to a few validation prompts, before a training and after it. What was so before the training is not its fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from sipo.training.settings import ANSWER_TOKENS, ANSWERS, Answered


@torch.inference_mode()
def answer(model: Any, prompts: Sequence[Sequence[int]], *, end_token: int) -> Answered:
    """Of the first ANSWERS different `prompts`, as token ids. The model is left in the mode that it was in."""
    asked = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))][:ANSWERS]
    width = max(map(len, asked))
    ids = torch.tensor([[end_token] * (width - len(prompt)) + prompt for prompt in asked], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked], device=model.device)
    greedy = GenerationConfig(
        max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=end_token, pad_token_id=end_token, use_cache=True
    )
    training = model.training
    model.eval()
    made = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)[:, width:].tolist()
    model.train(training)
    ended = [row.index(end_token) if end_token in row else None for row in made]
    answers = [row if end is None else row[:end] for row, end in zip(made, ended, strict=True)]
    return Answered(
        prompts=len(asked),
        tokens=sum(map(len, answers)) / len(answers),
        empty=sum(not one for one in answers),
        endless=sum(end is None for end in ended),
        distinct=len(set(map(tuple, answers))),
    )
