from __future__ import annotations

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
        ("SIPO_REWARD_MODELS", '{"s": 1}', "a valid string"),
        ("SIPO_TEACHERS", '{"big": {"url": "https://host/v1"}}', "SIPO_TEACHERS is not usable: big: model: Field required"),
        ("SIPO_TEACHERS", '{"big": {"url": "host/v1", "model": "m"}}', "big: url: Input should be a valid URL"),
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
        ('{"big": {"url": "https://host/v1", "model": "m", "key": "sk-secret"}}', "big: key: Extra inputs"),
        ('{"big": {"url": "https://host/v1", "model": "m", "api_key": "sk-secret\\n"}}', "big: api_key: Value error, a key is"),
        ('{"big": {"url": "https://host/v1", "model": "m", "api_key": ["sk-secret"]}}', "big: api_key: Input should be"),
        ('["sk-secret"]', "a valid dictionary"),
        ('"sk-secret"', "a valid dictionary"),
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


def test_settings_do_not_change() -> None:
    settings = CommonSettings()
    with pytest.raises(ValidationError):
        settings.model = "another"  # type: ignore[misc]
