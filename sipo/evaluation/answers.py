"""What every method says to every prompt at every weight: generated greedily, a chunk of prompts at a time.

Answers are written as they come. A chunk is always the same prompts, all weights of them in one batch: an evaluation that was
stopped begins its torn chunk again, and ends with the answers that it would have had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sipo.errors import InvalidRequest
from sipo.evaluation.folder import ANSWERS, EvaluationFolder
from sipo.evaluation.methods import Adapter, Method
from sipo.evaluation.plan import Plan
from sipo.evaluation.report import Kind
from sipo.preferences import BASE, MOD, REFERENCE, SOUP, Weights, format_weights, one_hot_weights
from sipo.record import Record
from sipo.words import counted

if TYPE_CHECKING:
    from sipo.decoding import Response

CHUNK = 32
"""Prompts in one batch, each with all weights: what a killed evaluation loses at the most."""
GREEDY = 0.0
MODE_OF: Mapping[Kind, str] = {"base": BASE, "reference": REFERENCE, "mod": MOD, "soup": SOUP, "models": SOUP}

Tell = Callable[[str, int, int], None]
"""Hears of a stage, such as "answers of demo": how many prompts are done, and how many there are."""


class Answer(Record):
    """`prompt` counts from 0; `tokens` are those of the answer, its end token among them."""

    prompt: int
    weights: Weights | None
    text: str
    tokens: int
    finish_reason: str | None


class Decoder(Protocol):
    """As much of OfflineDecoder as is needed here."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        weights: Sequence[Mapping[str, float]] | None = None,
        *,
        mode: str,
        temperature: float,
        max_tokens: int,
    ) -> list[Response]: ...


class OpenDecoder(Protocol):
    """Starts an engine over a base and adapters."""

    def __call__(
        self, model: Path, policies: Mapping[str, Path], *, reference: Path | None, slots: int, ranks: int, max_model_len: int
    ) -> AbstractContextManager[Decoder]: ...


def open_offline(
    model: Path, policies: Mapping[str, Path], *, reference: Path | None, slots: int, ranks: int, max_model_len: int
) -> AbstractContextManager[Any]:
    from sipo.decoding import OfflineDecoder  # with torch, which takes seconds to import

    return OfflineDecoder(
        model, policies, reference=reference, slots=slots, ranks=ranks, max_model_len=max_model_len, use_tqdm_on_load=False
    )


@dataclass(frozen=True)
class Engine:
    """Methods that one engine answers for: of one base, one reference and one set of adapters, but for those of the base or of the
    reference alone."""

    methods: Sequence[Method]

    @property
    def adapters(self) -> Mapping[str, Path]:
        method = max(self.methods, key=lambda method: len(method.adapters))
        return {name: adapter.folder for name, adapter in method.adapters.items()}

    @property
    def reference(self) -> Path | None:
        return next((method.reference.folder for method in self.methods if method.reference is not None), None)

    @property
    def base(self) -> Path:
        return self.methods[0].base.folder

    @property
    def ranks(self) -> int:
        """Of all adapters together: an engine for a GPU makes room for so many, and computes them all in every step."""
        return max(1, *(sum(adapter.rank for adapter in _all_adapters(method)) for method in self.methods))

    @property
    def slots(self) -> int:
        return max(method.slots for method in self.methods)


def _all_adapters(method: Method) -> list[Adapter]:
    return [*method.adapters.values(), *([] if method.reference is None else [method.reference])]


def engines(methods: Sequence[Method]) -> list[Engine]:
    """As few as may be."""
    by_adapters: dict[tuple[str | None, ...], list[Method]] = {}
    # A reference alone joins an engine that has it anyway, and the base alone joins any.
    for method in sorted(methods, key=lambda method: (not method.adapters, method.kind == "base")):
        reference = None if method.reference is None else method.reference.sha256
        key = (method.base.ref.sha256, reference, *(adapter.sha256 for adapter in method.adapters.values()))
        if not method.adapters:
            needed = key[:1] if method.kind == "base" else key
            key = next((other for other in by_adapters if other[: len(needed)] == needed), key)
        by_adapters.setdefault(key, []).append(method)
    return [Engine(together) for together in by_adapters.values()]


def prompt_ids(plan: Plan) -> dict[str, list[list[int]]]:
    """Every prompt's tokens, by method. Raises InvalidRequest if any leaves no room for an answer of max_tokens."""
    ids = {}
    for method in plan.methods:
        tokens = [method.prompt_format.prompt_ids(prompt.prompt, method.base.tokenizer) for prompt in plan.prompts]
        room = _context(method.base.folder) - plan.max_tokens
        if too_long := [index for index, one in enumerate(tokens) if len(one) > room]:
            raise InvalidRequest(
                f"{counted(len(too_long), 'prompt')} would leave no room for {counted(plan.max_tokens, 'token')} of answer in the "
                f"{room + plan.max_tokens} of {method.base.ref.name}, the first is prompt {too_long[0]}, counted from 0: leave "
                "them out, or give a smaller `max_tokens`",
                param="max_tokens",
            )
        ids[method.name] = tokens
    return ids


def _context(base: Path) -> int:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return int(config["max_position_embeddings"])


def generate(
    plan: Plan, ids: Mapping[str, list[list[int]]], folder: EvaluationFolder, tell: Tell, open_decoder: OpenDecoder = open_offline
) -> dict[str, list[Answer]]:
    """All answers, by method, of which the folder may have the first ones. `ids` are those of prompt_ids."""
    done = {method.name: _begun(plan, method, folder) for method in plan.methods}
    for engine in engines(plan.methods):
        pending = [method for method in engine.methods if len(done[method.name]) < len(plan.prompts) * len(method.points)]
        if not pending:
            continue
        tell(_stage(pending[0]), len(done[pending[0].name]) // len(pending[0].points), len(plan.prompts))  # starting takes a minute
        longest = max(len(tokens) for method in engine.methods for tokens in ids[method.name])
        with open_decoder(
            engine.base,
            engine.adapters,
            reference=engine.reference,
            slots=engine.slots,
            ranks=engine.ranks,
            max_model_len=longest + plan.max_tokens,
        ) as decoder:
            for method in pending:
                stage, rows = _stage(method), folder.rows(ANSWERS, method.name, Answer)
                answers, known = done[method.name], _of_single_policies(plan, engine, method, done)
                for first in range(len(answers) // len(method.points), len(plan.prompts), CHUNK):
                    tell(stage, first, len(plan.prompts))
                    with folder.timed(stage):
                        prompts = range(len(plan.prompts))[first : first + CHUNK]
                        chunk = _chunk(method, prompts, known, partial(_ask, plan, method, ids[method.name], decoder))
                    rows.add(chunk)
                    answers += chunk
                tell(stage, len(plan.prompts), len(plan.prompts))
    return done


def _stage(method: Method) -> str:
    return f"answers of {method.name}"


Known = dict[tuple[int, str], Answer]
"""By prompt and weights."""


def _of_single_policies(plan: Plan, engine: Engine, method: Method, done: Mapping[str, Sequence[Answer]]) -> Known:
    """What another method of the same policies answered where one of them has all the weight: the same would come again."""
    same = [
        other
        for other in engine.methods
        if {method.kind, other.kind} == {"mod", "soup"}
        and other.prompt_format == method.prompt_format
        and len(done[other.name]) == len(plan.prompts) * len(other.points)
    ]
    return {
        _key(answer.prompt, answer.weights): answer
        for other in same
        for answer in done[other.name]
        if answer.weights is not None and max(answer.weights.values()) == 1
    }


Point = tuple[int, Weights | None]
"""A prompt, and weights."""


def _chunk(method: Method, prompts: Iterable[int], known: Known, ask: Callable[[Sequence[Point]], list[Answer]]) -> list[Answer]:
    """To these prompts, at all weights of the method: asked in one batch, but for what is known."""
    wanted = [(index, point) for index in prompts for point in method.points]
    asked = [one for one in wanted if _key(*one) not in known]
    made = known | {_key(*one): answer for one, answer in zip(asked, ask(asked) if asked else [], strict=True)}
    return [made[_key(*one)] for one in wanted]


def _key(prompt: int, weights: Weights | None) -> tuple[int, str]:
    return prompt, "" if weights is None else format_weights(weights)


def _ask(plan: Plan, method: Method, ids: Sequence[Sequence[int]], decoder: Decoder, asked: Sequence[Point]) -> list[Answer]:
    responses = decoder.generate(
        [ids[index] for index, _ in asked],
        _coefficients(method, [point for _, point in asked]),
        mode=MODE_OF[method.kind],
        temperature=GREEDY,
        max_tokens=plan.max_tokens,
    )
    return [
        Answer(prompt=index, weights=point, text=made.text, tokens=len(made.tokens), finish_reason=made.finish_reason)
        for (index, point), made in zip(asked, responses, strict=True)
    ]


def _coefficients(method: Method, points: Sequence[Weights | None]) -> list[Weights] | None:
    """What the decoder is asked with: a model of its own for a weight is the soup of its adapter alone."""
    given = [point for point in points if point is not None]
    if method.kind == "models":
        return [one_hot_weights(format_weights(point), list(method.adapters)) for point in given]
    return given or None


def _begun(plan: Plan, method: Method, folder: EvaluationFolder) -> list[Answer]:
    """The whole chunks that there are; the file is cut behind them. Raises InvalidRequest if it holds other answers."""
    rows = folder.rows(ANSWERS, method.name, Answer)
    answers = rows.read()
    expected = ((index, point) for index in range(len(plan.prompts)) for point in method.points)
    whole = len(plan.prompts) * len(method.points)
    if len(answers) > whole or any(
        (answer.prompt, answer.weights) != asked for answer, asked in zip(answers, expected, strict=False)
    ):
        raise InvalidRequest(f"{rows.path} holds other answers: remove it, and it is made again", param="out")
    if len(answers) < whole:
        answers = answers[: len(answers) - len(answers) % (CHUNK * len(method.points))]
        rows.keep(answers)
    return answers
