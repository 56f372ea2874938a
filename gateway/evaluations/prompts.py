"""The prompts of an evaluation, as callers give them: uploaded, inline, or those that ship with the project."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sipo.conversation import Prompt
from sipo.datasets import bundled_eval_prompts
from sipo.errors import InvalidData
from sipo.evaluation.prompts import TestPrompt, read_prompts, unique

_ENDING = re.compile(r"(\.[A-Za-z0-9]{1,8}){0,2}$")


def inline_prompts(prompts: Literal["bundled"] | Sequence[Prompt]) -> list[TestPrompt]:
    """Each once."""
    return unique(TestPrompt(prompt=prompt) for prompt in (bundled_eval_prompts() if prompts == "bundled" else prompts))


def uploaded_prompts(content: bytes, filename: str) -> list[TestPrompt]:
    """Of a file of any kind that `sipo evaluate` takes; of its name only the ending counts. Raises InvalidData."""
    ending = _ENDING.search(filename)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"prompts{ending.group() if ending else ''}")
        path.write_bytes(content)
        try:
            return read_prompts(path)
        except InvalidData as error:
            raise InvalidData(error.message.replace(str(path), "the file"), param="file") from error
