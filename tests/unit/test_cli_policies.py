"""What `sipo policies import` tells of adapters and takes from them, and `sipo policies delete`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from gateway.cli import app
from sipo.policies import PolicyStore
from sipo.prompts import PromptFormat
from tests.fakes import write_policy_set
from tests.unit.test_adapters import ATTENTION

OWN = (
    "{% for m in messages %}[{{ m.role | upper }}]\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT]\n{% endif %}"
)


@pytest.fixture
def adapters(tiny_base: Path, tmp_path: Path) -> list[Path]:
    """The folders of three trained adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = [tmp_path / name for name in ("helpful", "harmless", "brief")]
    for folder in folders:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(r=2, target_modules=ATTENTION))
        model.save_pretrained(folder)
    return folders


def publish(data_dir: Path, base: Path, folders: list[Path], *options: str) -> Result:
    return sipo(
        data_dir, "import", *(f"{folder.name}={folder}" for folder in folders), "--name", "mine", "--model", str(base), *options
    )


def sipo(data_dir: Path, *args: str, **env: str) -> Result:
    return CliRunner().invoke(app, ["policies", *args], env={"SIPO_DATA_DIR": str(data_dir), "COLUMNS": "200"} | env)


def as_file(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(OWN)


def in_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": OWN}))


def among_others(folder: Path) -> None:
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": OWN}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))


def in_a_folder(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text(OWN)


@pytest.mark.parametrize("write", [as_file, in_config, among_others, in_a_folder])
def test_a_chat_template_of_its_own_is_told_and_taken_when_asked(
    data_dir: Path, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, adapters: list[Path], write: Callable[[Path], None]
) -> None:
    two = adapters[:2]
    for folder in two:
        write(folder)

    told = publish(data_dir, tiny_base, two)
    taken = publish(data_dir, tiny_base, two, "--chat-template", "adapter")

    assert (told.exit_code, taken.exit_code, taken.stderr) == (0, 0, "")
    assert (
        told.stderr.startswith("note: helpful, harmless have a chat template of their own")
        and "--chat-template adapter" in told.stderr
    )
    store = PolicyStore(data_dir / "policies")
    bases, own = (store.get(f"mine:{version}").manifest.prompt_format for version in (1, 2))
    assert bases == PromptFormat.of(tiny_tokenizer)
    own.check(tiny_tokenizer)
    assert own.text("Hi", tiny_tokenizer) == "[USER]\nHi\n[ASSISTANT]\n"
    assert own.prompt_ids("Hi", tiny_tokenizer) == tiny_tokenizer("[USER]\nHi\n[ASSISTANT]\n")["input_ids"]
    assert 'chat_template"' not in (store.get("mine:1").folder / "manifest.json").read_text()


def test_a_base_without_a_template_takes_the_adapters(
    data_dir: Path, tiny_base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    plain = tmp_path / "plain" / tiny_base.name
    plain.mkdir(parents=True)
    for path in tiny_base.iterdir():
        if path.name != "chat_template.jinja":
            (plain / path.name).symlink_to(path)
    assert AutoTokenizer.from_pretrained(plain).chat_template is None
    as_file(adapters[0])

    result = publish(data_dir, plain, adapters[:2], "--chat-template", "adapter")

    assert (result.exit_code, result.stderr) == (0, "")
    own = PolicyStore(data_dir / "policies").get("mine:1").manifest.prompt_format
    assert (own.kind, own.chat_template) == ("chat", OWN)


def test_the_bases_own_template_beside_an_adapter_is_nothing_to_tell(
    data_dir: Path, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, adapters: list[Path]
) -> None:
    tiny_tokenizer.save_pretrained(adapters[0])
    (adapters[1] / "chat_template.jinja").write_text(f"{tiny_tokenizer.chat_template}\n")
    result = publish(data_dir, tiny_base, adapters[:2], "--chat-template", "adapter")
    assert (result.exit_code, result.stderr) == (0, "")
    assert PolicyStore(data_dir / "policies").get("mine:1").manifest.prompt_format.chat_template is None


def test_a_set_has_one_template(data_dir: Path, tiny_base: Path, adapters: list[Path]) -> None:
    as_file(adapters[0])
    (adapters[1] / "chat_template.jinja").write_text(f"{OWN} ")
    result = publish(data_dir, tiny_base, adapters[:2], "--chat-template", "adapter")
    assert (result.exit_code, "chat templates of helpful and harmless differ" in result.stderr) == (2, True), result.output


def test_a_template_that_is_none_is_refused_when_it_is_taken(data_dir: Path, tiny_base: Path, adapters: list[Path]) -> None:
    for folder in adapters[:2]:
        (folder / "chat_template.jinja").write_text("{% for")
    result = publish(data_dir, tiny_base, adapters[:2], "--chat-template", "adapter")
    assert (result.exit_code, "chat template refuses the conversation" in result.stderr) == (2, True), result.output
    assert PolicyStore(data_dir / "policies").sets() == []


def test_another_end_token_and_too_few_slots_are_told(data_dir: Path, tiny_base: Path, adapters: list[Path]) -> None:
    (adapters[0] / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    result = publish(data_dir, tiny_base, adapters)
    end, slots = result.stderr.splitlines()
    assert "'<stop>', and responses end with the base's '<end>'" in end
    assert "3 objectives cannot be mixed as things are: that needs a decoder with SIPO_DECODER_SLOTS=3 (it is 2)" in slots


def test_a_version_is_deleted(data_dir: Path) -> None:
    for version in (1, 2):
        write_policy_set(data_dir / "policies", f"demo:{version}", ["concise", "warm"], current=version == 2)
    assert sipo(data_dir, "delete", "demo:1").stdout == "deleted demo:1\n"
    assert [known.id for known in PolicyStore(data_dir / "policies").sets()] == ["demo:2"]
    again = sipo(data_dir, "delete", "demo:1")
    assert (again.exit_code, again.stderr) == (2, "error: no policy set 'demo:1': known sets are demo:2\n")
