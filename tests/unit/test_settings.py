from __future__ import annotations

import pwd
from pathlib import Path

import pytest
from pydantic import ValidationError

from services.common.settings import CommonSettings, Port, RewardModelSettings, TeacherSettings, load
from services.trainer.settings import TrainerSettings


class ServiceSettings(RewardModelSettings, TeacherSettings):
    scorer_port: Port = 8003


def test_variables_are_field_names_after_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIPO_SCORER_PORT", "9000")
    monkeypatch.setenv("SIPO_DATA_DIR", "~/elsewhere")
    monkeypatch.setenv("SIPO_DECODER_SLOTS", "2")  # a neighbour's
    settings = load(ServiceSettings)
    assert settings.scorer_port == 9000
    assert settings.data_dir == Path.home() / "elsewhere"


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("SIPO_SCORER_PORT", "eighty", "SIPO_SCORER_PORT='eighty' is not usable"),
        ("SIPO_SCORER_PORT", "70000", "65535"),
        ("SIPO_LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("SIPO_REDIS_URL", "localhost:6379", "SIPO_REDIS_URL='localhost:6379'"),
        ("SIPO_REWARD_MODELS", "safety", "SIPO_REWARD_MODELS is not usable: it must be JSON"),
        ("SIPO_REWARD_MODELS", '{"s": 1}', "s: must be a text"),
        ("SIPO_TEACHERS", '{"big": {"url": "https://host/v1"}}', "SIPO_TEACHERS is not usable: big: model: is missing"),
        ("SIPO_TEACHERS", '{"big": {"url": "host/v1", "model": "m"}}', "big: url: must be a URL"),
    ],
)
def test_a_bad_value_stops_the_service_with_one_sentence_that_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as stopped:
        load(ServiceSettings)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert variable in said
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('{"big": {"url": "https://host/v1", "model": "m", "key": "sk-secret"}}', "big: key: is no known field"),
        ('{"big": {"url": "https://host/v1", "model": "m", "api_key": "sk-secret\\n"}}', "big: api_key: a key is"),
        ('{"big": {"url": "https://host/v1", "model": "m", "api_key": ["sk-secret"]}}', "big: api_key: must be"),
        ('["sk-secret"]', "must be a mapping"),
        ('"sk-secret"', "must be a mapping"),
        ("sk-secret", "it must be JSON"),
    ],
)
def test_a_key_is_never_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, says: str) -> None:
    monkeypatch.setenv("SIPO_TEACHERS", value)
    with pytest.raises(SystemExit):
        load(TeacherSettings)
    said = capsys.readouterr().err
    assert says in said
    assert "secret" not in said


def test_a_teachers_key_is_in_no_picture_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIPO_TEACHERS", '{"big": {"url": "https://host/v1", "model": "m", "api_key": "sk-secret"}}')
    settings = load(TeacherSettings)
    key = settings.teachers["big"].api_key
    assert key is not None and key.get_secret_value() == "sk-secret"
    assert "secret" not in f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docker compose passes on what nobody set."""
    monkeypatch.setenv("SIPO_REWARD_MODELS", "")
    monkeypatch.setenv("SIPO_SCORER_PORT", "")
    assert (load(ServiceSettings).reward_models, load(ServiceSettings).scorer_port) == ({}, 8003)


def test_an_unknown_accelerate_configuration_stops_the_trainer_at_its_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIPO_TRAINER_ACCELERATE", "multi_gpu")
    assert load(TrainerSettings).trainer_accelerate == "multi_gpu"
    monkeypatch.setenv("SIPO_TRAINER_ACCELERATE", "eight_gpus")
    with pytest.raises(SystemExit) as stopped:
        load(TrainerSettings)
    said = capsys.readouterr().err
    assert (stopped.value.code, said.count("\n")) == (2, 1)
    assert said.startswith("SIPO_TRAINER_ACCELERATE='eight_gpus' is not usable") and "multi_gpu" in said


@pytest.mark.parametrize("variable", ["SIPO_DATA_DIR", "SIPO_CACHE_DIR"])
@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("file", "it is no folder"),
        ("file/below/it", "{tmp}/file is no folder"),
        ("loop", "it is no folder"),
        ("~nobody-here/sipo", "there is no home folder"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_folder_that_cannot_be_one_stops_every_process_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, variable: str, folder: str, reason: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    given = folder if folder.startswith("~") else f"{tmp_path}/{folder}"
    monkeypatch.setenv(variable, given)
    with pytest.raises(SystemExit) as stopped:
        load(CommonSettings)
    reason = reason.format(tmp=tmp_path)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"{variable}={given} cannot be used ({reason}): set it to a folder that may be written\n"


@pytest.mark.parametrize("home", [None, "/proc"], ids=["no home", "a home without room"])
def test_without_a_home_the_default_folder_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: str | None
) -> None:
    monkeypatch.delenv("SIPO_DATA_DIR", raising=False)
    monkeypatch.delenv("HOME")
    if home:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # nobody is known: KeyError
    with pytest.raises(SystemExit) as stopped:
        load(CommonSettings, writes=True)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"SIPO_DATA_DIR={home or '~'}/.sipo cannot be used (") and said.count("\n") == 1


def test_who_writes_finds_its_data_folder_made_and_who_reads_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SIPO_DATA_DIR", str(tmp_path / "not" / "yet"))
    load(CommonSettings)
    assert list(tmp_path.iterdir()) == []
    folder = load(CommonSettings, writes=True).data_dir
    assert folder.is_dir() and list(folder.iterdir()) == []


def test_a_read_only_folder_is_enough_for_a_reader(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SIPO_DATA_DIR", "/proc/self/fdinfo")  # root too may make nothing there
    assert load(CommonSettings).data_dir == Path("/proc/self/fdinfo")
    with pytest.raises(SystemExit):
        load(CommonSettings, writes=True)
    assert "SIPO_DATA_DIR=/proc/self/fdinfo cannot be used (" in capsys.readouterr().err


def test_settings_do_not_change() -> None:
    settings = CommonSettings()
    with pytest.raises(ValidationError):
        settings.model = "another"  # type: ignore[misc]
