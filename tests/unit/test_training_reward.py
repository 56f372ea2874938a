"""A reward model of a tiny random Llama: what it learns, what it reads, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from trl import RewardTrainer

from sipo.conversation import as_prompt
from sipo.errors import Conflict, InvalidRequest, TrainingFailed
from sipo.evaluation.judged_text import encode
from sipo.evaluation.reward_models import open_reward_model
from sipo.models import Base, BaseModelRef, model_sha256
from sipo.training.data import TrainingPair
from sipo.training.reward_models import RewardRecipe, RewardRun, train_reward_model
from sipo.training.run_folder import RunFolder
from sipo.training.settings import Progress, TrainSettings

SETTINGS = TrainSettings(
    epochs=2, learning_rate=1e-2, alpha=0, batch_size=8, micro_batch_size=8, lora_rank=4, lora_alpha=8, checkpoint_steps=4
)


class Killed(BaseException):
    """As SIGKILL: nothing handles it."""


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Base:
    return Base(tiny_base, BaseModelRef(name="tiny", sha256=model_sha256(tiny_base, tmp_path / "cache")))


def longer_is_better(count: int) -> list[TrainingPair]:
    """Two pairs a prompt, which is a text or a conversation."""
    draw = random.Random(1)

    def text(words: int) -> str:
        return " ".join(draw.choice(["oak", "elm", "fir", "ash"]) for _ in range(words))

    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm"}]
    prompts = [f"q{i // 2}" if i % 4 < 2 else [*talk, {"role": "user", "content": f"q{i // 2}"}] for i in range(count)]
    return [TrainingPair(prompt=prompt, chosen=text(draw.randint(6, 9)), rejected=text(draw.randint(1, 3))) for prompt in prompts]


@pytest.fixture
def run(base: Base) -> RewardRun:
    return RewardRun("long", base, longer_is_better(80), SETTINGS, dtype="float32")


def silent(progress: Progress) -> None:
    pass


def read(folder: Path) -> RewardRecipe:
    return RewardRecipe.model_validate_json((folder / "recipe.json").read_text())


@pytest.mark.slow
def test_it_learns_a_preference_judges_as_it_was_trained_and_may_learn_more(
    run: RewardRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[RewardTrainer] = []
    train = RewardTrainer.train

    def kept(self: RewardTrainer, **arguments: Any) -> Any:
        trainers.append(self)
        return train(self, **arguments)

    monkeypatch.setattr(RewardTrainer, "train", kept)
    said: list[Progress] = []
    recipe = train_reward_model(run, tmp_path / "judge", said.append, cache_dir=tmp_path / "cache")

    assert (recipe.pairs, recipe.held_out, recipe.steps) == (72, 8, 18)
    assert (recipe.before.accuracy, recipe.before.margin) == (0.5, 0)
    assert recipe.after.accuracy > 0.9
    assert recipe.longer_preferred == 1
    last = said[-1]
    assert (last.step, last.of, last.accuracy) == (18, 18, 1) and last.margin is not None and last.margin > 0

    folder = tmp_path / "judge"
    assert read(folder) == recipe
    assert (recipe.objective, recipe.base) == ("long", run.base.ref)
    assert recipe.sha256 == model_sha256(folder, tmp_path / "cache")
    assert recipe.data_sha256 == hashlib.sha256((folder / "pairs.jsonl").read_bytes()).hexdigest()
    assert RunFolder(folder).pairs() == run.pairs
    assert "beta" not in json.loads((folder / "recipe.json").read_text())["settings"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((folder / "tensorboard").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"judge", "cache"}

    judge, trained = open_reward_model(f"hf:{folder}"), trainers[0].model.eval()
    seen = {tuple(ids) for row in [*run.rows.train, *run.rows.measured] for ids in row.values()}
    for pair in run.pairs:
        prompt, texts = as_prompt(pair["prompt"]), [pair["chosen"], pair["rejected"]]
        inputs = [encode(run.base.tokenizer, prompt, text, name="tiny") for text in texts]
        assert {tuple(one["input_ids"][0].tolist()) for one in inputs} <= seen
        with torch.inference_mode():
            own = [float(trained(**one).logits) for one in inputs]
        assert judge(prompt, texts) == pytest.approx(own, abs=1e-4)

    judge_base = Base(folder, BaseModelRef(name="judge", sha256=recipe.sha256))
    further = replace(run, base=judge_base, pairs=run.pairs[:8])
    assert train_reward_model(further, tmp_path / "further", silent, cache_dir=tmp_path / "cache").before.accuracy == 1


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_and_refuses_to_with_another(run: RewardRun, tmp_path: Path) -> None:
    steps: list[int] = []

    def kill_at_5(progress: Progress) -> None:
        steps.append(progress.step)
        if steps == [1, 2, 3, 4, 5]:
            raise Killed

    def train(run: RewardRun, name: str = "judge") -> RewardRecipe:
        return train_reward_model(run, tmp_path / name, kill_at_5, cache_dir=tmp_path / "cache")

    with pytest.raises(Killed):
        train(run)
    others = {
        "objective": replace(run, objective="short"),
        "data_sha256": replace(run, pairs=run.pairs[1:]),
        "settings": replace(run, settings=SETTINGS.model_copy(update={"learning_rate": 1e-3})),
    }
    for differs, other in others.items():
        with pytest.raises(Conflict, match=f"another reward model, which differs in {differs}: name another folder"):
            train(other)
    train(run)
    assert steps == [1, 2, 3, 4, 5, *range(5, 19)]
    train(run, "again")  # without being killed
    ours, theirs = (AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict() for name in ("judge", "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(Conflict, match="is there already"):
        train(run)


@pytest.mark.slow
def test_what_is_worse_than_chance_is_not_published(run: RewardRun, tmp_path: Path) -> None:
    held_out = [run.base.tokenizer.decode(row["chosen_ids"]) for row in run.rows.measured]
    swapped = [
        TrainingPair(prompt=pair["prompt"], chosen=pair["rejected"], rejected=pair["chosen"])
        if any(pair["chosen"] in text for text in held_out)
        else pair
        for pair in run.pairs
    ]
    with pytest.raises(TrainingFailed, match=r"worse than chance: right on 0\.\d\d of the 8 pairs held out; look at the pairs"):
        train_reward_model(replace(run, pairs=swapped), tmp_path / "judge", silent, cache_dir=tmp_path / "cache")
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_what_diverges_is_not_published(run: RewardRun, tmp_path: Path) -> None:
    wild = replace(run, settings=SETTINGS.model_copy(update={"learning_rate": 1e38}))
    with pytest.raises(TrainingFailed, match=r"'long' diverged .*use a smaller learning_rate"):
        train_reward_model(wild, tmp_path / "judge", silent, cache_dir=tmp_path / "cache")
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch(run: RewardRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = RewardTrainer.compute_loss

    def with_little_memory(self: RewardTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RewardTrainer, "compute_loss", with_little_memory)
    few = replace(run, pairs=run.pairs[:16])
    said: list[Progress] = []
    recipe = train_reward_model(few, tmp_path / "judge", said.append, cache_dir=tmp_path / "cache")
    assert [progress.note for progress in said if progress.note] == [
        "out of memory at 8 pairs in a forward: goes on with 4, at the same batch size"
    ]
    assert (recipe.pairs, recipe.held_out, recipe.steps, recipe.micro_batch_size) == (16, 0, 4, 4)


def test_pairs_of_a_prompt_stay_on_one_side_of_the_split(run: RewardRun) -> None:
    def prompts(rows: list[dict[str, list[int]]]) -> set[str]:
        return {run.base.tokenizer.decode(row["chosen_ids"]).rpartition("a:")[0] for row in rows}

    rows = run.rows
    assert (len(rows.train), len(rows.measured), rows.held_out) == (72, 8, 8)
    assert not prompts(rows.train) & prompts(rows.measured)
    few, same = replace(run, pairs=run.pairs[:39]).rows, replace(run, pairs=[{**pair, "prompt": "q"} for pair in run.pairs]).rows
    assert (few.held_out, len(few.measured), same.held_out, len(same.train)) == (0, 39, 0, 80)


def test_a_row_is_the_conversation_with_its_response_and_a_long_one_is_cut(run: RewardRun) -> None:
    talk = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "x"), ("assistant", "y"), ("user", "z"))]
    pair = TrainingPair(prompt=talk, chosen="abcdef", rejected="")
    rows = replace(run, pairs=[pair], settings=SETTINGS.model_copy(update={"max_response_tokens": 4})).rows
    read = [run.base.tokenizer.decode(rows.train[0][f"{side}_ids"]) for side in ("chosen", "rejected")]
    before = "s:s<end>\nu:x<end>\na:y<end>\nu:z<end>\n"
    assert (read, rows.cut) == ([f"{before}a:abcd<end>\n", f"{before}a:<end>\n"], 1)


def test_what_is_left_out_is_told(run: RewardRun) -> None:
    pairs = [
        TrainingPair(prompt="p" * 300, chosen="a", rejected="b"),
        TrainingPair(prompt="q", chosen="a", rejected="a"),
        TrainingPair(prompt="r", chosen="c" * 300, rejected="c" * 299),
        *(TrainingPair(prompt=f"s{i}", chosen="", rejected="d") for i in range(3)),
    ]
    assert replace(run, pairs=pairs, settings=SETTINGS.model_copy(update={"max_pairs": 2})).account() == [
        "1 of 6 pairs left out: the prompt is longer than max_prompt_tokens = 256",
        "2 of 6 pairs left out: chosen and rejected are the same",
        "2 responses cut: longer than max_response_tokens = 256",
        "2 of 3 pairs drawn: max_pairs = 2",
        "in 3 of 6 pairs the preferred response is empty",
    ]
    with pytest.raises(InvalidRequest, match=r"of 3 pairs 1 have prompts longer than max_prompt_tokens = 256, in 2 chosen"):
        replace(run, pairs=pairs[:3]).account()
