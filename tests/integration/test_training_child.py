"""Training runs as processes: how they are started, given up and ended. Real ones are killed in test_training_run, test_rounds."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
import yaml

from services.common.background import end_tasks
from services.common.local.training import launch_command, run_child
from sipo.errors import InvalidRequest, TrainingFailed
from sipo.training.settings import ACCELERATE, Progress


@pytest.mark.parametrize(
    ("end", "how"),
    [("os.kill(os.getpid(), 9)", "killed by signal 9"), ("sys.exit('a device failed')", "with status 1: a device failed")],
)
async def test_a_training_process_that_gets_no_further_is_given_up(tmp_path: Path, end: str, how: str) -> None:
    told: list[int] = []

    async def tell(progress: Progress) -> None:
        told.append(progress.step)

    step = Progress(objective="warm", stage="training", step=4, of=9, seconds_left=1, loss=1).model_dump_json()
    script = f"import os, sys; print({step!r}, flush=True); {end}"
    with pytest.raises(TrainingFailed, match=f"ended 3 times without getting further, {how}"):
        await run_child(tmp_path / "run.yaml", tell, [sys.executable, "-c", script])
    assert told == [4, 4, 4]


async def test_a_launcher_of_several_processes_is_asked_to_end_them(tmp_path: Path) -> None:
    """They live in sessions of their own: nobody else can."""
    ended = tmp_path / "ended"
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

    task = asyncio.create_task(run_child(tmp_path / "run.yaml", tell, [sys.executable, "-c", script]))
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
