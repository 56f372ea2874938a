"""Methods are opened from how they are named: sets of the store, folders of adapters, models of their own, over any base."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from safetensors.torch import load_file, save_file

from sipo.errors import IncompatiblePolicy, InvalidRequest, NotFound, SipoError
from sipo.evaluation.methods import Adapter, Method, Methods
from sipo.evaluation.plan import points_of
from sipo.models import BaseModelRef, model_sha256
from sipo.policies import Draft, PolicyStore, adapter_sha256
from sipo.prompts import PromptFormat
from sipo.training.data import TrainingPair
from sipo.training.run_folder import RunFolder
from sipo.training.settings import TrainRun, TrainSettings
from tests.evaluation import OBJECTIVES
from tests.trainer import write_adapter

RAW = PromptFormat(kind="raw", template="Q: {prompt}\n")

Open = Callable[[str], Method]


@pytest.fixture
def other_base(tiny_base: Path, tmp_path: Path) -> Path:
    """Of the same shape, with other weights."""
    folder = shutil.copytree(tiny_base, tmp_path / "models" / "tuned@home")
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    for objective in OBJECTIVES:
        write_adapter(tmp_path / "adapters" / objective)
    return tmp_path / "adapters"


@pytest.fixture
def store(tiny_base: Path, tmp_path: Path, adapters: Path) -> PolicyStore:
    """demo:1 belongs to the tiny base, and knows a prompt format of its own."""
    base = BaseModelRef(name="tiny", sha256=model_sha256(tiny_base, tmp_path / "cache"))
    draft = Draft(name="demo", base=base, prompt_format=RAW, objectives=OBJECTIVES[::-1], beta=0.1)
    store = PolicyStore(tmp_path / "policies")
    store.publish(draft, {objective: adapters / objective for objective in draft.objectives}, tiny_base, activate=True)
    return store


@pytest.fixture
def opened(tiny_base: Path, tmp_path: Path, store: PolicyStore) -> Open:
    return Methods(str(tiny_base), tmp_path / "cache", store.get, OBJECTIVES, points_of(OBJECTIVES, ["2"])).open


@pytest.mark.parametrize(("text", "kind", "slots"), [("a=mod:demo", "mod", 2), ("a=soup:demo:1", "soup", 1)])
def test_a_set_of_the_store_answers_in_its_own_format_at_all_weights(
    opened: Open, store: PolicyStore, text: str, kind: str, slots: int
) -> None:
    method = opened(text)
    demo = store.get("demo")
    assert (method.name, method.kind, method.prompt_format, method.slots) == ("a", kind, RAW, slots)
    assert [(key, one.folder, one.sha256) for key, one in method.adapters.items()] == [
        (name, demo.adapter_dir(name), demo.manifest.adapters[name].sha256) for name in OBJECTIVES
    ]
    assert method.points == [{"concise": 0.0, "warm": 1.0}, {"concise": 1.0, "warm": 0.0}]


def test_the_base_and_adapters_may_be_of_another_base(opened: Open, other_base: Path, adapters: Path, tiny_base: Path) -> None:
    """A path may have an @ of its own where nothing stands before it."""
    assert (opened("base").base.folder, opened("base").points) == (tiny_base, [None])
    assert opened(f"tuned=base:{other_base}").base.folder == other_base
    plain = other_base.rename(other_base.with_name("plain"))
    method = opened(f"b=soup:{adapters}@{plain}")
    assert (method.base.folder, method.source) == (plain, str(adapters))
    assert method.prompt_format == method.base.prompt_format
    assert opened(f"c=mod:{adapters}").base.folder == tiny_base


def test_models_of_their_own_are_listed_in_a_file(opened: Open, adapters: Path, tmp_path: Path) -> None:
    file = tmp_path / "modpo.yaml"
    file.write_text(
        f"- {{weights: {{warm: 0.9, concise: 0.1}}, adapter: adapters/warm}}\n"
        f"- {{weights: {{warm: 0, concise: 1}}, adapter: {adapters}/concise}}\n"
    )
    method = opened(f"modpo=models:{file}")
    assert method.points == [{"concise": 0.1, "warm": 0.9}, {"concise": 1.0, "warm": 0.0}]
    assert {key: one.folder for key, one in method.adapters.items()} == {
        "concise=0.1,warm=0.9": adapters / "warm",
        "concise=1,warm=0": adapters / "concise",
    }


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("mod:demo", InvalidRequest, "cannot read the method 'mod:demo': write NAME=base"),
        ("a/b=mod:demo", InvalidRequest, "a name is letters"),
        ("a=mix:demo", InvalidRequest, "cannot read the method"),
        ("a=mod", InvalidRequest, "the method a: it names no source"),
        ("a=mod:nobody", NotFound, "the method a: no current policy set named 'nobody'"),
        ("a=mod:./nowhere", NotFound, "there is no folder nowhere/concise"),
        ("a=base:./nowhere", NotFound, "no model './nowhere'"),
        ("a=models:nowhere.yaml", NotFound, "there is no file nowhere.yaml: it must be YAML, a list of"),
    ],
)
def test_what_cannot_be_opened_is_told_with_the_methods_name(
    opened: Open, text: str, kind: type[SipoError], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words):
        opened(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "- {weights: {concise: 1, warm: 0}, adapter: adapters/warm}",
            "models for 1 different weights, the other methods answer at 2",
        ),
        ("- {weights: {concise: 1}, adapter: adapters/warm}", "no weight for 'warm'"),
        ("- {weight: {concise: 1, warm: 0}, adapter: a}", "`0.weight` is no known field.*write a list of entries"),
        ("{", "is no YAML"),
    ],
)
def test_a_bad_list_of_models_is_told(opened: Open, tmp_path: Path, adapters: Path, content: str, words: str) -> None:
    (tmp_path / "models.yaml").write_text(content)
    with pytest.raises(InvalidRequest, match=words):
        opened(f"m=models:{tmp_path / 'models.yaml'}")


def test_policies_of_another_base_are_refused_by_the_set_and_by_the_run_that_made_them(
    opened: Open, other_base: Path, adapters: Path, tmp_path: Path
) -> None:
    other_base = other_base.rename(other_base.with_name("plain"))
    with pytest.raises(IncompatiblePolicy, match=r"demo:1 was trained on tiny .* takes demo@FOLDER"):
        opened(f"a=mod:demo@{other_base}")
    runs = tmp_path / "runs"
    trained = _trained(runs, adapters, other_base)
    with pytest.raises(IncompatiblePolicy, match=f"its adapters were trained on {other_base}.*: write @{other_base} behind it"):
        opened(f"a=mod:{runs}")
    method = opened(f"a=mod:{runs}@{other_base}")
    assert method.prompt_format == RAW
    assert method.adapters["warm"].sha256 == adapter_sha256(adapters / "warm")
    assert method.trained == {str(folder): ["What?"] for folder in trained}


def test_a_set_answers_on_its_reference_and_so_does_the_reference_alone(
    opened: Open, store: PolicyStore, adapters: Path, tiny_base: Path
) -> None:
    demo = store.get("demo")
    tuned = store.publish(
        Draft(name="tuned", base=demo.manifest.base, prompt_format=RAW, objectives=demo.objectives, beta=0.1),
        {objective: demo.adapter_dir(objective) for objective in demo.objectives},
        tiny_base,
        reference=write_adapter(adapters / "sft"),
        activate=True,
    )
    assert tuned.manifest.reference is not None and tuned.reference_dir is not None
    reference = Adapter(tuned.reference_dir, tuned.manifest.reference.sha256, rank=4)

    mixed, alone, plain = opened("a=mod:tuned"), opened("a=reference:tuned"), opened("a=mod:demo")
    assert (mixed.reference, mixed.identity()["reference"], mixed.slots) == (reference, reference.sha256, 2)
    assert (alone.reference, alone.points, alone.adapters, alone.slots) == (reference, [None], {}, 1)
    assert (alone.kind, alone.prompt_format, alone.source) == ("reference", RAW, "tuned")
    assert plain.reference is None and "reference" not in plain.identity()
    assert opened("a=reference:demo").reference is None
    assert {**mixed.identity(), "reference": None} == {**plain.identity(), "reference": None}


def test_adapters_of_a_folder_lie_on_the_one_beside_them(opened: Open, adapters: Path) -> None:
    sft = write_adapter(adapters / "_reference")
    for spec in (f"a=mod:{adapters}", f"a=soup:{adapters}", f"a=reference:{adapters}"):
        assert opened(spec).reference == Adapter(sft, adapter_sha256(sft), rank=4)


def test_runs_say_what_their_adapters_lie_on(opened: Open, adapters: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Not a folder beside them, which may be there for something else."""
    first, second = (write_adapter(tmp_path / name) for name in ("first", "second"))
    copy = shutil.copytree(first, tmp_path / "copy")
    same, none, mixed = tmp_path / "same", tmp_path / "none", tmp_path / "mixed"
    _trained(same, adapters, tiny_base, {"concise": first, "warm": copy})
    _trained(none, adapters, tiny_base)
    _trained(mixed, adapters, tiny_base, {"concise": first, "warm": second})
    write_adapter(none / "_reference")

    assert opened(f"a=mod:{same}").reference == Adapter(first, adapter_sha256(first), rank=4)
    assert opened(f"a=mod:{none}").reference is None
    with pytest.raises(InvalidRequest, match=r"the method a: .*these runs have different ones"):
        opened(f"a=mod:{mixed}")
    shutil.rmtree(first)
    with pytest.raises(NotFound, match=f"the method a: the reference's adapter {first} is not there any more"):
        opened(f"a=mod:{same}")


def test_judges_must_be_of_the_sets_objectives(tiny_base: Path, tmp_path: Path, store: PolicyStore) -> None:
    objectives = ["concise", "loud"]
    methods = Methods(str(tiny_base), tmp_path / "cache", store.get, objectives, points_of(objectives, []))
    with pytest.raises(InvalidRequest, match="demo:1 has policies for warm, concise, and there are judges of concise, loud"):
        methods.open("a=mod:demo")


def _trained(runs: Path, adapters: Path, base: Path, references: Mapping[str, Path] = MappingProxyType({})) -> list[Path]:
    """The folders of `sipo train`, one for each objective, on top of the `references` by objective."""
    folders = [RunFolder(runs / objective) for objective in OBJECTIVES]
    for folder in folders:
        reference = references.get(folder.path.name)
        run = TrainRun(
            objective=folder.path.name,
            base=base,
            base_name="tuned",
            reference=reference,
            reference_sha256=None if reference is None else adapter_sha256(reference),
            prompt_format=RAW,
            settings=TrainSettings(),
        )
        folder.prepare(run, [TrainingPair(prompt="What?", chosen="a", rejected="b")])
        shutil.copytree(adapters / folder.path.name, folder.adapter)
    return [folder.path for folder in folders]
