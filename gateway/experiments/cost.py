"""What a method costs at full size: tokens by formula, from the sizes of the data, and hours of one GPU, at measured rates.

Sizes and rates are given by the experiment's file. Lengths are means; the paper gives limits only, which bound from above. What a
generation reads (prompts, and the examples of review and rewrite, which a decoder keeps) is part of its rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from gateway.experiments.result import Result, Tokens
from sipo.record import Record


class Sizes(Record):
    """Of the data (arXiv 2502.14354, appendices A.1 and A.3)."""

    pairs: int = Field(ge=1, description="training pairs of each objective")
    conflicting: int = Field(ge=0, description="prompts of a round")
    accepted: int = Field(ge=0, description="of them, with a Pareto-optimal response")
    objectives: int = Field(default=2, ge=2)
    weights: int = Field(default=4, ge=1, description="M of section 3.2: without the policies themselves")
    alignment_epochs: float = Field(gt=0)
    round_epochs: float = Field(gt=0)
    prompt_tokens: float = Field(gt=0)
    response_tokens: float = Field(gt=0)
    review_tokens: float = Field(gt=0)


class Rates(Record):
    """Tokens a second of one GPU, measured; None: nobody has."""

    generated: float | None = Field(default=None, gt=0)
    scored: float | None = Field(default=None, gt=0)
    trained: float | None = Field(default=None, gt=0)


class Cost(Record):
    sizes: Sizes
    rates: Rates = Rates()
    paper_gpu_hours: dict[str, float] = Field(default={}, description="by method: sipo, modpo")


class Hours(Record):
    """Hours of one GPU by kind of work; None where there is no rate."""

    generated: float | None
    scored: float | None
    trained: float | None

    @property
    def known(self) -> float:
        return sum(hours for hours in (self.generated, self.scored, self.trained) if hours is not None)

    @property
    def whole(self) -> bool:
        return None not in (self.generated, self.scored, self.trained)


def alignment_tokens(sizes: Sizes) -> Tokens:
    """Eq. 2 for each objective: every pair's prompt and both responses, in each epoch; read once more for the reference."""
    read = sizes.objectives * sizes.pairs * _pair(sizes)
    return Tokens(scored=round(read), trained=round(read * sizes.alignment_epochs))


def round_tokens(sizes: Sizes) -> Tokens:
    """A round: at each of M weights a sample, its review and its rewrite (Eq. 3 to 5); both originals and the 2M candidates read
    by the policies, the soups at M weights and the reference (Eq. 6); two pairs of each accepted response, for every policy, which
    the reference reads once (Eq. 8)."""
    made = sizes.conflicting * sizes.weights * (2 * sizes.response_tokens + sizes.review_tokens)
    responses = 2 + 2 * sizes.weights
    models = sizes.objectives + sizes.weights + 1
    read = sizes.conflicting * (sizes.prompt_tokens + responses * sizes.response_tokens) * models
    pairs = sizes.objectives * sizes.accepted * 2 * _pair(sizes)
    return Tokens(generated=round(made), scored=round(read + pairs), trained=round(pairs * sizes.round_epochs))


def modpo_tokens(sizes: Sizes) -> Tokens:
    """The alignments, which are the margins and the ends of the front, and a model for each of the M weights between them, whose
    pairs the reference and the other objectives' policies read once."""
    ends = alignment_tokens(sizes)
    read = sizes.weights * sizes.pairs * _pair(sizes)
    return Tokens(scored=ends.scored + round(read * sizes.objectives), trained=ends.trained + round(read * sizes.alignment_epochs))


def methods_tokens(sizes: Sizes) -> dict[str, Tokens]:
    """Of the whole way from the fine-tuned model to each method's policies, by the method's name."""
    aligned, improved = alignment_tokens(sizes), round_tokens(sizes)
    sipo = Tokens(generated=improved.generated, scored=aligned.scored + improved.scored, trained=aligned.trained + improved.trained)
    return {"sipo": sipo, "modpo": modpo_tokens(sizes)}


def hours(tokens: Tokens, rates: Rates) -> Hours:
    return Hours(
        generated=_hours(tokens.generated, rates.generated),
        scored=_hours(tokens.scored, rates.scored),
        trained=_hours(tokens.trained, rates.trained),
    )


def seconds_left(missing: Sequence[str], measured: Mapping[str, Sequence[Result]]) -> tuple[float, list[str]]:
    """Of the steps that are missing, by their stages' names: the means of what the same stages took so far, in other seeds or with
    other settings. Then the stages that were never measured, which the sum is without."""
    unknown = list(dict.fromkeys(name for name in missing if not measured.get(name)))
    means = {name: sum(one.seconds for one in found) / len(found) for name, found in measured.items() if found}
    return sum(means[name] for name in missing if name in means), unknown


def _pair(sizes: Sizes) -> float:
    return sizes.prompt_tokens + 2 * sizes.response_tokens


def _hours(tokens: int, rate: float | None) -> float | None:
    return 0.0 if not tokens else None if rate is None else tokens / rate / 3600
