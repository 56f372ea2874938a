"""What callers send in bodies, read with the words of whoever wrote it."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from sipo.errors import InvalidRequest
from sipo.validation import explain

M = TypeVar("M", bound=BaseModel)


def parse(model: type[M], text: str | bytes, param: str = "") -> M:
    """Raises InvalidRequest; `param` is where the record lies in the body."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        path, sentence = explain(error, model, at=param)
        raise InvalidRequest(sentence, param=path or None) from error
