"""The prompts that a job's rounds are evaluated on: those of its data that nothing is trained on."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.evaluations.settle import settle, trained_prompts
from gateway.jobs.input import aligns_first, chosen_rows
from gateway.settings import GatewaySettings
from services.common.contract.evaluations import FUNCTION, EvaluationSpec
from services.common.contract.jobs import JobSpec
from sipo.errors import InvalidRequest
from sipo.evaluation.prompts import TestPrompt, check_unseen, unique
from sipo.policies import PolicySet
from sipo.preferences import Example
from sipo.resources import Machine


def held_out_prompts(
    spec: JobSpec, examples: Sequence[Example], every: Sequence[Example], settings: GatewaySettings, machine: Machine | None
) -> list[TestPrompt]:
    """Of a settled specification. `every` has the rows that their `split` holds out beside the `examples`: they are taken, or,
    where there are none, those that the rounds leave alone and no policy has seen.

    Raises InvalidRequest for fewer than two, and for an evaluation that cannot be made.
    """
    asked, objectives = spec.evaluation, spec.objectives or []
    assert asked is not None
    if set(asked.judges) != set(objectives):
        raise InvalidRequest(
            f"the job's objectives are {', '.join(objectives)}, and there are judges of {', '.join(asked.judges)}: give one for "
            "each",
            param="evaluation.judges",
        )
    aligns = aligns_first(spec, settings.policies)
    start = None if aligns else settings.policies.get(spec.sampling_set or spec.policy)
    known = {example.prompt for example in examples}
    marked = [example for example in every if example.prompt not in known]
    rows = marked or _unused(spec, examples, start, settings)
    prompts = unique(TestPrompt(prompt=row.prompt, originals=(row.response_0, row.response_1)) for row in rows)
    if len(prompts) < 2:
        raise InvalidRequest(
            f"an evaluation needs 2 prompts or more that the job does not train on, and the data has {len(prompts)}: give rows "
            "with `split`: test" + (", as a first alignment trains on all others" if aligns else ", or fewer max_prompts"),
            param="evaluation",
        )
    chosen = prompts[: asked.max_prompts]
    check_unseen(chosen, known if marked else [examples[row].prompt for row in chosen_rows(spec, examples)], "of the job")
    exact = all(judge.startswith(FUNCTION) for judge in asked.judges.values())
    methods = [*([] if exact and start else ["base"]), *([f"before={spec.mode}:{start.id}"] if start else [])]
    settle(EvaluationSpec(**asked.model_dump(), methods=methods), chosen, settings, machine)
    return chosen


def _unused(spec: JobSpec, examples: Sequence[Example], start: PolicySet | None, settings: GatewaySettings) -> list[Example]:
    if start is None:
        return []
    used = {examples[row].prompt for row in chosen_rows(spec, examples)}
    for _, trained in trained_prompts(start, settings.policies, settings.jobs_dir):
        used.update(trained)
    return [example for example in examples if example.prompt not in used]
