"""What came of a job, round by round, in print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.table import Table

from gateway.cli.client import Gateway
from gateway.cli.console import console
from services.common.contract.job_files import JobFiles
from services.common.contract.reports import CandidatesAccount, Report, RoundReport
from sipo.conversation import Prompt, as_messages, as_text
from sipo.evaluation.task import TaskFolder
from sipo.preferences import Weights, format_weights
from sipo.training.settings import TrainMetrics
from sipo.words import counted, share


def show_report(report: Report) -> None:
    _show_training("first alignment", report.alignment)
    for one in report.rounds:
        _show_round(one, title=f"round {one.round}: " if len(report.rounds) > 1 else "")
    if report.reason:
        console.print(report.reason, markup=False)
    if report.activated:
        console.print(f"policy set {report.policy_set} activated")


def _show_round(report: RoundReport, title: str) -> None:
    funnel = report.funnel
    console.print(f"\n{title}candidates made: {funnel.candidates} for {counted(funnel.prompts, 'prompt')} ({funnel.failed} failed)")
    for rule, count in funnel.rejected.items():
        console.print(f"  rejected as {rule.replace('_', ' ')}: {count}")
    console.print(f"accepted: {share(funnel.accepted, funnel.prompts, 'prompt')}, which make {counted(funnel.pairs, 'pair')}")
    if report.ground_truth:
        table = Table("ground truth of accepted prompts", "response_0", "response_1", "new answer", box=None, header_style="bold")
        for objective, means in report.ground_truth.items():
            table.add_row(objective, *(f"{mean:.3f}" for mean in (means.response_0, means.response_1, means.accepted)))
        console.print(table)
    if report.candidates and report.candidates.stages:
        _show_candidates(report.candidates, funnel.prompts)
    _show_training("training on the pairs", report.training)
    if report.policy_set:
        console.print(f"policy set {report.policy_set} published, made from {report.sampling_set}")


def _show_candidates(account: CandidatesAccount, prompts: int) -> None:
    """What they were worth by the ground truth; for objectives without one, how many were truncated."""
    known = list(account.implicit_order)
    judged = account.accepted.truly_better is not None
    columns = ["number", "truncated", *(["truly better"] if judged else []), *(f"mean {objective}" for objective in known)]
    table = Table("candidates by stage", *columns, box=None, header_style="bold")
    for stage, made in account.stages.items():
        figures = [f"{made.truncated / made.candidates:.1%}"]
        if made.truly_better is not None:
            figures.append(f"{made.truly_better / made.candidates:.1%}")
        table.add_row(stage, str(made.candidates), *figures, *(f"{made.ground_truth[objective]:.3f}" for objective in known))
    console.print(table)
    if account.accepted.truly_better is not None and account.accepted.responses:
        better = share(account.accepted.truly_better, account.accepted.responses, "accepted response")
        console.print(f"truly better: {better}{_gain(account.accepted.gain)}")
    if account.best_available is not None:
        best = share(account.best_available.prompts, prompts, "prompt")
        console.print(f"best available: {best} had a truly better response that is whole{_gain(account.best_available.gain)}")
    for objective, order in account.implicit_order.items():
        if order.comparisons:
            of = share(order.right, order.comparisons, "comparison")
            console.print(f"implicit reward for {objective}: right in {of} with originals ({order.right / order.comparisons:.0%})")


def show_fronts(report: Report, files: JobFiles) -> None:
    """The fronts before and after each round, where the job measured them."""
    for one in report.rounds:
        if (found := one.evaluation) is None:
            continue
        if found.difference is None or found.p_value is None:
            console.print(f"the fronts were not measured: {found.error}", markup=False)
            continue
        console.print(
            f"\nfronts: {one.sampling_set} and {one.policy_set} on {counted(found.prompts, 'prompt')} that nothing was trained on:"
        )
        for name, hypervolume in found.hypervolume.items():
            console.print(f"  hypervolume {name}: {hypervolume.text()}")
        console.print(f"  difference: {found.difference.text('+')}, p {found.p_value:.4f}")
        console.print(f"  picture: {TaskFolder(files.evaluation(one.round)).front / 'front.png'}", markup=False, soft_wrap=True)
        console.print(f"  page:    {files.page}", markup=False, soft_wrap=True)


def _gain(gain: Mapping[str, float]) -> str:
    means = ", ".join(f"{objective} {mean:+.3f}" for objective, mean in gain.items())
    return f"; on average against the better original: {means}" if gain else ""


def _show_training(title: str, metrics: Mapping[str, TrainMetrics]) -> None:
    """Loss, and accuracy of implicit rewards, on the validation pairs: where none were held out, on what was trained."""
    if not metrics:
        return
    columns = ("pairs", "steps", "loss before", "after", "accuracy before", "after", "seconds")
    table = Table(title, *columns, box=None, header_style="bold")
    for objective, run in metrics.items():
        figures = (run.before.loss, run.after.loss, run.before.accuracy, run.after.accuracy)
        table.add_row(objective, str(run.pairs), str(run.steps), *(f"{figure:.3f}" for figure in figures), f"{run.seconds:.0f}")
        if run.prompts_too_long or run.identical or run.responses_cut:
            console.print(
                f"{objective}: left out {counted(run.prompts_too_long, 'pair')} with long prompts and {run.identical} identical, "
                f"cut {counted(run.responses_cut, 'response')}"
            )
    console.print(table)
    if trained := [objective for objective, run in metrics.items() if not run.held_out]:
        console.print(
            f"{', '.join(trained)}: too few pairs to hold some out, so loss and accuracy are those of the very pairs that were "
            "trained on, which is no evidence"
        )


def show_answers(gateway: Gateway, policy_set: str, objectives: Sequence[str], prompt: Prompt) -> None:
    """The same question at three preference weights of the first two objectives, asked at once: the decoder answers them in one
    batch."""
    console.print(f"\n{policy_set} at three preference weights, asked: {as_text(prompt)}", markup=False)
    first, second = objectives[:2]
    asked = [dict.fromkeys(objectives, 0.0) | {first: weight, second: 1 - weight} for weight in (0.75, 0.5, 0.25)]

    def answer(weights: Weights) -> str:
        body = {
            "model": policy_set,
            "preference_weights": weights,
            "messages": as_messages(prompt),
            "temperature": 0,
            "max_tokens": 128,
        }
        text: str = gateway.post("/v1/chat/completions", json=body)["choices"][0]["message"]["content"]
        return text.strip()

    with ThreadPoolExecutor() as pool:
        for weights, text in zip(asked, pool.map(answer, asked), strict=True):
            console.print(f"[bold]{format_weights(weights)}[/bold]: ", end="")
            console.print(text, markup=False)
