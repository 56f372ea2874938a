"""A reward model of one objective, from its pairs: the base as a sequence classifier with one output, a whole model in float32.

It judges policies (`hf:FOLDER`, see sipo.evaluation.reward_models), so its pairs should be none that they were trained on: they lie
in its folder. Trained as a LoRA and a head by TRL's RewardTrainer, merged in float32. It reads of a pair what it will be asked.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from datasets import Dataset
from peft import LoraConfig, PeftModel
from pydantic import Field
from transformers import AutoModelForSequenceClassification, PrinterCallback, ProgressCallback
from trl import RewardConfig, RewardTrainer

from sipo.conversation import Prompt, as_prompt
from sipo.datasets.doubts import doubtful_pairs
from sipo.errors import Conflict, InvalidRequest, TrainingFailed
from sipo.evaluation.judged_text import encode
from sipo.files import sync, sync_tree, write_atomically
from sipo.models import Base, BaseModelRef, model_sha256
from sipo.precision import Precision, torch_dtype
from sipo.preferences import ObjectiveName
from sipo.record import Record
from sipo.training.arguments import TRAINED_MODULES, common_arguments
from sipo.training.checkpoints import Checkpoints, last_checkpoint
from sipo.training.data import MIN_PAIRS_TO_HOLD_OUT, VALIDATION_SHARE, TrainingPair
from sipo.training.memory import fitting
from sipo.training.records import draw_curve, write_history
from sipo.training.reporting import Reporter
from sipo.training.run_folder import ADAPTER, CURVE, HISTORY, PAIRS, RECIPE
from sipo.training.settings import Measure, Progress, TrainSettings
from sipo.training.sft import TENSORBOARD
from sipo.words import counted, share

NOT_OF_REWARDS = frozenset({"beta", "alpha", "divergence", "divergence_alpha"})
"""Settings of policies, which are trained against a reference."""
HEAD = "score"
CENTERING = 0.01
"""Weight of (r_chosen + r_rejected)^2 in the loss: pairs alone leave open where 0 is. TRL recommends it, from arXiv
2312.09244."""

TokenRow = dict[str, list[int]]
"""chosen_ids and rejected_ids, as TRL's collator takes them."""


class RewardPlan(Record):
    """What a reward model is made from, and all that is known before it is trained."""

    objective: ObjectiveName
    base: BaseModelRef
    data_sha256: str = Field(description="of pairs.jsonl")
    settings: TrainSettings


class RewardRecipe(RewardPlan):
    """recipe.json in a reward model's folder."""

    pairs: int = Field(description="trained on")
    held_out: int = Field(description="pairs that were not; 0: too few, what is measured is measured on those that were")
    prompts_too_long: int = Field(description="pairs left out for it")
    identical: int = Field(description="pairs left out, chosen and rejected being the same")
    responses_cut: int
    steps: int
    micro_batch_size: int
    before: Measure = Field(description="on the pairs held out; a base that was no classifier has 0 for each response")
    after: Measure
    longer_preferred: float = Field(description="accuracy on the same pairs of who always prefers the longer text")
    sha256: str = Field(description="of the reward model's weights")


@dataclass(frozen=True)
class RewardRun:
    objective: str
    base: Base
    pairs: Sequence[TrainingPair]
    settings: TrainSettings
    dtype: Precision = "auto"

    @cached_property
    def lines(self) -> str:
        """pairs.jsonl"""
        return "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in self.pairs)

    @property
    def plan(self) -> RewardPlan:
        settings = TrainSettings.model_validate(self.settings.model_dump(exclude=set(NOT_OF_REWARDS)))
        data_sha256 = hashlib.sha256(self.lines.encode()).hexdigest()
        return RewardPlan(objective=self.objective, base=self.base.ref, data_sha256=data_sha256, settings=settings)

    @property
    def name(self) -> str:
        """A folder's: equal for what is made from the same."""
        return f"{self.objective}-{hashlib.sha256(_written(self.plan).encode()).hexdigest()[:8]}"

    def account(self) -> list[str]:
        """What will be left out, by which setting, and what looks wrong in the pairs: a sentence each. Raises InvalidRequest if not
        even one pair can be trained on."""
        rows, total, limits = self.rows, len(self.pairs), self.settings
        longest = f"longer than max_prompt_tokens = {limits.max_prompt_tokens}"
        if not rows.train:
            raise InvalidRequest(
                f"no pair to train a reward model of {self.objective!r} on: of {counted(total, 'pair')} {rows.too_long} have "
                f"prompts {longest}, in {rows.identical} chosen and rejected are the same"
            )
        said = []
        if rows.too_long:
            said.append(f"{share(rows.too_long, total, 'pair')} left out: the prompt is {longest}")
        if rows.identical:
            said.append(f"{share(rows.identical, total, 'pair')} left out: chosen and rejected are the same")
        if rows.cut:
            said.append(f"{counted(rows.cut, 'response')} cut: longer than max_response_tokens = {limits.max_response_tokens}")
        if (drawn := len(rows.train) + rows.held_out) < (usable := total - rows.too_long - rows.identical):
            said.append(f"{share(drawn, usable, 'pair')} drawn: max_pairs = {limits.max_pairs}")
        return said + doubtful_pairs((pair["prompt"], pair["chosen"], pair["rejected"]) for pair in self.pairs)

    @cached_property
    def rows(self) -> RewardRows:
        return _rows(self)


@dataclass(frozen=True)
class RewardRows:
    """Token rows of the pairs; `measured`: those held out, or all of them if `held_out` is 0.

    Of all pairs, `too_long` (by their prompts) and `identical` are left out; `cut` counts responses. `longer_preferred`: see
    RewardRecipe.
    """

    train: list[TokenRow]
    measured: list[TokenRow]
    held_out: int
    longer_preferred: float
    too_long: int
    identical: int
    cut: int


def train_reward_model(run: RewardRun, out: Path, report: Callable[[Progress], None], *, cache_dir: Path) -> RewardRecipe:
    """Leaves a whole float32 classifier in `out`, with recipe.json, pairs.jsonl, history.jsonl, loss.png and TensorBoard's files.

    A run that is killed goes on when it is started again with the same `out`, whose working files lie beside it. Raises Conflict if
    `out` is there already, or if those files are another run's; InvalidRequest if no pair is usable; TrainingFailed, with nothing
    left, if the run diverges, judges worse than chance, or does not fit into memory.
    """
    if out.exists():
        raise Conflict(f"{out} is there already: name another folder")
    run.account()
    work = out.with_name(f".{out.name}.training")
    _begin(work, run)
    try:
        aside, recipe = _train(run, work, report, cache_dir)
    except TrainingFailed:
        shutil.rmtree(work)  # going on would fail again, and other settings may not go on from it
        raise
    aside.rename(out)
    sync(out.parent)
    shutil.rmtree(work)
    return recipe


def _rows(run: RewardRun) -> RewardRows:
    """Of up to max_pairs usable pairs, drawn by seed; a prompt's stay on one side of the split. A response that is too long is cut
    as a text, since texts are what it will judge."""
    settings, tokenizer = run.settings, run.base.tokenizer
    by_prompt: dict[Prompt, list[TrainingPair]] = {}
    for pair in run.pairs:
        by_prompt.setdefault(as_prompt(pair["prompt"]), []).append(pair)
    prompts = list(by_prompt)
    random.Random(settings.seed).shuffle(prompts)
    usable: list[tuple[Prompt, str, str]] = []
    too_long = identical = cut = 0
    for prompt in prompts:
        if len(run.base.prompt_format.prompt_ids(prompt, tokenizer)) > settings.max_prompt_tokens:
            too_long += len(by_prompt[prompt])
            continue
        for pair in by_prompt[prompt]:
            chosen, rejected = (_cut(pair[side], tokenizer, settings.max_response_tokens) for side in ("chosen", "rejected"))
            cut += (chosen != pair["chosen"]) + (rejected != pair["rejected"])
            if chosen == rejected:
                identical += 1
            else:
                usable.append((prompt, chosen, rejected))
    drawn = usable[: settings.max_pairs]
    held_out = math.ceil(VALIDATION_SHARE * len(drawn)) if len(drawn) >= MIN_PAIRS_TO_HOLD_OUT else 0
    while 0 < held_out < len(drawn) and drawn[held_out][0] == drawn[held_out - 1][0]:
        held_out += 1
    held_out %= max(len(drawn), 1)  # of a single prompt none are
    rows = [
        {
            f"{side}_ids": encode(tokenizer, prompt, text, name=run.base.ref.name)["input_ids"][0].tolist()
            for side, text in (("chosen", chosen), ("rejected", rejected))
        }
        for prompt, chosen, rejected in drawn
    ]
    lengths = [(len(chosen), len(rejected)) for _, chosen, rejected in drawn[: held_out or None]]
    return RewardRows(
        train=rows[held_out:],
        measured=rows[: held_out or None],
        held_out=held_out,
        longer_preferred=_hits(torch.tensor([chosen - rejected for chosen, rejected in lengths])),
        too_long=too_long,
        identical=identical,
        cut=cut,
    )


def _cut(text: str, tokenizer: Any, longest: int) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= longest else str(tokenizer.decode(ids[:longest], clean_up_tokenization_spaces=False))


def _begin(work: Path, run: RewardRun) -> None:
    """Writes down what the run is made from. Raises Conflict, with nothing touched, if there are checkpoints of a run that was made
    from something else."""
    path = work / RECIPE
    if last_checkpoint(work) is None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_atomically(path, _written(run.plan))
        sync(work)
        return
    begun = RewardPlan.model_validate_json(path.read_text())
    if other := [name for name, value in run.plan if getattr(begun, name) != value]:
        raise Conflict(
            f"{work} has the checkpoints of another reward model, which differs in {', '.join(other)}: name another folder, or "
            "remove that one"
        )


def _written(plan: RewardPlan) -> str:
    return plan.model_dump_json(indent=1, exclude={"settings": set(NOT_OF_REWARDS)}) + "\n"


def _train(run: RewardRun, work: Path, report: Callable[[Progress], None], cache_dir: Path) -> tuple[Path, RewardRecipe]:
    """The whole folder, still in `work`, and its recipe."""
    rows, reporter = run.rows, Reporter(run.objective, report, 0)
    before = _measure_at_the_start(run)
    steps, micro_batch, history = fitting(
        run.settings,
        reporter,
        lambda micro_batch: _train_adapter(run, work, reporter, micro_batch=micro_batch),
        what=f"the reward model of {run.objective!r}",
        of="pairs",
    )
    # Beside the trained model, which may be in bfloat16: merged where nothing is lost, and measured as it will judge.
    plain = _classifier(run.base, torch.float32)
    plain.config.id2label, plain.config.label2id = {0: run.objective}, {run.objective: 0}
    merged = PeftModel.from_pretrained(plain, work / ADAPTER).merge_and_unload()
    after = _measure(merged, rows.measured)
    if not math.isfinite(after.loss):
        raise TrainingFailed(f"the reward model of {run.objective!r} diverged in its last step: use a smaller learning_rate")
    if after.accuracy < 0.5:
        kind = "pairs held out" if rows.held_out else "training pairs"
        raise TrainingFailed(
            f"the reward model of {run.objective!r} is worse than chance: right on {after.accuracy:.2f} of the "
            f"{len(rows.measured)} {kind}; look at the pairs, give more of them, or use a smaller learning_rate"
        )

    aside = work / "merged"
    shutil.rmtree(aside, ignore_errors=True)
    merged.save_pretrained(aside)
    run.base.tokenizer.save_pretrained(aside)
    draw_curve(aside / CURVE, f"reward model of {run.objective}", history)
    write_history(aside / HISTORY, history)
    shutil.copytree(work / TENSORBOARD, aside / TENSORBOARD)
    (aside / PAIRS).write_text(run.lines, encoding="utf-8")
    recipe = RewardRecipe(
        **dict(run.plan),
        pairs=len(rows.train),
        held_out=rows.held_out,
        prompts_too_long=rows.too_long,
        identical=rows.identical,
        responses_cut=rows.cut,
        steps=steps,
        micro_batch_size=micro_batch,
        before=before,
        after=after,
        longer_preferred=rows.longer_preferred,
        sha256=model_sha256(aside, cache_dir),
    )
    (aside / RECIPE).write_text(_written(recipe))
    sync_tree(aside)  # nothing it could be made from again is left then
    return aside, recipe


def _train_adapter(run: RewardRun, work: Path, reporter: Reporter, *, micro_batch: int) -> tuple[int, int, list[dict[str, Any]]]:
    """Leaves LoRA and head in `work`: the steps, the micro-batch, and the trainer's log."""
    trainer = _trainer(run, work, reporter, micro_batch=micro_batch)
    trainer.train(resume_from_checkpoint=last_checkpoint(work))
    trainer.model.save_pretrained(work / ADAPTER)
    return trainer.state.global_step, micro_batch, trainer.state.log_history


class _Trainer(RewardTrainer):  # type: ignore[misc]
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Margin and accuracy by the names that TRL's other trainers have for them: progress and curves know those."""
        measured = self._metrics["train" if self.model.training else "eval"]
        for theirs, ours in (("margin", "rewards/margins"), ("accuracy", "rewards/accuracies")):
            if theirs in measured:
                measured[ours] = measured.pop(theirs)
        super().log(logs, start_time)


def _trainer(run: RewardRun, work: Path, reporter: Reporter, *, micro_batch: int) -> _Trainer:
    settings, rows, dtype = run.settings, run.rows, torch_dtype(run.dtype)
    model = _classifier(run.base, dtype)
    model.score.float()  # it is trained, as the LoRA, whose weights are float32 too
    trainer = _Trainer(
        model=model,
        args=RewardConfig(
            **common_arguments(
                settings, work, rows=len(rows.train), micro_batch=micro_batch, dtype=dtype, held_out=bool(rows.held_out)
            ),
            center_rewards_coefficient=CENTERING,
        ),
        train_dataset=Dataset.from_list(rows.train),
        eval_dataset=Dataset.from_list(rows.measured) if rows.held_out else None,
        processing_class=run.base.tokenizer,
        peft_config=LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules=TRAINED_MODULES,
            modules_to_save=[HEAD],
            task_type="SEQ_CLS",
        ),
        callbacks=[reporter, Checkpoints(settings.checkpoint_steps)],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _classifier(base: Base, dtype: torch.dtype) -> Any:
    """The base with one output, which is 0 for everything if it had none: a random head would first have to be unlearned."""
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        base.folder, num_labels=1, dtype=dtype, output_loading_info=True
    )
    if f"{HEAD}.weight" in loading["missing_keys"]:
        torch.nn.init.zeros_(model.score.weight)
    # A text ends before it, also where nothing is padded. TRL pads with the same token.
    base.tokenizer.pad_token = base.tokenizer.pad_token or base.tokenizer.eos_token
    model.config.get_text_config().pad_token_id = base.tokenizer.pad_token_id
    return model


def _measure_at_the_start(run: RewardRun) -> Measure:
    model = _classifier(run.base, torch.float32)
    if model.score.weight.any():
        return _measure(model, run.rows.measured)
    return Measure(loss=math.log(2), margin=0, accuracy=0.5)  # 0 for every text: a pass over the pairs would take minutes to say so


def _measure(model: Any, rows: Sequence[TokenRow]) -> Measure:
    """As it will judge: one text at a time, in the model's precision."""
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu").eval()
    with torch.inference_mode():
        rewards = torch.tensor(
            [
                [float(model(torch.tensor([row[f"{side}_ids"]], device=model.device)).logits) for side in ("chosen", "rejected")]
                for row in rows
            ]
        )
    margins = rewards[:, 0] - rewards[:, 1]
    return Measure(loss=float(F.softplus(-margins).mean()), margin=float(margins.mean()), accuracy=_hits(margins))


def _hits(margins: torch.Tensor) -> float:
    """The share that is above 0, where 0 is half a hit."""
    return float(((margins > 0).double() + (margins == 0) / 2).mean())
