"""The pairs that follow from decisions: what a round's policies learn."""

from __future__ import annotations

from collections.abc import Iterable

from services.common.contract.messages import PromptDecided
from sipo.training.data import ChosenResponse, Design, TrainingPair, pareto_rows


def pareto_pairs_of(
    decisions: Iterable[PromptDecided], objective: str | None = None, design: Design = "both"
) -> list[TrainingPair]:
    """D^c: the pairs of every chosen response; with `objective` those that its policy learns, by the design."""
    return [
        row
        for decision in decisions
        for row in pareto_rows(
            decision.example,
            [ChosenResponse(candidate.text, candidate.token_ids, only) for candidate, only in decision.accepted()],
            objective,
            design,
        )
    ]
