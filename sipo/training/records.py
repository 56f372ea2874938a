"""What stays of a run beside its adapter, for people: each step's figures, the loss curve as a picture, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sipo.preferences import format_weights
from sipo.training.presets import NOT_OF_SFT
from sipo.training.run_folder import CARD, CURVE, HISTORY, RunFolder, data_sha256
from sipo.training.settings import ANSWER_TOKENS, Answered, Method, SftMetrics, SftRun, TrainMetrics, TrainRun
from sipo.words import counted

METHODS: Mapping[Method, str] = {"dpo": "DPO (Eq. 2)", "sipo": "SIPO (Eq. 8)", "lw": "DPO LW", "modpo": "MODPO"}


def write_records(folder: RunFolder, run: TrainRun, metrics: TrainMetrics, history: Sequence[Mapping[str, Any]]) -> None:
    """history.jsonl in the run's folder, loss.png and README.md beside its adapter. `history`: the trainer's log, a mapping a step
    or a validation."""
    write_history(folder.path / HISTORY, history)
    draw_curve(folder.adapter / CURVE, run.objective, history)
    (folder.adapter / CARD).write_text(card(run, metrics, data_sha256([folder])))


def write_history(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history))


def draw_curve(path: Path, title: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Loss and reward accuracy over steps, in training and on the validation pairs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for axes, training, validation, name in (
        (upper, "loss", "eval_loss", "loss"),
        (lower, "rewards/accuracies", "eval_rewards/accuracies", "reward accuracy"),
    ):
        steps = [(entry["step"], entry[training]) for entry in history if training in entry]
        checks = [(entry["step"], entry[validation]) for entry in history if validation in entry]
        axes.plot(*zip(*steps, strict=True), color="tab:blue", linewidth=1, label="training, per step")
        if checks:
            axes.plot(*zip(*checks, strict=True), color="tab:orange", marker="o", label="validation")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    lower.set_ylim(-0.05, 1.05)
    lower.set_xlabel("step")
    lower.xaxis.get_major_locator().set_params(integer=True)
    upper.legend(frameon=False)
    upper.set_title(title)
    figure.savefig(path, dpi=120)


def card(run: TrainRun, metrics: TrainMetrics, pairs_sha256: str) -> str:
    """A Hugging Face model card: what the adapter is, what it was trained on and how, and how it went."""
    method = METHODS[run.method] + (f" at {format_weights(run.weights)}" if run.weights else "")
    begin = "a fresh LoRA" if run.start is None else "the policy of the round before, itself frozen as reference"
    model = run.base_name + (f" with the adapter of SHA-256 `{run.reference_sha256}` beneath" if run.reference_sha256 else "")
    kept = counted(metrics.pairs, "pair") + (
        f", {metrics.validation_pairs} more held out for validation" if metrics.held_out else ""
    )
    left_out = f"{metrics.prompts_too_long} with prompts too long, {metrics.identical} with two equal responses"
    rows = "\n".join(
        f"| {name} | {getattr(metrics.before, name):.4f} | {getattr(metrics.after, name):.4f} |"
        for name in ("loss", "margin", "accuracy")
    )
    settings = yaml.safe_dump(run.settings.model_dump(mode="json"), sort_keys=False)
    validation = "validation pairs" if metrics.held_out else "training pairs (too few to hold some out)"
    return f"""{_metadata(run.base_name, "dpo")}# Policy for {run.objective!r}

A LoRA adapter on {model}, trained by {method} from {begin}.

- Data: {kept}; left out: {left_out}; {counted(metrics.responses_cut, "response")} cut. SHA-256 of the pairs: `{pairs_sha256}`.
- {_answers(metrics.answered)}
- Steps: {metrics.steps}, kept: step {metrics.best_step}; {metrics.dtype}; {metrics.seconds:.0f} s.

| on the {validation} | before | after |
|---|---|---|
{rows}

![loss]({CURVE})

```yaml
{settings}```
"""


def sft_card(run: SftRun, metrics: SftMetrics, answers_sha256: str) -> str:
    """As `card`, of supervised fine-tuning."""
    kept = counted(metrics.rows, "response") + (
        f", {metrics.validation_rows} more held out for validation" if metrics.validation_rows else ""
    )
    left_out, cut = counted(metrics.prompts_too_long, "too long prompt"), counted(metrics.responses_cut, "response")
    settings = yaml.safe_dump(run.settings.model_dump(mode="json", exclude=set(NOT_OF_SFT)), sort_keys=False)
    validation = "held-out responses" if metrics.validation_rows else "training responses (too few to hold some out)"
    return f"""{_metadata(run.base_name, "sft")}# Reference for policies

A LoRA adapter on {run.base_name}, trained by supervised fine-tuning. Policies that are aligned on top of it need it beneath them.

- Data: {kept}; left out: {left_out}; {cut} cut. SHA-256 of the data: `{answers_sha256}`.
- {_answers(metrics.answered)}
- Steps: {metrics.steps}, kept: step {metrics.best_step}; {metrics.dtype}; {metrics.seconds:.0f} s.

| on the {validation} | before | after |
|---|---|---|
| loss | {metrics.loss_before:.4f} | {metrics.loss_after:.4f} |

![loss]({CURVE})

```yaml
{settings}```
"""


def _metadata(base_name: str, method: str) -> str:
    content = {"base_model": base_name, "library_name": "peft", "tags": ["lora", method, "multi-objective"]}
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n"


def _answers(after: Answered | None) -> str:
    if after is None:
        return "What it answers was not looked at."
    return (
        f"Greedy answers to {counted(after.prompts, 'prompt')}, at most {ANSWER_TOKENS} tokens: {after.tokens:.1f} on average, "
        f"{after.empty} empty, {after.endless} not ended, {after.distinct} different."
    )
