"""`sipo score`: implicit rewards (Eq. 6) of the responses in a file, computed on this machine without any service.

Rows are written in order as they are done; one that cannot be scored gets an `error` and does not stop the others.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gateway.cli.console import complaints
from gateway.cli.data import SOURCES, SOURCES_HELP, read_sources
from gateway.cli.progress import LINE_SECONDS
from gateway.cli.score.files import ScoredRow, check_out, scored_before
from gateway.shipped import SHIPPED, get_set
from services.common.settings import CommonSettings, load
from sipo.datasets import Answers
from sipo.errors import InvalidRequest
from sipo.models import BUNDLED_MODEL, Base
from sipo.policies import PolicySet, PolicyStore
from sipo.preferences import Weights, format_weights, normalize_weights, parse_weights, sampling_weights
from sipo.words import counted, share

if TYPE_CHECKING:
    from sipo.rewards import Group, RewardModel, Rewards

SHOWN_ERRORS = 5


def score(
    data: Annotated[
        list[str],
        typer.Argument(metavar=SOURCES, help=f"Rows with a `prompt` and a list of `responses`; or any other data: {SOURCES_HELP}"),
    ],
    *,
    policy_set: Annotated[str | None, typer.Option(help="NAME or NAME:VERSION. Default: the only policy.")] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="A soup's weights, such as concise=0.5,warm=0.5; once a soup. Default: the paper's W.")
    ] = None,
    no_soups: Annotated[bool, typer.Option("--no-soups", help="Only the policies' own rewards.")] = False,
    length_normalized: Annotated[bool, typer.Option("--length-normalized", help="Rewards per token, not summed.")] = False,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="A new file for the rewards. Default: stdout.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on behind the rows that an interrupted run left in --out.")] = False,
) -> None:
    """Score responses with the implicit rewards of a policy set and its soups: beta (log pi(y|x) - log pi_ref(y|x)).

    Prints a JSON line per row. For labelled pairs, ends with how often each policy's reward prefers the labelled response.

    Examples:

      sipo score answers.jsonl --policy-set demo:1 --out rewards.jsonl

      sipo score pairs.jsonl --no-soups > rewards.jsonl
    """
    if no_soups and weights:
        raise InvalidRequest("--weights are those of soups: leave out either them or --no-soups")
    check_out(out, resume)
    rows = read_sources(data, held_out=True).answers()  # nothing is trained: every split may be scored
    settings = load(CommonSettings)
    store = settings.policies
    chosen = get_set(settings, policy_set or _only_name(settings))
    objectives = chosen.objectives
    wanted = [normalize_weights(parse_weights(text, param="weights"), objectives, param="weights") for text in weights or []]
    soups = [] if no_soups else wanted or sampling_weights(objectives)

    names = {*objectives, *map(format_weights, soups)}
    scored = scored_before(out, rows, chosen.id, length_normalized, names) if out and out.exists() else []
    scorer = _Scorer.open(settings, store, chosen, soups, length_normalized)
    try:
        with out.open("a", encoding="utf-8") if out else nullcontext() as file, _progress(len(rows), len(scored)) as advance:
            for batch in scorer.batches(rows[len(scored) :]):
                for row in batch:
                    print(row.model_dump_json(exclude_none=True), file=file, flush=True)
                    scored.append(row)
                advance(len(batch))
    except KeyboardInterrupt:
        if out:
            complaints.print(f"{out} has {share(len(scored), len(rows), 'row')}: go on with --resume", markup=False)
        raise
    _summarise(scored, objectives)
    if scored and all(row.error is not None for row in scored):
        raise typer.Exit(1)


def _only_name(settings: CommonSettings) -> str:
    names = settings.policies.names()
    if not names and settings.model == BUNDLED_MODEL:
        return SHIPPED
    if len(names) != 1:
        known = f"there are {', '.join(names)}" if names else f"there are none in {settings.policies.root} yet"
        raise InvalidRequest(f"name a policy set with --policy-set: {known}")
    return names[0]


@dataclass(frozen=True)
class _Scorer:
    """The models and the options of one run."""

    model: RewardModel
    tokenizer: Any
    policy_set: PolicySet
    soups: Sequence[Weights]
    length_normalized: bool

    @classmethod
    def open(
        cls, settings: CommonSettings, store: PolicyStore, policy_set: PolicySet, soups: Sequence[Weights], length_normalized: bool
    ) -> _Scorer:
        """Loads the base and the policies, which takes seconds. Raises IncompatiblePolicy if they do not fit together."""
        base = Base.open(settings.model, settings.cache_dir)
        policy_set.check_base(base.ref.sha256)

        from transformers.utils.logging import disable_progress_bar

        from sipo.rewards import RewardModel

        disable_progress_bar()
        policy_set.manifest.prompt_format.check(base.tokenizer)
        model = RewardModel.load(base.folder, store, base_sha256=base.ref.sha256, device="auto")
        model.score(policy_set.id, [])  # what is wrong with the policies shows before anything is written
        return cls(model, base.tokenizer, policy_set, soups, length_normalized)

    def batches(self, rows: Sequence[Answers]) -> Iterator[list[ScoredRow]]:
        """In order, as many rows at a time as the model takes in one pass."""
        longest = self.model.token_budget // (1 + len(self.policy_set.objectives) + len(self.soups))
        batch: list[tuple[Answers, Group | str]] = []
        tokens = 0
        for row in rows:
            group = self._group(row)
            size = 0 if isinstance(group, str) else group.tokens
            if batch and tokens + size > longest:
                yield self._score(batch)
                batch, tokens = [], 0
            batch.append((row, group))
            tokens += size
        yield self._score(batch)

    def _group(self, row: Answers) -> Group | str:
        """The row in tokens, or why it cannot be scored."""
        from sipo.rewards import Group

        prompt_format = self.policy_set.manifest.prompt_format
        try:
            ids = [prompt_format.exact_response_ids(text, self.tokenizer) for text in row.responses]
            group = Group(prompt_format.prompt_ids(row.prompt, self.tokenizer), ids)
            self.model.check(group)
        except InvalidRequest as error:
            return error.message
        return group

    def _score(self, batch: Sequence[tuple[Answers, Group | str]]) -> list[ScoredRow]:
        groups = [group for _, group in batch if not isinstance(group, str)]
        found = iter(self.model.score(self.policy_set.id, groups, self.soups))
        return [self._scored(row, group, [] if isinstance(group, str) else next(found)) for row, group in batch]

    def _scored(self, row: Answers, group: Group | str, rewards: list[Rewards]) -> ScoredRow:
        from sipo.rewards import per_token

        scored = ScoredRow(
            policy_set=self.policy_set.id, length_normalized=self.length_normalized, prompt=row.prompt, labels=row.labels
        )
        if isinstance(group, str):
            return scored.model_copy(update={"error": group})
        if not all(math.isfinite(value) for one in rewards for value in one.values()):
            return scored.model_copy(update={"error": "rewards that are not finite: the adapters, or the base, are damaged"})
        if self.length_normalized:
            rewards = [per_token(one, ids) for one, ids in zip(rewards, group.responses, strict=True)]
        return scored.model_copy(update={"rewards": rewards})


@contextmanager
def _progress(rows: int, before: int) -> Iterator[Callable[[int], None]]:
    """Tells rows done and time left on stderr: live on a terminal, elsewhere in lines."""
    live = Progress(
        TextColumn("rows scored"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=complaints,
        speed_estimate_period=120,
        disable=not complaints.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # otherwise rows for a file would go where the bar is
    )
    with live:
        live.add_task("", total=rows, completed=before)
        [task] = live.tasks
        began = said = time.monotonic()

        def advance(done: int) -> None:
            nonlocal said
            live.advance(task.id, done)
            now = time.monotonic()
            if not complaints.is_terminal and now - said >= LINE_SECONDS:
                left = "" if task.time_remaining is None else f", {task.time_remaining:.0f} s left"
                complaints.print(f"{now - began:6.0f} s  {share(int(task.completed), rows, 'row')}{left}")
                said = now

        yield advance


def _summarise(scored: Sequence[ScoredRow], objectives: Sequence[str]) -> None:
    failed = [(number, row.error) for number, row in enumerate(scored, start=1) if row.error is not None]
    complaints.print(f"{counted(len(scored) - len(failed), 'row')} scored, {len(failed)} could not be")
    for number, error in failed[:SHOWN_ERRORS]:
        complaints.print(f"row {number}: {error}", markup=False)
    if len(failed) > SHOWN_ERRORS:
        complaints.print(f"and {len(failed) - SHOWN_ERRORS} more: rows with `error` in the output")
    table = Table("objective", "labelled rows", "its policy agrees", "accuracy", box=None, header_style="bold")
    for objective in objectives:
        if agrees := list(_agreements(scored, objective)):
            table.add_row(objective, str(len(agrees)), str(sum(agrees)), f"{sum(agrees) / len(agrees):.3f}")
    if table.row_count:
        complaints.print(table)


def _agreements(scored: Sequence[ScoredRow], objective: str) -> Iterator[bool]:
    """For each row with that label: does the objective's own policy give the labelled response the higher reward?"""
    for row in scored:
        if row.rewards and row.labels and objective in row.labels:
            label = row.labels[objective]
            yield row.rewards[label][objective] > row.rewards[1 - label][objective]
