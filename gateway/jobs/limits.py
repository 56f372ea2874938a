"""Whether the decoder can answer what a job will ask: known when the job is posted, and told then, before policies are trained."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
from pydantic import ValidationError

from services.common.contract.jobs import JobSpec
from services.common.limits import Limits, slots_for
from sipo.errors import InvalidRequest
from sipo.preferences import MOD, SamplingMode

PATIENCE = 5.0
"""Seconds that a decoder has to answer: it does so while it loads, too."""


async def decoder_limits(client: httpx.AsyncClient) -> Limits | None:
    """Of the decoder that `client` has as its base URL, or of one of several equal ones; None if none answers."""
    try:
        reply = await client.get("/v1/limits", timeout=PATIENCE)
        return Limits.model_validate_json(reply.content) if reply.is_success else None
    except (httpx.HTTPError, ValidationError):
        return None


def check_limits(spec: JobSpec, limits: Limits | None) -> list[str]:
    """`spec` is settled: its objectives are named. The result is what a caller should know, a sentence each. Raises InvalidRequest
    for what the decoder cannot answer."""
    if limits is None:
        return ["the decoder does not answer, so nobody knows yet whether it has the slots and the context for this job"]
    assert spec.objectives is not None
    needed = slots_needed(spec.objectives, spec.mode)
    if needed > limits.slots:
        raise InvalidRequest(
            f"a job of {needed} objectives mixes as many policies, and {slots_for(needed, limits.slots)}", param="objectives"
        )
    written = {"max_tokens": spec.max_tokens} | ({"review_max_tokens": spec.review_max_tokens} if spec.refine else {})
    for name, tokens in written.items():
        if tokens >= limits.max_model_len:
            raise InvalidRequest(
                f"{name} is {tokens}, and the decoder has room for {limits.max_model_len} tokens with the prompt "
                f"(SIPO_DECODER_MAX_MODEL_LEN): ask for fewer",
                param=name,
            )
    return _tight(spec, limits)


def slots_needed(objectives: Sequence[str], mode: SamplingMode) -> int:
    """Of a request to these policies, at any weights: a weight of 0 takes a slot too."""
    return len(objectives) if mode == MOD else 1


def _tight(spec: JobSpec, limits: Limits) -> list[str]:
    """A rewrite reads a response and its review besides the prompt, and may be as long as the response was."""
    longest = 2 * spec.max_tokens + spec.review_max_tokens
    if not spec.refine or longest < limits.max_model_len:
        return []
    return [
        f"a rewrite may need {longest} tokens and its prompt, and the decoder has room for {limits.max_model_len} "
        "(SIPO_DECODER_MAX_MODEL_LEN): prompts with the longest responses will fail; a smaller max_tokens spares them"
    ]
