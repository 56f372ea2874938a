"""An experiment in print: what is done and how long it took, how long the rest will take, and what it costs at full size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from gateway.cli.console import console
from gateway.experiments.cost import Cost, Hours, hours, methods_tokens, seconds_left
from gateway.experiments.plan import Plan, Step
from gateway.experiments.published import read_seeds, results_folder
from gateway.experiments.result import RESULT, Result, Tokens, read_result
from sipo.words import counted, share


def show_plan(plan: Plan) -> None:
    table = Table("stage", "kind", "seed", "builds on", "done", "seconds", "tokens", "folder", box=None, header_style="bold")
    for step in plan.steps:
        result = step.result()
        seed = "" if step.seed is None else str(step.seed)
        on = ", ".join(dict.fromkeys(used.stage.name for used in step.uses.values()))
        figures = ("no", "", "") if result is None else ("yes", f"{result.seconds:.0f}", _tokens(result.tokens))
        table.add_row(step.stage.name, step.stage.kind, seed, on, *figures, str(step.folder.relative_to(plan.root)))
    console.print(table)
    console.print(f"\nfolder: {plan.root}\n{time_left(plan, plan.steps)}", markup=False)


def time_left(plan: Plan, steps: Sequence[Step]) -> str:
    """For those of the steps that are not finished, in words, by what the same stages took so far."""
    missing = [step.stage.name for step in steps if step.result() is None]
    if not missing:
        return f"all of {counted(len(steps), 'step')} are done"
    by_key = {result.key: result for result in _results(plan)}  # what is made once for all is among the results of every seed
    measured = {name: [result for result in by_key.values() if result.stage == name] for name in missing}
    left, unknown = seconds_left(missing, measured)
    if set(unknown) == set(missing):
        return f"{counted(len(missing), 'step')} left; how long they take is known when the first of each stage is done"
    known = f"about {left / 3600:.1f} h for {share(sum(name not in unknown for name in missing), len(missing), 'step')} left"
    return f"{known}; not measured yet: {', '.join(unknown)}" if unknown else known


def _results(plan: Plan) -> Iterable[Result]:
    """Of all stages, in any seed and with any settings: those that were published, by other machines as well, and those here."""
    for seed in read_seeds(results_folder(plan)):
        yield from seed.steps
    for path in plan.root.glob(f"*/*/{RESULT}"):
        if (result := read_result(path.parent)) is not None:
            yield result


def show_cost(cost: Cost) -> None:
    console.print("at full size, in hours of one GPU at the rates of the file:")
    table = Table("method", "generating", "scoring", "training", "together", "in the paper", box=None, header_style="bold")
    for name, tokens in methods_tokens(cost.sizes).items():
        of_one = hours(tokens, cost.rates)
        parts = [_hours(getattr(of_one, part), getattr(tokens, part)) for part in Tokens.model_fields]
        paper = cost.paper_gpu_hours.get(name)
        table.add_row(name, *parts, _together(of_one), "" if paper is None else f"{paper:g}")
    console.print(table)
    console.print()


def _together(of_one: Hours) -> str:
    return f"{of_one.known:.1f}" if of_one.whole else f"{of_one.known:.1f} and what has no rate"


def _hours(known: float | None, tokens: int) -> str:
    return f"{tokens / 1e6:.1f} M tokens, no rate" if known is None else f"{known:.1f}"


def _tokens(tokens: Tokens) -> str:
    return ", ".join(f"{count} {name}" for name, count in tokens.model_dump().items() if count)
