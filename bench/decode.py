"""What mixing costs: `make bench-decode`.

Every contestant is a process of its own with the model in memory; they are asked in turn, round after round, so that what disturbs
the machine disturbs all of them. A ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import httpx
import torch
from safetensors import safe_open

from bench.report import Figure, report
from sipo.models import BUNDLED_MODEL, BaseModelRef, model_sha256, resolve_model
from sipo.policies import Draft
from sipo.prompts import PromptFormat
from support.decoder import ServedDecoder, random_adapter

OBJECTIVES = ("a", "b", "c", "d")
RANK = 16
PROMPT_TOKENS = 16
TOKENS = 64
STREAMS = 32
LONG_PROMPT = 1000
CACHE = Path("~/.cache/sipo").expanduser()


class Prompts:
    """Token ids that share no block of the prefix cache with any other."""

    def __init__(self) -> None:
        self._made = 0

    def __call__(self, count: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
        first, self._made = self._made, self._made + count
        return [[100 + (7919 * (first + i) + 131 * j) % 40000 for j in range(length)] for i in range(count)]


# Contestants


class Engine:
    """vLLM with the plugin and MOD over the adapters; without adapters vLLM as it is, the one model to compare with."""

    def __init__(self, base: Path, adapters: list[Path], threads: int) -> None:
        from sipo.decoding import OfflineDecoder
        from sipo.decoding.vllm import set_environment

        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        self.objectives = [folder.name for folder in adapters]
        limits: dict[str, Any] = {"dtype": "auto", "max_model_len": 2048, "max_num_seqs": 64}
        if adapters:
            policies = dict(zip(self.objectives, adapters, strict=True))
            self.llm = OfflineDecoder(base, policies, kv_cache_gib=1, threads=threads, **limits).llm
        else:
            set_environment(kv_cache_gib=1, threads=threads)
            from vllm import LLM

            from sipo.decoding.vllm.engine import engine_arguments

            ours = ("hf_overrides", "logits_processors", "worker_extension_cls", "additional_config", "compilation_config")
            arguments = engine_arguments(base, slots=1, tensor_parallel=1, compiled=None, ranks=0, **limits)
            self.llm = LLM(**{name: value for name, value in arguments.items() if name not in ours})

    def seconds(self, prompts: list[list[int]], tokens: int, first_weight: float = 0.5) -> float:
        from vllm import SamplingParams

        from sipo.decoding.request import EXTRA_ARG, mixture
        from sipo.decoding.vllm.offline import POLICIES

        extra: dict[str, Any] = {}
        salt: dict[str, str] = {}
        if self.objectives:
            rest = (1 - first_weight) / (len(self.objectives) - 1)
            weights = {name: first_weight if i == 0 else rest for i, name in enumerate(self.objectives)}
            chosen, _ = mixture(POLICIES, self.objectives, weights)
            extra = {"extra_args": {EXTRA_ARG: chosen.model_dump_json()}}
            salt = {"cache_salt": chosen.cache_salt()}
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **extra)
        start = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": ids, **salt} for ids in prompts], params, use_tqdm=False)
        return time.perf_counter() - start

    def cache_bytes_per_token(self) -> int:
        (specs,) = self.llm.collective_rpc("get_kv_cache_spec")
        return sum(spec.page_size_bytes // spec.block_size for spec in specs.values())

    def adapter_values(self) -> int:
        (count,) = self.llm.apply_model(_adapter_values)
        return cast("int", count)


def _adapter_values(model: Any) -> int:
    (resident,) = model.mixture_batch.residents.sets.values()
    return sum(delta.a.numel() + delta.b.numel() for delta in resident.deltas.values())


class Published:
    """The published method: transformers, the adapters in turn for every token, one request at a time."""

    def __init__(self, base: Path, adapters: list[Path], threads: int) -> None:
        from sipo.decoding.reference import ReferenceDecoder

        torch.set_num_threads(threads)
        self.decoder = ReferenceDecoder(
            base, {folder.name: folder for folder in adapters}, device="cuda" if torch.cuda.is_available() else "cpu"
        )

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        weights = {name: 1 / len(self.decoder.objectives) for name in self.decoder.objectives}
        start = time.perf_counter()
        for ids in prompts:
            self.decoder.generate(ids, weights, max_tokens=tokens)
        return time.perf_counter() - start


class Process:
    """A contestant in a process of its own: `ask("seconds", …)` calls its method there."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def ask(self, method: str, *args: Any) -> Any:
        self._connection.send((method, args))
        failed, result = self._connection.recv()
        if failed:
            raise RuntimeError(result)
        return result

    @classmethod
    @contextmanager
    def start(cls, contestant: Callable[..., Any], *args: Any) -> Iterator[Process]:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, contestant, args))
        process.start()
        try:
            self = cls(ours)
            self.ask("__class__")
            yield self
        finally:
            ours.send(None)
            process.join(60)
            process.kill()


def _serve(connection: Connection, contestant: Callable[..., Any], args: tuple[Any, ...]) -> None:
    made: Any = None
    while call := connection.recv():
        try:
            made = made or contestant(*args)
            method, arguments = call
            result = None if method == "__class__" else getattr(made, method)(*arguments)
            connection.send((False, result))
        except Exception as error:
            connection.send((True, repr(error)))


class Server:
    """The decoder's HTTP service, asked by streaming clients in this process."""

    def __init__(self, decoder: ServedDecoder) -> None:
        self.url = decoder.url

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        return asyncio.run(self._seconds(prompts, tokens))

    async def _seconds(self, prompts: list[list[int]], tokens: int) -> float:
        body = {"model": "bench", "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:

            async def stream(ids: list[int]) -> None:
                url = f"{self.url}/v1/completions"
                async with client.stream("POST", url, json=body | {"prompt": ids}) as reply:
                    assert reply.status_code == 200, await reply.aread()
                    events = [line async for line in reply.aiter_lines() if line]
                    assert events[-1] == "data: [DONE]"

            start = time.perf_counter()
            await asyncio.gather(*map(stream, prompts))
            return time.perf_counter() - start


@contextmanager
def served(base: Path, folder: Path, adapters: list[Path]) -> Iterator[Server]:
    """With the settings that a user gets."""
    with ServedDecoder.start(base, folder, SIPO_DECODER_DTYPE="auto") as decoder:
        draft = Draft(
            name="bench",
            base=BaseModelRef(name=BUNDLED_MODEL, sha256=model_sha256(base, CACHE)),
            prompt_format=PromptFormat.of(decoder.tokenizer),
            objectives=[adapter.name for adapter in adapters],
            beta=0.1,
        )
        decoder.store.publish(draft, {adapter.name: adapter for adapter in adapters}, base, activate=True)
        yield Server(decoder)


# The comparison


def median_ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def base_values(base: Path) -> int:
    count = 0
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                size = 1
                for length in file.get_slice(key).get_shape():
                    size *= length
                count += size
    return count


def compare(rounds: int, threads: int) -> list[Figure]:
    base = resolve_model(BUNDLED_MODEL, CACHE)
    prompts = Prompts()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        adapters = [random_adapter(base, folder / name, seed=i, rank=RANK, scale=0.02) for i, name in enumerate(OBJECTIVES)]
        two = adapters[:2]
        plain = stack.enter_context(Process.start(Engine, base, [], threads))
        mod2 = stack.enter_context(Process.start(Engine, base, two, threads))
        mod4 = stack.enter_context(Process.start(Engine, base, adapters, threads))
        published = stack.enter_context(Process.start(Published, base, two, threads))
        (folder / "server").mkdir()
        server = stack.enter_context(served(base, folder / "server", two))

        def warm_up() -> None:
            for engine in (plain, mod2, mod4):
                engine.ask("seconds", prompts(STREAMS), 8)
            published.ask("seconds", prompts(1), 4)
            server.seconds(prompts(STREAMS), 8)

        warm_up()
        times: dict[str, list[float]] = {}
        for number in range(rounds):
            for batch in (1, 8, STREAMS):
                for name, engine in (("plain", plain), ("mod2", mod2)):
                    times.setdefault(f"{name} {batch}", []).append(engine.ask("seconds", prompts(batch), TOKENS))
            times.setdefault("mod4 1", []).append(mod4.ask("seconds", prompts(1), TOKENS))
            times.setdefault("server 32", []).append(server.seconds(prompts(STREAMS), TOKENS))
            times.setdefault("published 1", []).append(published.ask("seconds", prompts(1), TOKENS))
            (long,) = prompts(1, LONG_PROMPT)
            times.setdefault("uncached", []).append(mod2.ask("seconds", [long], 1, 0.3))
            times.setdefault("cached", []).append(mod2.ask("seconds", [long], 1, 0.8))
            print(f"round {number + 1} of {rounds}", {name: round(values[-1], 3) for name, values in times.items()}, flush=True)

        def speed(name: str) -> float:
            return int(name.split()[1]) * TOKENS / statistics.median(times[name])

        bars = {1: 0.75, 8: 0.66, STREAMS: 0.53}
        figures = [Figure(f"tokens a second, {name}", speed(name), "1/s") for name in times if name[-1].isdigit()]
        figures += [
            Figure(
                f"MOD of 2 over one model, {batch} requests", median_ratio(times[f"plain {batch}"], times[f"mod2 {batch}"]), "", bar
            )
            for batch, bar in bars.items()
        ]
        at_batch_one = [STREAMS * seconds for seconds in times["published 1"]]
        figures += [
            Figure("MOD of 4 over one model, 1 request", median_ratio(times["plain 1"], times["mod4 1"]), "", 0.60),
            Figure("over the published method, 32 requests", median_ratio(at_batch_one, times["mod2 32"]), "times", 30),
            Figure("over HTTP against in process, 32 streams", median_ratio(times["mod2 32"], times["server 32"]), "", 0.62),
            Figure("first token, prefix cached under another weight", median_ratio(times["uncached"], times["cached"]), "times", 5),
            Figure("adapters' share of the weights", 100 * mod2.ask("adapter_values") / base_values(base), "%", 5, at_most=True),
        ]
        cache = [engine.ask("cache_bytes_per_token") for engine in (plain, mod2, mod4)]
        figures += [
            Figure(f"KV cache per token, {slots} slots over one", size / cache[0], "times", slots, at_most=True)
            for slots, size in ((2, cache[1]), (4, cache[2]))
        ]
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    threads = os.cpu_count() or 1
    how = f"compiled, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "eager"
    machine = f"{platform.machine()}, {threads} cores, {how}, SmolLM2-135M, {rounds} rounds"
    report("decode", machine, compare(rounds, threads))


if __name__ == "__main__":
    main()
