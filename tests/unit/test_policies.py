"""Policy sets: what is published is whole, immutable and found again, whatever happens while it is published."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sipo.errors import Conflict, IncompatiblePolicy, InvalidRequest, NotFound
from sipo.models import BaseModelRef
from sipo.policies import REFERENCE, Draft, JobRound, MadeBy, PolicySet, PolicyStore, TrainedRuns, adapters_sha256
from sipo.prompts import PromptFormat

MODULE = "model.layers.0.self_attn.q_proj"
WRITES = {"os.mkdir", "os.rename", "os.symlink", "os.chmod", "shutil.copyfile", "open"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({f"{MODULE}.weight": torch.zeros(6, 4)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> PolicyStore:
    return PolicyStore(tmp_path / "policies")


def make_adapter(folder: Path, *, rank: int = 2, width: int = 4, module: str = MODULE, **config: object) -> Path:
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {"lora_A": torch.ones(rank, width), "lora_B": torch.ones(6, rank)}
    save_file(
        {f"base_model.model.{module}.{name}.weight": tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    return {name: make_adapter(tmp_path / "trained" / name) for name in ("helpful", "harmless")}


def draft(name: str = "demo", objectives: tuple[str, ...] = ("helpful", "harmless")) -> Draft:
    prompt_format = PromptFormat(kind="raw", template="{prompt}\n")
    base = BaseModelRef(name="tiny", sha256="0" * 64)
    return Draft(name=name, base=base, prompt_format=prompt_format, objectives=list(objectives), beta=0.1)


def test_versions_count_up_and_current_moves_only_when_asked(store: PolicyStore, adapters: dict[str, Path], base: Path) -> None:
    first = store.publish(draft(), adapters, base, activate=True)
    second = store.publish(draft(), adapters, base)
    assert [s.id for s in store.sets()] == [first.id, second.id] == ["demo:1", "demo:2"]
    assert store.get("demo").id == "demo:1"
    assert store.activate("demo:2").id == store.get("demo").id == "demo:2"


def test_a_set_reads_back_as_it_was_published(store: PolicyStore, adapters: dict[str, Path], base: Path) -> None:
    published = store.publish(draft(), adapters, base)
    read = store.get("demo:1")
    assert read.manifest == published.manifest
    assert read.manifest.adapters["helpful"].rank == 2
    assert read.default_weights == {"helpful": 0.5, "harmless": 0.5}
    read.verify()


def test_a_set_has_its_reference_with_it(store: PolicyStore, adapters: dict[str, Path], base: Path, tmp_path: Path) -> None:
    reference = make_adapter(tmp_path / "trained" / "tuned", rank=3)
    published = store.publish(draft(), adapters, base, reference=reference)
    assert published.manifest.reference is not None
    assert published.manifest.reference.rank == 3
    assert list(published.folders) == ["helpful", "harmless", REFERENCE]
    assert published.folders[REFERENCE] == published.reference_dir
    store.get("demo:1").verify()
    changed = published.folders[REFERENCE] / "adapter_config.json"
    changed.write_text(changed.read_text() + " ")
    with pytest.raises(IncompatiblePolicy, match="the files of '_reference' changed"):
        store.get("demo:1").verify()


def test_a_set_aligned_from_the_base_has_no_reference_of_its_own(store: PolicyStore, adapters: dict[str, Path], base: Path) -> None:
    published = store.publish(draft(), adapters, base)
    assert published.manifest.reference is None
    assert published.reference_dir is None
    assert list(published.folders) == ["helpful", "harmless"]


def test_a_reference_of_another_base_is_refused(store: PolicyStore, adapters: dict[str, Path], base: Path, tmp_path: Path) -> None:
    foreign = make_adapter(tmp_path / "trained" / "foreign", width=8)
    with pytest.raises(IncompatiblePolicy, match="another base model"):
        store.publish(draft(), adapters, base, reference=foreign)
    assert store.sets() == []


@pytest.mark.parametrize(
    ("made_by", "others"),
    [
        (JobRound(job="job-a", round=1), [JobRound(job="job-a", round=0), JobRound(job="job-b", round=1)]),
        (TrainedRuns(adapters_sha256="1" * 64), [TrainedRuns(adapters_sha256="2" * 64)]),
    ],
)
def test_a_set_is_found_by_what_it_was_made_by(
    store: PolicyStore, adapters: dict[str, Path], base: Path, made_by: MadeBy, others: list[MadeBy]
) -> None:
    store.publish(draft(), adapters, base)
    assert store.published_by("demo", made_by) is None
    published = store.publish(draft().model_copy(update={"made_by": made_by}), adapters, base)
    assert store.published_by("demo", made_by) is not None
    assert (store.get("demo:2").manifest.made_by, published.id) == (made_by, "demo:2")
    assert store.published_by("another", made_by) is None
    assert [store.published_by("demo", other) for other in others] == [None] * len(others)


BEFORE_MADE_BY = """
{
 "name": "demo",
 "base": {"name": "tiny", "sha256": "%(zeros)s"},
 "prompt_format": {"kind": "raw", "system": null, "template": "{prompt}\\n", "chat_template_sha256": null},
 "objectives": ["concise", "warm"],
 "beta": 0.1,
 "round": 1,
 "parent": "demo:1",
 "data_sha256": "%(zeros)s",
 "settings": {
  "epochs": 1.0, "beta": 0.1, "alpha": 0.1, "batch_size": 2, "micro_batch_size": 1, "gradient_checkpointing": false,
  "divergence": "reverse_kl", "divergence_alpha": 0.5, "checkpoint_steps": 25, "tracker": "none", "max_prompt_tokens": 256,
  "max_response_tokens": 256, "lora_rank": 4, "lora_alpha": 8, "max_pairs": null, "seed": 0,
  "method": "sipo", "mode": "mod", "preferences": "both", "learning_rates": {"concise": 0.0002, "warm": 0.001}%(job)s
 },
 "metrics": {
  "concise": {
   "objective": "concise", "pairs": 6, "validation_pairs": 6, "held_out": false, "prompts_too_long": 0, "identical": 0,
   "responses_cut": 0, "steps": 3, "best_step": 3, "micro_batch_size": 1, "seconds": 4.2, "dtype": "float32",
   "before": {"loss": 0.7, "margin": 0.0, "accuracy": 0.5}, "after": {"loss": 0.5, "margin": 0.6, "accuracy": 1.0}
  }
 },
 "version": 2,
 "created": "2026-11-20T06:36:05.230478Z",
 "adapters": {"concise": {"sha256": "%(ones)s", "rank": 4}, "warm": {"sha256": "%(twos)s", "rank": 4}}
}
"""
"""A manifest as it was written when jobs were known by their settings, and other sets by their adapters."""


@pytest.mark.parametrize(
    ("job", "made_by"),
    [
        (', "job": "job-0123456789ab", "job_round": 2', JobRound(job="job-0123456789ab", round=2)),
        ("", TrainedRuns(adapters_sha256=adapters_sha256({"warm": "2" * 64, "concise": "1" * 64}))),
    ],
)
def test_a_set_published_before_there_was_made_by_is_read_and_found(store: PolicyStore, job: str, made_by: MadeBy) -> None:
    folder = store.root / "demo" / "2"
    folder.mkdir(parents=True)
    hashes = {"zeros": "0" * 64, "ones": "1" * 64, "twos": "2" * 64}
    (folder / "manifest.json").write_text(BEFORE_MADE_BY % {**hashes, "job": job})
    manifest = store.get("demo:2").manifest
    assert (manifest.made_by, manifest.settings["learning_rates"]["warm"], manifest.parent) == (None, 0.001, "demo:1")
    found = store.published_by("demo", made_by)
    assert found is not None and found.id == "demo:2"
    assert store.published_by("demo", JobRound(job="job-0123456789ab", round=1)) is None


def test_files_that_changed_after_publishing_are_noticed(store: PolicyStore, adapters: dict[str, Path], base: Path) -> None:
    published = store.publish(draft(), adapters, base)
    config = published.adapter_dir("helpful") / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(IncompatiblePolicy, match="helpful"):
        published.verify()


def test_a_set_of_another_base_is_refused(store: PolicyStore, adapters: dict[str, Path], base: Path) -> None:
    published = store.publish(draft(), adapters, base)
    published.check_base("0" * 64)
    with pytest.raises(IncompatiblePolicy, match="another base"):
        published.check_base("1" * 64)


@pytest.mark.parametrize("reference", ["demo:7", "other", "other:1", "../demo:1", "demo:..", "demo:", ":1"])
def test_unknown_sets_are_not_found_and_the_error_names_those_that_are(
    store: PolicyStore, adapters: dict[str, Path], base: Path, reference: str
) -> None:
    store.publish(draft(), adapters, base, activate=True)
    with pytest.raises(NotFound, match="demo"):
        store.get(reference)


def test_a_name_without_an_active_set_says_which_versions_there_are(
    store: PolicyStore, adapters: dict[str, Path], base: Path
) -> None:
    store.publish(draft(), adapters, base)
    with pytest.raises(NotFound, match="demo:1, none of them activated"):
        store.get("demo")


def a_copy(store: PolicyStore) -> None:
    shutil.copytree(store.root / "demo" / "1", store.root / "demo" / "current")


def a_file(store: PolicyStore) -> None:
    (store.root / "demo" / "current").write_text("1\n")


@pytest.mark.parametrize("restore", [a_copy, a_file])
def test_what_a_backup_made_of_the_link_is_read_and_replaced(
    store: PolicyStore, adapters: dict[str, Path], base: Path, restore: Callable[[PolicyStore], None]
) -> None:
    for _ in range(2):
        store.publish(draft(), adapters, base)
    restore(store)
    assert store.get("demo").id == "demo:1"
    assert store.activate("demo:2").id == store.get("demo").id == "demo:2"
    assert sorted(path.name for path in (store.root / "demo").iterdir()) == ["1", "2", "current"]


def nowhere(current: Path) -> None:
    current.symlink_to("7")


def another_folder(current: Path) -> None:
    current.mkdir()


def other_bytes(current: Path) -> None:
    current.write_bytes(b"\xff\x00")


@pytest.mark.parametrize("break_it", [nowhere, another_folder, other_bytes])
def test_a_current_that_means_no_version_says_what_to_do(
    store: PolicyStore, adapters: dict[str, Path], base: Path, break_it: Callable[[Path], None]
) -> None:
    store.publish(draft(), adapters, base)
    break_it(store.root / "demo" / "current")
    assert store.current_sets() == []
    with pytest.raises(Conflict, match=r"names no version of 'demo', whose sets are demo:1: .*activate demo:VERSION"):
        store.get("demo")
    assert store.activate("demo:1").id == store.get("demo").id == "demo:1"


def test_a_deleted_version_is_gone_and_its_number_is_not_given_again(
    store: PolicyStore, adapters: dict[str, Path], base: Path
) -> None:
    store.publish(draft(), adapters, base, activate=True)
    second = store.publish(draft(), adapters, base)
    assert store.delete("demo:2").id == "demo:2"
    assert [known.id for known in store.sets()] == ["demo:1"]
    with pytest.raises(NotFound, match="not there any more"):
        second.verify()
    assert store.publish(draft(), adapters, base).id == "demo:3"


def test_the_current_set_is_deleted_only_as_the_last(store: PolicyStore, adapters: dict[str, Path], base: Path) -> None:
    store.publish(draft(), adapters, base, activate=True)
    store.publish(draft(), adapters, base)
    with pytest.raises(Conflict, match=r"demo:1 is current: .*sipo policies activate demo:2"):
        store.delete("demo:1")
    store.delete("demo:2")
    store.delete("demo:1")
    assert (store.names(), store.current("demo")) == ([], None)
    assert store.publish(draft(), adapters, base, activate=True).id == "demo:3"


def test_a_set_with_a_child_is_not_deleted_before_it(store: PolicyStore, adapters: dict[str, Path], base: Path) -> None:
    store.publish(draft(), adapters, base)
    child = draft("other").model_copy(update={"parent": "demo:1"})
    store.publish(child, adapters, base)
    with pytest.raises(Conflict, match="other:1 descends from demo:1"):
        store.delete("demo:1")
    with pytest.raises(InvalidRequest, match="demo:1"):
        store.delete("demo")
    store.delete("other:1")
    store.delete("demo:1")


BAD_ADAPTERS: list[tuple[str, dict[str, object]]] = [
    ("use_dora", {"use_dora": True}),
    ("bias", {"bias": "all"}),
    ("modules_to_save", {"modules_to_save": ["lm_head"]}),
    ("rank_pattern", {"rank_pattern": {"q_proj": 4}}),
    ("LOHA", {"peft_type": "LOHA"}),
    ("embed_tokens", {"module": "model.embed_tokens"}),
    ("another base model", {"width": 8}),
    ("another base model", {"module": "model.layers.9.self_attn.q_proj"}),
]


@pytest.mark.parametrize(("reason", "change"), BAD_ADAPTERS)
def test_an_adapter_that_cannot_be_mixed_is_refused_and_nothing_is_left_behind(
    store: PolicyStore, adapters: dict[str, Path], base: Path, tmp_path: Path, reason: str, change: dict[str, object]
) -> None:
    bad = make_adapter(tmp_path / "bad", **change)  # type: ignore[arg-type]
    with pytest.raises(IncompatiblePolicy, match=reason):
        store.publish(draft(), adapters | {"harmless": bad}, base)
    assert store.sets() == []
    assert list((store.root / "demo").iterdir()) == []


@pytest.mark.parametrize("name", ["base", "Demo", "a b", "../x", "", "demo:1"])
def test_a_name_that_could_not_be_asked_for_is_refused(
    store: PolicyStore, adapters: dict[str, Path], base: Path, name: str
) -> None:
    with pytest.raises(InvalidRequest):
        store.publish(draft(name), adapters, base)


@pytest.mark.parametrize("name", ["mod", "soup", "base", "../x", "a b", ""])
def test_an_objective_that_could_not_be_asked_for_is_refused(
    store: PolicyStore, adapters: dict[str, Path], base: Path, name: str
) -> None:
    named = {name: adapters["helpful"], "harmless": adapters["harmless"]}
    with pytest.raises(InvalidRequest, match="cannot be an objective's name"):
        store.publish(draft(objectives=tuple(named)), named, base)
    assert not store.root.exists()


def test_one_objective_is_no_set(store: PolicyStore, adapters: dict[str, Path], base: Path) -> None:
    with pytest.raises(InvalidRequest, match="two or more"):
        store.publish(draft(objectives=("helpful",)), {"helpful": adapters["helpful"]}, base)


def test_a_damaged_manifest_is_an_error_that_names_the_folder(store: PolicyStore, adapters: dict[str, Path], base: Path) -> None:
    published = store.publish(draft(), adapters, base)
    (published.folder / "manifest.json").write_text("{")
    with pytest.raises(Conflict, match=r"demo/1 is no readable policy set"):
        store.get("demo:1")


def _killed_at_write(step: int, action: Callable[[], object], root: Path) -> bool:
    """Runs the action in a child that kills itself before its step-th change below root; False if it came to its end."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in WRITES and any(str(root) in str(argument) for argument in arguments):
                seen += 1
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def _whole(store: PolicyStore) -> list[PolicySet]:
    sets = store.sets()
    for policy_set in sets:
        policy_set.verify()
    return sets


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_set_current_and_every_set_whole(
    store: PolicyStore, adapters: dict[str, Path], base: Path
) -> None:
    store.publish(draft(), adapters, base, activate=True)
    seen_current = {"demo:1"}
    step = 1
    while _killed_at_write(step, lambda: store.publish(draft(), adapters, base, activate=True), store.root):
        sets = _whole(store)
        current = store.get("demo").id
        # Old or new, and never back: what was once current stays so or is followed by a newer whole set.
        assert current in {s.id for s in sets}
        assert int(current.split(":")[1]) >= max(int(c.split(":")[1]) for c in seen_current)
        seen_current.add(current)
        step += 1
    assert step > 10, "the kills must have covered every write"
    assert store.get("demo").id == _whole(store)[-1].id


def test_what_a_killed_publisher_left_is_removed_when_it_is_old(store: PolicyStore, adapters: dict[str, Path], base: Path) -> None:
    store.publish(draft(), adapters, base)
    old, young = store.root / "demo" / ".new-old", store.root / "demo" / ".new-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "half").touch()
    os.utime(old, (1, 1))
    store.publish(draft(), adapters, base)
    assert not old.exists() and young.exists()
