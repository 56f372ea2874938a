"""What a caller is told of a job when it is posted: what will be left out, and by which field; and what looks wrong in the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.jobs.input import aligns_first, chosen_rows
from services.common.contract.jobs import JobSpec
from services.common.limits import Limits
from services.common.settings import CommonSettings
from sipo.datasets.doubts import doubts
from sipo.errors import InvalidRequest, NotFound
from sipo.models import resolve_model
from sipo.policies import PolicyStore
from sipo.preferences import Example
from sipo.prompts import PromptFormat
from sipo.resources import check, needed_by_job
from sipo.words import counted, share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def account(
    spec: JobSpec,
    examples: Sequence[Example],
    left_out: Mapping[str, int],
    settings: CommonSettings,
    limits: Limits | None,
) -> list[str]:
    """Of a settled specification: a sentence each. `left_out`: of the data, by reason; `limits`: the decoder's, as far as known.

    Raises InvalidRequest where nothing would be left to train on, or to answer.
    """
    said = [
        *(f"left out: {reason} ({count})" for reason, count in left_out.items()),
        *_rows(spec, examples),
        *doubts(examples, spec.objectives or []),
    ]
    try:
        base = resolve_model(settings.model, settings.cache_dir)
    except NotFound as error:
        return [*said, f"whether prompts are too long is not known: {error.message}"]
    runs = len(spec.objectives or []) * (spec.rounds + 1)
    check(needed_by_job(base, spec.alignment, runs, spec.sft), settings.jobs_dir)
    return [*said, *_lengths(spec, examples, _tokenizer(base), settings.policies, limits)]


def _rows(spec: JobSpec, examples: Sequence[Example]) -> list[str]:
    objectives, said = spec.objectives or [], []
    chosen = len(chosen_rows(spec.model_copy(update={"max_prompts": None}), examples))
    if others := len(examples) - chosen:
        kind = {"conflicting": "conflict on", "non_conflicting": "agree on", "all": "have a label for"}[spec.examples]
        said.append(
            f"{share(others, len(examples), 'row')} not sampled, as only those that {kind} {', '.join(objectives)} are: "
            f"examples is {spec.examples}"
        )
    if spec.max_prompts is not None and spec.max_prompts < chosen:
        said.append(f"only the first {share(spec.max_prompts, chosen, 'prompt')} sampled: max_prompts is {spec.max_prompts}")
    return said


def _lengths(
    spec: JobSpec,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    store: PolicyStore,
    limits: Limits | None,
) -> list[str]:
    aligns = aligns_first(spec, store)
    prompt_format = PromptFormat.of(tokenizer) if aligns else store.get(spec.sampling_set or spec.policy).manifest.prompt_format
    tokens = _prompt_tokens(examples, prompt_format, tokenizer)
    sampled = [tokens[row] for row in chosen_rows(spec, examples)]
    said = []
    if spec.sft is not None:
        most = spec.sft.max_prompt_tokens
        said += _too_long(tokens, most, f"sft.max_prompt_tokens = {most}", "not fine-tuned on")
    if aligns:
        most = spec.alignment.max_prompt_tokens
        said += _too_long(tokens, most, f"alignment.max_prompt_tokens = {most}", "not trained on in the first alignment")
    if spec.stop_after is None:
        most = spec.training.max_prompt_tokens
        said += _too_long(sampled, most, f"training.max_prompt_tokens = {most}", "sampled, but not trained on")
    if limits is not None:
        context = f"max_tokens = {spec.max_tokens} to follow within SIPO_DECODER_MAX_MODEL_LEN = {limits.max_model_len}"
        said += _too_long(sampled, limits.max_model_len - spec.max_tokens, context, "bound to fail")
    return said


def _too_long(tokens: Sequence[int], most: int, limit: str, fate: str) -> list[str]:
    """Raises InvalidRequest if all are."""
    long = sum(count > most for count in tokens)
    if long == len(tokens):
        raise InvalidRequest(
            f"every prompt is too long for {limit}: the shortest has {counted(min(tokens), 'token')}", param="examples"
        )
    return [f"{share(long, len(tokens), 'prompt')} too long for {limit}: {fate}"] if long else []


def _prompt_tokens(examples: Sequence[Example], prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of each example's prompt, in the format of the policies; all at once, which is many times faster."""
    texts = []
    for row, example in enumerate(examples, start=1):
        try:
            texts.append(prompt_format.text(example.prompt, tokenizer))
        except InvalidRequest as error:
            raise InvalidRequest(f"row {row}: {error.message}", param="examples") from error
    ids = tokenizer(texts, add_special_tokens=prompt_format.kind == "raw")["input_ids"]
    return [len(one) for one in ids]


@cache
def _tokenizer(base: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    return tokenizer
