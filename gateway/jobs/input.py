"""What a job may start from: its specification checked against the data and the policies, its input stored as one file.

All of the input is read and checked before anything is kept. The feeder asks here which rows a round is made of, so that the
counts a caller is told at creation are those of the prompts that run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from gateway.folders import write_folder
from services.common.contract.job_files import JobFiles
from services.common.contract.jobs import JobSpec
from sipo.errors import Conflict, InvalidRequest
from sipo.evaluation.prompts import TestPrompt
from sipo.policies import PolicySet, PolicyStore
from sipo.preferences import BASE, Example, check_objectives, normalize_weights
from sipo.training.presets import NOT_OF_SFT


def settle_spec(
    spec: JobSpec,
    examples: Sequence[Example],
    policies: PolicyStore,
    reward_models: Collection[str] = (),
    teachers: Collection[str] = (),
) -> JobSpec:
    """The specification with its objectives named and its weights normalised. `reward_models`, `teachers`: the external ones of
    this system.

    Raises InvalidRequest (or InvalidWeights) if data, policies and specification do not fit each other, Conflict if the policies
    exist but none of their versions is current.
    """
    objectives = _objectives(spec, examples, policies)
    for name in objectives:
        if not any(name in example.labels for example in examples):
            labels = ", ".join(sorted({label for example in examples for label in example.labels}))
            raise InvalidRequest(f"no example has a label for {name!r}: the labels found are {labels}", param="objectives")
    _check_training(spec, objectives, aligns=aligns_first(spec, policies))
    for name in spec.filter.reward_models:
        if name not in reward_models:
            known = ", ".join(sorted(reward_models)) or "none"
            raise InvalidRequest(
                f"no reward model {name!r}: SIPO_REWARD_MODELS of this system names {known}", param="filter.reward_models"
            )
        if name in objectives:
            raise InvalidRequest(
                f"the reward model {name!r} is called like an objective: name it otherwise", param="filter.reward_models"
            )
    for name in spec.teachers:
        if name not in teachers:
            known = ", ".join(sorted(teachers)) or "none"
            raise InvalidRequest(f"no teacher {name!r}: SIPO_TEACHERS of this system names {known}", param="teachers")
    settled = spec.model_copy(
        update={
            "objectives": objectives,
            "alignment": spec.alignment.model_copy(update={"alpha": 0.0}),
            "weights": spec.weights
            and [normalize_weights(w, objectives, param=f"weights[{i}]") for i, w in enumerate(spec.weights)],
            "review_weights": spec.review_weights and normalize_weights(spec.review_weights, objectives, param="review_weights"),
        }
    )
    if not chosen_rows(settled, examples):
        conflicting = sum(example.conflicting(objectives) for example in examples)
        raise InvalidRequest(
            f"no example is left: {conflicting} of {len(examples)} conflict on {', '.join(objectives)}, and `examples` asks for "
            f"{spec.examples}",
            param="examples",
        )
    return settled


def aligns_first(spec: JobSpec, policies: PolicyStore) -> bool:
    """Whether there is nothing to improve yet: the job aligns its policies first."""
    return spec.sampling_set is None and spec.policy not in policies.names()


def _check_training(spec: JobSpec, objectives: Sequence[str], *, aligns: bool) -> None:
    if spec.sft is not None and not aligns:
        raise InvalidRequest(
            f"the policies of {spec.policy!r} have their reference already, which a fine-tuning makes for new ones: leave `sft` "
            "out, or choose a new policy name",
            param="sft",
        )
    if spec.sft is not None and (foreign := sorted(spec.sft.model_fields_set & NOT_OF_SFT)):
        raise InvalidRequest(f"sft sets {', '.join(foreign)}: fine-tuning has no pairs, leave it out", param="sft")
    for name in spec.learning_rates:
        if name not in objectives:
            raise InvalidRequest(
                f"learning_rates has one for {name!r}: the job's objectives are {', '.join(objectives)}", param="learning_rates"
            )
    # Only what a caller has written: `alignment` may have other fields, and the default of alpha is a round's.
    if "alpha" in spec.alignment.model_fields_set and spec.alignment.alpha > 0:
        raise InvalidRequest(
            "alpha is the weight of the NLL term in Eq. 8, and a first alignment (Eq. 2) has none: leave it out, or give 0",
            param="alignment.alpha",
        )


def _objectives(spec: JobSpec, examples: Sequence[Example], policies: PolicyStore) -> list[str]:
    if spec.policy == BASE:
        raise InvalidRequest(f"{BASE!r} is the model without policies: choose a name for the policies to align", param="policy")
    if aligns_first(spec, policies):
        # The labels say what one policy each will be aligned for.
        objectives = spec.objectives or list(dict.fromkeys(name for example in examples for name in example.labels))
        if len(set(objectives)) < 2:
            raise InvalidRequest(f"at least two objectives are needed, not just {', '.join(objectives)}", param="objectives")
        check_objectives(objectives)
        return list(dict.fromkeys(objectives))
    start = _start(spec, policies)
    if spec.objectives is not None and set(spec.objectives) != set(start.objectives):
        raise InvalidRequest(
            f"{start.id} has policies for {', '.join(start.objectives)}, and a job improves all of them: leave `objectives` "
            "out, or choose a new policy name",
            param="objectives",
        )
    return start.objectives


def _start(spec: JobSpec, policies: PolicyStore) -> PolicySet:
    """The set that the first round samples from."""
    if spec.sampling_set is None:
        current = policies.current(spec.policy)
        if current is None:
            raise Conflict(
                f"policy {spec.policy!r} has no current set: activate one of its versions first, or name one as `sampling_set`",
                param="policy",
            )
        return current
    versions = {policy_set.id: policy_set for policy_set in policies.sets() if policy_set.manifest.name == spec.policy}
    if spec.sampling_set not in versions:
        known = ", ".join(versions) or "none yet"
        raise InvalidRequest(
            f"{spec.sampling_set!r} is no set of policy {spec.policy!r}: its sets are {known}", param="sampling_set"
        )
    return versions[spec.sampling_set]


def chosen_rows(spec: JobSpec, examples: Sequence[Example]) -> list[int]:
    """The rows of the input whose prompts the first round runs, in order; a later round runs these or some of them."""

    def chosen(example: Example) -> bool:
        conflicting = example.conflicting(spec.objectives)
        labelled = any(name in example.labels for name in spec.objectives or example.labels)
        return labelled and {"conflicting": conflicting, "non_conflicting": not conflicting, "all": True}[spec.examples]

    return [row for row, example in enumerate(examples) if chosen(example)][: spec.max_prompts]


def store_input(folder: Path, examples: Iterable[Example], held_out: Sequence[TestPrompt] = ()) -> None:
    """Writes the input of the job in `folder`, which appears whole or not at all; `held_out`: the prompts of its evaluation."""
    files = JobFiles(folder)
    write_folder(folder, {files.input.name: examples} | ({files.held_out.name: held_out} if held_out else {}))
