"""Experiments as files: what is refused, what a plan's keys depend on, and what the shipped ones come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from gateway.cli import app
from gateway.cli.experiment.evaluation import arguments
from gateway.cli.experiment.show import time_left
from gateway.cli.experiment.summary import show_summary
from gateway.cli.experiment.training import epochs_of
from gateway.experiments.cost import Rates, Sizes, hours, methods_tokens
from gateway.experiments.definition import BUNDLED_DATA, POLICY, SHIPPED, Evaluate, ExperimentFile, find_experiment, read_experiment
from gateway.experiments.plan import Plan, Step
from gateway.experiments.published import publish_seed, read_seeds, results_folder
from gateway.experiments.result import Result, Tokens, write_result
from gateway.experiments.summary import Summary, over_seeds, write_summary
from sipo.errors import InvalidRequest, NotFound
from sipo.evaluation.prompts import TestPrompt
from sipo.evaluation.report import Comparison, EvaluationReport, Interval, MethodResult, Sample, Verdict
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
    tmp_path.mkdir(exist_ok=True)
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
    return Plan(read_experiment(write(tmp_path, content)), tmp_path / "experiments")


def keys(plan: Plan) -> dict[tuple[str, int | None], str]:
    return {(step.stage.name, step.seed): step.key for step in plan.steps}


def finish(step: Step, seconds: float = 1, policy_set: str | None = None, report: EvaluationReport | None = None) -> None:
    """`report`: what it leaves if it is an evaluation."""
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
    if step.stage.kind == "evaluate" and report is not None:
        front = step.folder / "front"
        front.mkdir()
        (front / "report.json").write_text(report.model_dump_json())
        for picture in ("front.png", "front.svg"):
            (front / picture).write_bytes(b"picture")
    write_result(step.folder, result)


def report_of(difference: float = 0.5, uncorrected: float = 0.001, samples: Sequence[str] = ("q",)) -> EvaluationReport:
    """Of sipo against mod, whose hypervolume is 1, with intervals of ±0.1 and samples for these prompts."""

    def method(name: str, hypervolume: float) -> MethodResult:
        measured = {"points": [], "front": [], "hypervolume": around(hypervolume), "igd_plus": around(0), "inner_product": None}
        return MethodResult.model_validate({"name": name, "kind": "mod", "source": name, "spread": {}, **measured})

    compared = Comparison(method="sipo", against="mod", difference=around(difference), p_value=1, uncorrected=uncorrected)
    return EvaluationReport(
        name="front",
        made=datetime(2026, 1, 1, tzinfo=UTC),
        base="tiny",
        prompts=2,
        prompts_sha256="0" * 64,
        objectives=["concise", "warm"],
        judges={"concise": "python:concise", "warm": "python:warm"},
        reference_point={"concise": 0, "warm": 0},
        max_tokens=8,
        methods=[method("mod", 1), method("sipo", 1 + difference)],
        comparisons=[compared],
        samples=[Sample(prompt=prompt, answers=[]) for prompt in samples],
        seconds={},
        tokens={},
    )


def around(value: float) -> Interval:
    return Interval(value=value, low=value - 0.1, high=value + 0.1)


def verdict_of(*reports: EvaluationReport) -> str:
    (found,) = over_seeds(dict(enumerate(reports)), range(len(reports))).verdicts
    return found.verdict


def publish(plan: Plan, home: Path, seed: int) -> None:
    """As a run of the seed does where the experiment's file lies in `home`."""
    plan.file = plan.file.model_copy(update={"path": home / plan.file.path.name})
    for step in plan.steps_of([seed]):
        finish(step, report=report_of())
    publish_seed(plan, seed)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (small(seads=[1]), "`seads` is no known field: did you mean `seeds`?"),
        (small(seeds=[1, 1]), "a seed is given twice"),
        (small(seeds=list(range(13))), "`seeds`"),
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
        (small(more=stage("evaluate", methods=["a=mod:align", "a=soup:align"])), "two methods are called 'a'"),
        (small(more=stage("evaluate", methods=["mod@1=mod:align"])), "the method 'mod@1' ends with a seed: leave it out"),
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


def test_every_seed_has_its_steps_and_its_evaluation(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    steps, names = plan.steps, ("align", "round", "more", "front")
    assert [(step.stage.name, step.seed) for step in steps] == [("sft", None), *((name, seed) for seed in (0, 1) for name in names)]
    assert {name: (step.stage.name, step.seed) for name, step in steps[-1].uses.items()} == {
        "reference": ("align", 1),
        "mod": ("align", 1),
        "sipo": ("round", 1),
        "more": ("more", 1),
    }
    assert steps[1].folder.parent.name == "seed-0"
    assert steps[1].folder.name == f"align-{steps[1].key[:12]}"
    assert steps[0].folder.parent.name == "all-seeds"
    assert [(step.stage.name, step.seed) for step in plan.steps_of([1])] == [("sft", None), *((name, 1) for name in names)]


def test_seeds_are_chosen_among_those_of_the_experiment(tmp_path: Path) -> None:
    experiment = planned(tmp_path, small(seeds=[4, 2, 3])).experiment
    assert experiment.chosen_seeds([2, 4, 2]) == [4, 2]
    assert experiment.chosen_seeds(None) == experiment.chosen_seeds([]) == [4, 2, 3]
    with pytest.raises(InvalidRequest, match="tiny has no seed 1: its seeds are 4, 2, 3"):
        experiment.chosen_seeds([2, 1])


def test_the_key_of_an_experiment_is_of_all_but_its_seeds_and_its_words(tmp_path: Path) -> None:
    key = planned(tmp_path).key
    assert planned(tmp_path, small(seeds=[7], description="other words")).key == key
    others = [small(0, {"seed": None}), small(2, {"job": {"max_tokens": 9}}), small(4, {"against": []}), small(max_prompts=5)]
    assert len({key, *(planned(tmp_path, other).key for other in others)}) == 5


def test_a_change_makes_new_what_builds_on_it_and_nothing_else(tmp_path: Path) -> None:
    before = keys(planned(tmp_path))
    other = keys(planned(tmp_path, small(2, {"job": {"max_tokens": 9}})))
    changed = {name for (name, seed), key in before.items() if other[name, seed] != key}
    assert changed == {"round", "more", "front"}
    assert len(set(before.values())) == len(before), "seeds and stages have keys of their own"


def test_one_more_seed_leaves_what_the_others_made(tmp_path: Path) -> None:
    before, after = keys(planned(tmp_path)), keys(planned(tmp_path, small(seeds=[1, 5, 0])))
    assert {name: key for name, key in after.items() if name in before} == before


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


def test_fine_tunings_learn_the_demonstrations_and_all_else_the_data(tmp_path: Path) -> None:
    """What is made from which shows in the keys."""

    def row(prompt: str) -> str:
        labels = {"concise": 0, "warm": 1}
        return Example(prompt=prompt, response_0="a", response_1="b", labels=labels).model_dump_json() + "\n"  # type: ignore[arg-type]

    home = write(tmp_path, {}).parent
    for name in ("pairs", "demonstrations", "prompts"):
        (home / f"{name}.jsonl").write_text(row(name))
    sources = {"data": "pairs.jsonl", "prompts": "prompts.jsonl"}
    alone, plan = planned(tmp_path, small(**sources)), planned(tmp_path, small(**sources, demonstrations="demonstrations.jsonl"))
    assert alone.demonstrations == alone.examples
    assert alone.demonstrations_file == alone.data_file
    assert [example.prompt for example in plan.demonstrations] == ["demonstrations"]
    assert [example.prompt for example in plan.examples] == ["pairs"]
    changed = {name for name, key in keys(plan).items() if key != keys(alone)[name]}
    assert changed == set(keys(plan)), "all builds on the fine-tuning"
    unfounded = small(1, {"reference": None}, **sources)
    before, after = (keys(planned(tmp_path, one)) for one in (unfounded, unfounded | {"demonstrations": "demonstrations.jsonl"}))
    assert {name for name, key in before.items() if after[name] != key} == {("sft", None)}
    plan.write_data()
    assert plan.demonstrations_file.read_text() == row("demonstrations")
    assert plan.data_file.read_text() == row("pairs")
    with pytest.raises(InvalidRequest, match=r"1 of 1 test prompt is in the training data demonstrations\.jsonl"):
        planned(tmp_path, small(data="pairs.jsonl", prompts="demonstrations.jsonl", demonstrations="demonstrations.jsonl"))


def test_the_time_left_is_that_of_the_same_stage_in_other_seeds(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert time_left(plan, plan.steps).startswith("9 steps left; how long they take")
    for step in plan.steps[:3]:
        finish(step, 3600)
    assert time_left(plan, plan.steps) == "about 2.0 h for 2 of 6 steps left; not measured yet: more, front"
    assert time_left(plan, plan.steps_of([0])) == "2 steps left; how long they take is known when the first of each stage is done"
    publish_seed(plan, 0)
    elsewhere = Plan(plan.file, tmp_path / "another machine")
    finish(elsewhere.steps[0], 3600)
    assert time_left(elsewhere, elsewhere.steps_of([1])) == "about 2.0 h for 2 of 4 steps left; not measured yet: more, front"
    for step in plan.steps[3:]:
        finish(step, report=report_of())
    assert time_left(plan, plan.steps) == "all of 9 steps are done"


def test_seeds_that_ran_in_several_sittings_are_summed_up(tmp_path: Path) -> None:
    content = small(seeds=[0, 1, 2])
    publish(planned(tmp_path / "first", content), tmp_path, 0)
    plan = planned(tmp_path, content)
    summary = write_summary(plan)
    front = summary.evaluations["front"]
    assert (front.seeds, front.missing, summary.left_out) == ([0], [1, 2], [])
    publish(planned(tmp_path / "second", content), tmp_path, 2)
    publish(planned(tmp_path / "third", small(seeds=[1], max_prompts=5)), tmp_path, 1)
    summary = write_summary(plan)
    front = summary.evaluations["front"]
    assert (front.seeds, front.missing, summary.left_out) == ([0, 2], [1], [1]), "seed 1 is of another key"
    assert [(one.method, one.seed, one.hypervolume.value) for one in front.hypervolumes] == [
        ("mod", 0, 1.0),
        ("sipo", 0, 1.5),
        ("mod", 2, 1.0),
        ("sipo", 2, 1.5),
    ]
    assert Summary.model_validate_json((tmp_path / "results" / "tiny" / "summary.json").read_bytes()) == summary
    publish(planned(tmp_path / "fourth", content), tmp_path, 1)
    assert (whole := write_summary(plan)).evaluations["front"].missing == whole.left_out == []


def test_finished_results_of_a_seed_are_replaced_by_finished_ones_alone(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    publish(plan, tmp_path, 0)
    again = Plan(plan.file, tmp_path / "another machine")
    for step in again.steps_of([0])[:-1]:
        finish(step, seconds=5)
    publish_seed(again, 0)
    results = results_folder(plan)
    assert [step.seconds for step in read_seeds(results)[0].steps] == [1] * 5
    finish(again.steps_of([0])[-1], seconds=5, report=report_of())
    publish_seed(again, 0)
    assert [step.seconds for step in read_seeds(results)[0].steps] == [5] * 5
    report = EvaluationReport.model_validate_json((results / "seed-0" / "front" / "report.json").read_bytes())
    assert report == report_of(samples=[]), "without what was answered"
    assert {path.name for path in (results / "seed-0" / "front").iterdir()} == {"report.json", "front.png", "front.svg"}


def test_a_method_wins_where_it_does_in_every_seed_after_a_correction_over_all() -> None:
    """Three seeds of one comparison: the p values count three times, twice and once (Holm)."""
    front = over_seeds({0: report_of(0.5, 0.01), 1: report_of(0.4, 0.001), 2: report_of(0.6, 0.02)}, [0, 1, 2])
    assert [(one.method, one.against, one.uncorrected) for one in front.comparisons] == [
        ("sipo@0", "mod@0", 0.01),
        ("sipo@1", "mod@1", 0.001),
        ("sipo@2", "mod@2", 0.02),
    ]
    assert [one.p_value for one in front.comparisons] == pytest.approx([0.02, 0.003, 0.02])
    assert front.verdicts == [Verdict(method="sipo", against="mod", seeds=["0", "1", "2"], verdict="wins")]
    assert verdict_of(report_of(-0.5, 0.01), report_of(-0.4, 0.01)) == "loses"
    assert verdict_of(report_of(0.5, 0.01), report_of(-0.4, 0.01)) == "not decided", "seeds disagree"
    assert verdict_of(report_of(0.5, 0.01), report_of(0.05, 0.01)) == "not decided", "an interval holds 0"
    assert verdict_of(report_of(0.5, 0.03), report_of(0.5, 0.03)) == "not decided", "each alone would be certain"


def test_a_summary_is_printed_with_what_it_is_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = small(seeds=[0, 1, 2])
    publish(planned(tmp_path / "first", content), tmp_path, 0)
    publish(planned(tmp_path / "second", small(seeds=[1], max_prompts=5)), tmp_path, 1)
    show_summary(write_summary(planned(tmp_path, content)))
    printed = " ".join(capsys.readouterr().out.split())
    assert "left out, as their results are of another definition, data or preset: seed 1;" in printed
    assert "sipo@0 mod@0 +0.500 (+0.400 to +0.600) 0.0010 0.0010" in printed
    assert "sipo against mod (seed 0): wins, incomplete" in printed
    assert "front is incomplete: there is no report of seeds 1, 2" in printed


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_experiment_is_planned_and_its_evaluations_are_commands(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = find_experiment(path.stem)
    assert file.experiment.name == path.stem
    bundled = file.experiment.data in BUNDLED_DATA
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
            assert parsed["not_in"] == list(dict.fromkeys(map(str, (plan.data_file, plan.demonstrations_file))))
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
