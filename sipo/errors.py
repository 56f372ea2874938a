"""Every error that a caller or an operator can meet.

SipoError
├── InvalidRequest            400  the caller's input is wrong; `param` names the field
│   ├── InvalidWeights        400  preference weights that are no point of the simplex
│   ├── InvalidData           400  a data set's line that cannot be read; `line` says which
│   └── IncompatiblePolicy    400  an adapter or a policy set that this base model cannot take
├── NotFound                  404
├── Conflict                  409  the input is fine, the present state does not allow it
├── TrainingFailed            500  a training run ended without a policy
└── Unavailable               503  nothing is wrong with the request: the same one may work later

Services turn them into HTTP in one place (services.common.web.app); queue consumers record `code` and the message.
"""

from __future__ import annotations


class SipoError(Exception):
    """The root: `status` is the HTTP status, `code` the machine-readable name, `param` the field at fault."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(SipoError):
    status = 400
    code = "invalid_request"


class InvalidWeights(InvalidRequest):
    code = "invalid_preference_weights"


class InvalidData(InvalidRequest):
    """One line of a data set is wrong; `line` counts from 1."""

    code = "invalid_data"

    def __init__(self, message: str, *, line: int | None = None, param: str | None = None) -> None:
        super().__init__(message if line is None else f"line {line}: {message}", param=param)
        self.line = line


class IncompatiblePolicy(InvalidRequest):
    code = "incompatible_policy"


class NotFound(SipoError):
    status = 404
    code = "not_found"


class Conflict(SipoError):
    status = 409
    code = "conflict"


class TrainingFailed(SipoError):
    code = "training_failed"


class Unavailable(SipoError):
    """A service is down, starting, asleep or full; `retry_after` is in seconds."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
