"""The decoder's engine without any service, on a list of prompts and weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sipo.decoding.request import EXTRA_ARG, LINEAR, REVERSE_KL, MixingRule, Mixture, base_mixture, linear_mixture, mixture
from sipo.decoding.vllm import set_environment
from sipo.decoding.vllm.worker import check_loaded
from sipo.errors import InvalidRequest, SipoError
from sipo.preferences import BASE, MOD, Weights

Prompt = str | Sequence[int]
"""Text, or token ids."""

POLICIES = "policies"


@dataclass(frozen=True)
class Response:
    """One answer: its text and token ids, the weights in effect, and vLLM's finish reason ("stop" or "length")."""

    text: str
    tokens: list[int]
    weights: Weights
    finish_reason: str | None


class OfflineDecoder:
    """One base model with one policy per objective, in this process; several can follow each other, not run side by side.

    >>> with OfflineDecoder("model", {"concise": "adapters/concise", "warm": "adapters/warm"}) as decoder:
    ...     weights = [{"concise": 0.9, "warm": 0.1}, {"concise": 0.2, "warm": 0.8}]
    ...     short, kind = decoder.generate(["Hello!", "Hello!"], weights, max_tokens=64)
    """

    def __init__(
        self,
        model: str | Path,
        policies: Mapping[str, str | Path],
        *,
        reference: str | Path | None = None,
        slots: int | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        tensor_parallel: int = 1,
        compiled: bool | None = None,
        ranks: int = 128,
        kv_cache_gib: int = 2,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        """`model` is a folder, `policies` are the folders of PEFT adapters by objective, `reference` that of the adapter which they
        lie on top of, if they were not aligned from the plain model.

        `slots` is how many models one request can mix: by default as many as there are policies. `kv_cache_gib` and `threads` (by
        default all cores) are a CPU's. `compiled` and `ranks` are explained at engine_arguments; `options` go to vLLM's EngineArgs
        as they are. Raises IncompatiblePolicy for an adapter that cannot be mixed over this base, InvalidRequest for a model of
        another architecture.
        """
        set_environment(kv_cache_gib=kv_cache_gib, threads=threads)
        # In this process, so that a script needs no `if __name__ == "__main__"`, and vLLM is imported once.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        from sipo.decoding.vllm.engine import engine_arguments

        self.objectives = list(policies)
        self.slots = slots or len(policies) or 1
        arguments = engine_arguments(
            Path(model),
            slots=self.slots,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            tensor_parallel=tensor_parallel,
            compiled=compiled,
            ranks=ranks,
        )
        self.llm = LLM(**(arguments | options))
        try:
            self.load(POLICIES, policies, reference)
        except SipoError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine: another can then be started in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def generate(
        self,
        prompts: Sequence[Prompt],
        weights: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
        *,
        mode: str = MOD,
        mixing: MixingRule = REVERSE_KL,
        mixing_alpha: float | None = None,
        **sampling: Any,
    ) -> list[Response]:
        """One response per prompt, all in one batch.

        `weights` are for all prompts, or one for each; uniform if left out. `mode` is "mod", "soup", an objective's name,
        "reference" or "base", `mixing` a rule of sipo.decoding.mixing; under "linear" the weights are free coefficients, of
        "reference" and "base" too. `sampling` are vLLM's SamplingParams. Raises InvalidWeights and InvalidRequest.
        """
        each = [weights] * len(prompts) if weights is None or isinstance(weights, Mapping) else list(weights)
        if len(each) != len(prompts):
            raise InvalidRequest(f"{len(each)} weights for {len(prompts)} prompts: give one each, or one for all", param="weights")
        chosen = [self._mixture(one, mode, mixing, mixing_alpha) for one in each]
        outputs = self._run(prompts, [mixed for mixed, _ in chosen], sampling)
        return [
            Response(output.text, list(output.token_ids), effective, output.finish_reason)
            for output, (_, effective) in zip(outputs, chosen, strict=True)
        ]

    def generate_mixtures(self, prompts: Sequence[Prompt], mixtures: Sequence[Mixture], **sampling: Any) -> list[list[int]]:
        """The token ids of one response per prompt and mixture of any sets: POLICIES, and those that were loaded since."""
        return [list(output.token_ids) for output in self._run(prompts, mixtures, sampling)]

    def load(self, key: str, policies: Mapping[str, str | Path], reference: str | Path | None = None) -> None:
        """Makes another set resident: mixtures name it by `key`. Raises as check_loaded."""
        folders = [str(folder) for folder in policies.values()]
        arguments = (key, folders, None if reference is None else str(reference))
        check_loaded(self.llm.collective_rpc("sipo_load", args=arguments))

    def unload(self, key: str) -> None:
        self.llm.collective_rpc("sipo_unload", args=(key,))

    def _mixture(
        self, weights: Mapping[str, float] | None, mode: str, rule: MixingRule, alpha: float | None
    ) -> tuple[Mixture, Weights]:
        if mode == BASE:
            if weights is not None:
                raise InvalidRequest("the base model has no objectives: leave out weights", param="weights")
            return base_mixture(), {}
        if rule == LINEAR:
            if mode != MOD or alpha is not None:
                raise InvalidRequest("linear mixing has coefficients only: leave out mode and mixing_alpha", param="mixing")
            coefficients = dict(weights or {})
            return linear_mixture(POLICIES, self.objectives, coefficients), coefficients
        return mixture(POLICIES, self.objectives, weights, mode, rule=rule, alpha=alpha)

    def _run(self, prompts: Sequence[Prompt], mixtures: Sequence[Mixture], sampling: Mapping[str, Any]) -> list[Any]:
        """vLLM's first output of each request."""
        from vllm import SamplingParams

        for chosen in mixtures:
            if (needed := len(chosen.entries)) > self.slots:
                raise InvalidRequest(f"a mixture of {needed} models needs slots={needed}, this decoder has {self.slots}")
        asked = [
            ({"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)})
            | {"cache_salt": chosen.cache_salt()}
            for prompt, chosen in zip(prompts, mixtures, strict=True)
        ]
        params = [SamplingParams(**sampling, extra_args={EXTRA_ARG: chosen.model_dump_json()}) for chosen in mixtures]
        return [answer.outputs[0] for answer in self.llm.generate(asked, params, use_tqdm=False)]
