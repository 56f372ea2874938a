"""Training runs as processes: what becomes of one that is killed."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from services.common.tasks import end_tasks
from services.common.training import launch_command, run_child
from sipo.errors import InvalidRequest, TrainingFailed
from sipo.prompts import PromptFormat
from sipo.training.settings import ACCELERATE, Progress, TrainRun, TrainSettings, write_run


@pytest.fixture
def make_run(tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        run = TrainRun(
            objective="warm",
            base=tiny_base,
            base_name="tiny",
            prompt_format=PromptFormat.of(tiny_tokenizer),
            settings=TrainSettings(alpha=0, learning_rate=1e-2, batch_size=2, lora_rank=4, epochs=4, checkpoint_steps=1),
            dtype="float32",
        )
        path = write_run(tmp_path / name, run)
        pairs = [{"prompt": f"question {i}", "chosen": "yes " * (1 + i % 3), "rejected": f"no, not {i}"} for i in range(6)]
        (path.parent / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        return path

    return make


def training_process(run: Path) -> psutil.Process:
    return next(child for child in psutil.Process().children() if str(run) in child.cmdline())


@pytest.mark.slow
async def test_a_training_process_that_is_killed_goes_on_and_ends_the_same(make_run: Callable[[str], Path]) -> None:
    whole, killed = make_run("whole"), make_run("killed")
    steps: list[int] = []

    async def silent(_: Progress) -> None:
        pass

    async def kill_twice(progress: Progress) -> None:
        if progress.stage == "training":
            steps.append(progress.step)
            if progress.step in (3, 8) and steps.count(progress.step) == 1:
                training_process(killed).kill()

    wanted = await run_child(whole, silent)
    found = await run_child(killed, kill_twice)
    assert found.model_dump(exclude={"seconds"}) == wanted.model_dump(exclude={"seconds"})
    one, two = (load_file(run.parent / "adapter" / "adapter_model.safetensors") for run in (whole, killed))
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    assert steps[-1] == 12 and len(steps) > 12, "it was killed, and went on"


@pytest.mark.parametrize(
    ("end", "how"),
    [("os.kill(os.getpid(), 9)", "killed by signal 9"), ("sys.exit('a device failed')", "with status 1: a device failed")],
)
async def test_a_training_process_that_gets_no_further_is_given_up(make_run: Callable[[str], Path], end: str, how: str) -> None:
    run = make_run("hopeless")
    told: list[int] = []

    async def tell(progress: Progress) -> None:
        told.append(progress.step)

    step = Progress(objective="warm", stage="training", step=4, of=9, seconds_left=1, loss=1).model_dump_json()
    script = f"import os, sys; print({step!r}, flush=True); {end}"
    with pytest.raises(TrainingFailed, match=f"ended 3 times without getting further, {how}"):
        await run_child(run, tell, [sys.executable, "-c", script])
    assert told == [4, 4, 4]


async def test_a_launcher_of_several_processes_is_asked_to_end_them(make_run: Callable[[str], Path]) -> None:
    """They live in sessions of their own: nobody else can."""
    run = make_run("several")
    ended = run.parent / "ended"
    step = Progress(objective="warm", stage="training", step=1, of=9, seconds_left=1, loss=1).model_dump_json()
    script = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), pathlib.Path({str(ended)!r}).touch(), sys.exit()))\n"
        f"print({step!r}, flush=True)\n"
        "time.sleep(600)"
    )
    running = asyncio.Event()

    async def tell(_: Progress) -> None:
        running.set()

    task = asyncio.create_task(run_child(run, tell, [sys.executable, "-c", script]))
    await running.wait()
    await end_tasks(task, every=0.1)
    assert task.cancelled() and ended.exists()


def test_the_shipped_configurations_are_accelerates(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    names = {path.stem for path in ACCELERATE.glob("*.yaml")}
    assert names == {"multi_gpu", "fsdp2", "zero3", "two_nodes"}
    for name in names:
        command = launch_command(name)
        config = load_config_from_file(command[command.index("--config_file") + 1])
        assert config.num_processes > 1
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"num_processes": 2}))
    assert launch_command(str(own))[4] == str(own)
    with pytest.raises(InvalidRequest, match="no accelerate configuration 'tpu': give a file, or one of fsdp2, multi_gpu"):
        launch_command("tpu")


@pytest.mark.parametrize("accelerate", [None, "fsdp2"])
def test_every_training_process_is_told_its_part_of_the_gpu(accelerate: str | None) -> None:
    assert launch_command(accelerate, gpu_memory=0.3)[-4:] == ["-m", "sipo.training", "--gpu-memory", "0.3"]
