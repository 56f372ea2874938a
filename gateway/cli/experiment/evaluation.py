"""An evaluation step: `sipo evaluate` in a process of its own, on what the steps of a seed left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from gateway.cli.experiment.training import MODELS_FILE
from gateway.cli.experiment.workplace import Made, Workplace, policy_set
from gateway.experiments.definition import Evaluate, Round
from gateway.experiments.plan import Plan, Step
from gateway.experiments.published import DATA, FRONT
from gateway.experiments.result import Tokens
from services.common.local.processes import dies_with_parent
from sipo.errors import SipoError
from sipo.evaluation.folder import REPORT
from sipo.evaluation.report import EvaluationReport

COMMAND = (sys.executable, "-m", "gateway.entry", "evaluate")


def run_evaluation(at: Workplace, step: Step, stage: Evaluate) -> Made:
    """Raises SipoError if the command fails: it has said why."""
    status = subprocess.run(
        [*COMMAND, *arguments(at.plan, step, stage)], env=_environment(at, step), preexec_fn=dies_with_parent(), check=False
    ).returncode
    if status != 0:
        raise SipoError(f"{step.name}: the evaluation ended with status {status}, see above")
    report = EvaluationReport.model_validate_json((step.folder / FRONT / REPORT).read_bytes())
    return Made(Tokens(generated=sum(report.tokens.values())), report.seconds)


def arguments(plan: Plan, step: Step, stage: Evaluate) -> list[str]:
    """Of `sipo evaluate`."""
    experiment, file = plan.experiment, plan.file
    kinds = {method.name: method.kind for method in stage.read_methods()}
    methods = ["base"] if "base" in kinds else []
    methods += [f"{name}={kinds[name]}:{_source(kinds[name], used)}" for name, used in step.uses.items()]
    most, standard = experiment.max_prompts, experiment.standardise_on
    return [
        file.prompts_source(experiment.prompts),
        *_each("--method", methods),
        *_each("--judge", (f"{name}={address}" for name, address in experiment.judges.items())),
        *_each("--also", (f"{name}={address}" for name, address in experiment.also.items())),
        *_each("--weights", experiment.weight_texts()),
        *_each("--unseen", stage.unseen),
        *_each("--against", stage.against),
        *_each("--job", dict.fromkeys(map(str, _jobs(step)))),
        *(["--standardise-on", file.prompts_source(standard)] if standard else []),
        *(["--max-prompts", str(most)] if most else []),
        *(["--kl"] if stage.kl else []),
        *("--max-tokens", str(experiment.max_tokens), "--data", str(plan.data_file)),
        *_each("--not-in", dict.fromkeys(map(str, (plan.data_file, plan.demonstrations_file)))),
        *("--out", str(step.folder / FRONT)),
    ]


def _each(option: str, values: Iterable[str]) -> Iterator[str]:
    for value in values:
        yield from (option, value)


def _source(kind: str, step: Step) -> Path:
    return step.folder / MODELS_FILE if kind == "models" else policy_set(step).folder


def _jobs(step: Step) -> Iterator[Path]:
    for used in step.uses.values():
        if isinstance(used.stage, Round):
            yield from sorted((used.folder / DATA / "jobs").glob("*/" + REPORT))


def _environment(at: Workplace, step: Step) -> dict[str, str]:
    rounds = [used.stage for used in step.uses.values() if isinstance(used.stage, Round)]
    models = {name: address for stage in rounds for name, address in stage.reward_models.items()}
    own = {
        "SIPO_DATA_DIR": str(at.settings.data_dir),
        "SIPO_CACHE_DIR": str(at.settings.cache_dir),
        "SIPO_MODEL": at.plan.experiment.base,
        "SIPO_REWARD_MODELS": json.dumps(models),
    }
    return {**os.environ, **own}
