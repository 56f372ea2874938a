"""Experiments as files: what is refused, what a plan's keys depend on, and what the shipped ones come to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from gateway.cli import app
from gateway.cli.experiment.evaluation import arguments
from gateway.cli.experiment.show import time_left
from gateway.cli.experiment.training import epochs_of
from gateway.experiments.cost import Rates, Sizes, hours, methods_tokens
from gateway.experiments.definition import POLICY, SHIPPED, Evaluate, ExperimentFile, find_experiment, read_experiment
from gateway.experiments.plan import Plan, Step
from gateway.experiments.result import Result, Tokens, write_result
from sipo.errors import InvalidRequest, NotFound
from sipo.evaluation.prompts import TestPrompt
from sipo.preferences import Example
from tests.fakes import write_policy_set

SMALL: dict[str, Any] = {
    "name": "tiny",
    "description": "a test",
    "objectives": ["concise", "warm"],
    "judges": {"concise": "python:concise", "warm": "python:warm"},
    "seeds": [0, 1],
    "stages": [
        {"name": "sft", "kind": "sft", "seed": "fixed"},
        {"name": "align", "kind": "align", "reference": "sft"},
        {"name": "round", "kind": "round", "start": "align", "job": {"max_tokens": 8}},
        {"name": "more", "kind": "more_training", "start": "align", "steps_of": "round"},
        {
            "name": "front",
            "kind": "evaluate",
            "methods": ["base", "reference=reference:align", "mod=mod:align", "sipo=mod:round", "more=soup:more"],
            "against": ["mod"],
        },
    ],
}


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def stage(kind: str, **fields: Any) -> dict[str, Any]:
    return {"name": "new", "kind": kind, **fields}


def small(index: int | None = None, more: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """SMALL with other fields; with stage `index` changed by `more`, or `more` as a further stage."""
    content = SMALL | fields
    stages = [dict(one) for one in content["stages"]]
    if index is not None:
        stages[index] |= more or {}
    elif more is not None:
        stages.append(more)
    return content | {"stages": stages}


def planned(tmp_path: Path, content: Any = SMALL) -> Plan:
    return Plan(read_experiment(write(tmp_path, content)), tmp_path / "experiments" / "tiny")


def keys(plan: Plan) -> dict[tuple[str, int | None], str]:
    return {(step.stage.name, step.seed): step.key for step in plan.steps}


def finish(step: Step, seconds: float = 1, policy_set: str | None = None) -> None:
    step.folder.mkdir(parents=True)
    result = Result(
        stage=step.stage.name,
        kind=step.stage.kind,
        seed=step.seed,
        key=step.key,
        seconds=seconds,
        tokens=Tokens(),
        policy_set=policy_set,
    )
    write_result(step.folder, result)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (small(seads=[1]), "`seads` is no known field: did you mean `seeds`?"),
        (small(seeds=[1, 1]), "a seed is given twice"),
        (small(judges={"concise": "python:concise"}), "judges must name one address for each of the objectives"),
        (small(weights=1), "an even grid needs both ends"),
        (small(preset="big"), "no preset 'big'"),
        (small(1, {"settings": {"learnin_rate": 1}}), "stage align: `settings.learnin_rate` is no known field"),
        (small(1, {"settings": {"seed": 3}}), "stage align: settings of kind align cannot have seed"),
        (small(1, {"settings": {"alpha": 0.1}}), "stage align: settings of kind align cannot have alpha"),
        (small(0, {"settings": {"beta": 0.1}}), "stage sft: settings of kind sft cannot have beta"),
        (small(2, {"job": {"max_token": 8}}), "stage round: `job.max_token` is no known field: did you mean `max_tokens`?"),
        (small(2, {"job": {"training": {"epoch": 8}}}), "stage round: `job.training.epoch` is no known field"),
        (small(2, {"job": {"policy": "demo"}}), "stage round: a round's job cannot have policy"),
        (small(2, {"job": {"filter": {"reward_models": ["exact"]}}}), "the filter names 'exact': give its address"),
        (small(2, {"reward_models": {"warm": "python:warm"}}), "the reward model 'warm' is called like an objective"),
        (small(2, {"start": "sft"}), "`start` is 'sft': it must be an earlier stage of kind align or round or more_training"),
        (
            small(1, {"reference": "round"}),
            "`reference` is 'round': it must be an earlier stage of kind sft, of which",
        ),
        (small(1, {"seed": "fixed"} | {"data": "nowhere"}), "`data` is 'nowhere': it must be an earlier stage of kind subset"),
        (small(2, {"seed": "fixed"}), "stage round: `seed` is fixed, and align is made for every seed"),
        (small(more=stage("dance")), "stage new: `kind` must be one of subset, sft, align"),
        (small(more=SMALL["stages"][1]), "stage align: there are two stages of this name"),
        (small(more=stage("evaluate", methods=["mod=mix:align"])), "cannot read the method 'mod=mix:align'"),
        (small(more=stage("evaluate", methods=["mod=models:align"])), "it must be an earlier stage of kind lw or modpo"),
        (small(more=stage("evaluate", methods=["base"], against=["mod"])), "`against` names 'mod': the methods are base"),
        (
            small(judges={"concise": "hf:x", "warm": "python:warm"}, more=stage("evaluate", methods=["mod=mod:align"])),
            "add the method base",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_the_field(tmp_path: Path, content: Any, words: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InvalidRequest) as caught:
        read_experiment(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert words in caught.value.message


def test_an_unknown_experiment_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(NotFound, match=r"no experiment 'small': there are .*small-main"):
        find_experiment("small")


def test_every_seed_has_its_steps_and_evaluations_come_last(tmp_path: Path) -> None:
    steps = planned(tmp_path).steps
    assert [(step.stage.name, step.seed) for step in steps] == [
        ("sft", None),
        *((name, seed) for seed in (0, 1) for name in ("align", "round", "more")),
        ("front", None),
    ]
    assert list(steps[-1].uses) == ["reference", "mod@0", "mod@1", "sipo@0", "sipo@1", "more@0", "more@1"]
    assert steps[1].folder.parent.name == "seed-0"
    assert steps[1].folder.name == f"align-{steps[1].key[:12]}"
    assert steps[0].folder.parent == steps[-1].folder.parent


def test_a_change_makes_new_what_builds_on_it_and_nothing_else(tmp_path: Path) -> None:
    before = keys(planned(tmp_path))
    other = keys(planned(tmp_path, small(2, {"job": {"max_tokens": 9}})))
    changed = {name for (name, seed), key in before.items() if other[name, seed] != key}
    assert changed == {"round", "more", "front"}
    assert len(set(before.values())) == len(before), "seeds and stages have keys of their own"


def test_one_more_seed_leaves_what_the_others_made(tmp_path: Path) -> None:
    before, after = keys(planned(tmp_path)), keys(planned(tmp_path, small(seeds=[1, 5, 0])))
    assert {name: key for name, key in after.items() if name in before and name[0] != "front"} == {
        name: key for name, key in before.items() if name[0] != "front"
    }


def test_a_stages_settings_win_over_the_presets_and_the_seed_goes_in(tmp_path: Path) -> None:
    experiment = planned(tmp_path, small(1, {"settings": {"epochs": 7}}, preset="beavertails")).experiment
    align, improve = experiment.stages[1], experiment.stages[2]
    settings = experiment.settings(align, 5)  # type: ignore[arg-type]
    assert (settings.epochs, settings.lora_rank, settings.seed) == (7, 64, 5)
    job = experiment.job(improve, 5)  # type: ignore[arg-type]
    assert (job.policy, job.seed, job.training.seed, job.training.learning_rate, job.max_tokens) == (POLICY, 5, 5, 5e-6, 8)
    assert job.training_for("harmless").learning_rate == 5e-5, "the preset's own of an objective"


def test_prompts_that_were_trained_on_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path, {}).with_name("data.jsonl")
    row = Example(prompt="q", response_0="a", response_1="b", labels={"concise": 0, "warm": 1})
    data.write_text(row.model_dump_json() + "\n")
    with pytest.raises(InvalidRequest, match=r"1 of 1 test prompt is in the training data data\.jsonl"):
        planned(tmp_path, small(data="data.jsonl", prompts="data.jsonl"))


def test_the_time_left_is_that_of_the_same_stage_in_other_seeds(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert time_left(plan).startswith("8 steps left; how long they take")
    for step in plan.steps[:3]:
        finish(step, 3600)
    assert time_left(plan) == "about 2.0 h for 2 of 5 steps left; not measured yet: more, front"
    for step in plan.steps[3:]:
        finish(step)
    assert time_left(plan) == "all of 8 steps are done"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_experiment_is_planned_and_its_evaluations_are_commands(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = find_experiment(path.stem)
    assert file.experiment.name == path.stem
    bundled = file.experiment.data == "bundled"
    if not bundled:  # its data are at the hub
        monkeypatch.setattr(ExperimentFile, "test_prompts", lambda _: [TestPrompt(prompt="q")])
    labels = {name: index % 2 for index, name in enumerate(file.experiment.objectives)}
    example = Example(prompt="p", response_0="a", response_1="b", labels=labels)
    plan = Plan(file, tmp_path, examples=None if bundled else [example])
    for step in plan.steps:
        finish(step, policy_set=f"{POLICY}:1")
        write_policy_set(step.folder / "data" / "policies", f"{POLICY}:1", file.experiment.objectives)
        if isinstance(step.stage, Evaluate):
            command = typer.main.get_command(app).commands["evaluate"]  # type: ignore[attr-defined]
            parsed = command.make_context("evaluate", arguments(plan, step, step.stage)).params
            base = ["base"] if any(method == "base" for method in step.stage.methods) else []
            assert [text.partition("=")[0] for text in parsed["method"]] == [*base, *step.uses]
            assert parsed["not_in"] == [str(plan.data_file)]
    assert len(plan.steps) > len(file.experiment.seeds)


@pytest.mark.parametrize("per_epoch", [1, 3, 7, 38, 49])
def test_so_many_epochs_make_so_many_steps(per_epoch: int) -> None:
    for steps in range(1, 150):
        assert math.ceil(epochs_of(steps, per_epoch) * per_epoch) == steps


def test_the_cost_of_a_method_by_hand() -> None:
    """2 objectives, 10 pairs of 2 + 2 · 3 = 8 tokens; a round of 5 prompts at 2 weights, of which 4 give 2 pairs each."""
    sizes = Sizes(
        pairs=10,
        conflicting=5,
        accepted=4,
        weights=2,
        alignment_epochs=3,
        round_epochs=1,
        prompt_tokens=2,
        response_tokens=3,
        review_tokens=1,
    )
    aligned = Tokens(scored=2 * 10 * 8, trained=3 * 2 * 10 * 8)
    made = 5 * 2 * (3 + 1 + 3)
    read = 5 * (2 + (2 + 4) * 3) * (2 + 2 + 1)
    pairs = 2 * 4 * 2 * 8
    assert methods_tokens(sizes) == {
        "sipo": Tokens(generated=made, scored=aligned.scored + read + pairs, trained=aligned.trained + pairs),
        "modpo": Tokens(scored=aligned.scored + 2 * 10 * 8 * 2, trained=aligned.trained + 2 * 10 * 8 * 3),
    }
    costs = hours(Tokens(generated=7200, trained=3600), Rates(generated=2))
    assert (costs.generated, costs.scored, costs.trained) == (1.0, 0.0, None)
    assert (costs.known, costs.whole) == (1.0, False)
