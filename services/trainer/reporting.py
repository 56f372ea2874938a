"""What is said of a round: the figures of its filter, of its ground truth, and why it leaves nothing to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

from services.common.contract.messages import PromptDecided
from services.common.contract.reports import Funnel, GroundTruth, RoundEvaluation
from services.trainer.pairs import pareto_pairs_of
from sipo.conversation import as_text
from sipo.evaluation.ground_truth import REWARDS
from sipo.evaluation.report import EvaluationReport
from sipo.training.data import Design
from sipo.words import counted

ADVICE = {
    "worse_than_original": "more samples_per_weight or another temperature gives more to choose from",
    "truncated": "a larger max_tokens lets responses end",
    "duplicate": "a higher temperature gives different responses",
    "empty": "see whether the policies answer such prompts at all",
}


def funnel(decisions: Sequence[PromptDecided]) -> Funnel:
    candidates = [candidate for decision in decisions for candidate in decision.candidates]
    rules = Counter(candidate.rejected.partition(":")[0] for candidate in candidates if candidate.rejected)
    return Funnel(
        prompts=len(decisions),
        failed=sum(decision.outcome == "failed" for decision in decisions),
        candidates=len(candidates),
        rejected=dict(rules.most_common()),
        accepted=sum(decision.outcome == "accepted" for decision in decisions),
        pairs=len(pareto_pairs_of(decisions)),
    )


def why_not_trainable(decisions: Sequence[PromptDecided], objectives: Iterable[str], design: Design = "both") -> str | None:
    """None if every objective has pairs, otherwise one sentence from the filter's figures, and what might help."""
    without = [objective for objective in objectives if not pareto_pairs_of(decisions, objective, design)]
    if not without:
        return None
    for objective in without:
        accepted = sum(any(only in (None, objective) for _, only in decision.accepted()) for decision in decisions)
        if accepted:
            return (
                f"no pair for {objective} with preferences: {design}, as none of the prompts with an accepted response "
                f"({accepted}) has a label for it"
            )
    figures = funnel(decisions)
    failed = next((decision.error for decision in decisions if decision.outcome == "failed"), None)
    if figures.failed == figures.prompts:
        return f"all of {counted(figures.prompts, 'prompt')} failed, the first with: {failed}"
    rules = ", ".join(f"{count} {rule}" for rule, count in figures.rejected.items()) or "none"
    reason = (
        f"no response passed the filter for {', '.join(without)}, in {counted(figures.prompts, 'prompt')} with "
        f"{counted(figures.candidates, 'candidate')} (rejected: {rules}; prompts failed: {figures.failed})"
    )
    advice = ADVICE.get(next(iter(figures.rejected), ""))
    return f"{reason}: {advice}" if advice else reason


def figures(report: EvaluationReport) -> RoundEvaluation:
    """Of an evaluation that compares the policies after a round with those before."""
    [compared] = [one for one in report.comparisons if one.method == "after"]
    return RoundEvaluation(
        prompts=report.prompts,
        hypervolume={method.name: method.hypervolume for method in report.methods},
        difference=compared.difference,
        p_value=compared.p_value,
    )


def ground_truth(objectives: Sequence[str], decisions: Iterable[PromptDecided]) -> dict[str, GroundTruth]:
    """For the objectives with a known function: the mean rewards of the accepted prompts' originals and of their new responses."""
    means = {}
    for objective, reward in REWARDS.items():
        accepted = [
            (as_text(decision.example.prompt), decision.example, candidate.text)
            for decision in decisions
            for candidate, only in decision.accepted()
            if only in (None, objective)
        ]
        if accepted and objective in objectives:
            means[objective] = GroundTruth(
                response_0=fmean(reward(prompt, example.response_0) for prompt, example, _ in accepted),
                response_1=fmean(reward(prompt, example.response_1) for prompt, example, _ in accepted),
                accepted=fmean(reward(prompt, text) for prompt, _, text in accepted),
            )
    return means
