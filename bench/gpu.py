"""What mixing needs of a GPU, and what it costs there: `make bench-gpu`.

Four parts, each as far as the machine goes: the deltas on layers of a 7B model's shape, captured in a CUDA graph before the
policies are loaded; the exact reference on the GPU against itself on the CPU; the decoder with compiled graphs against the
reference; and what its engine gives up when it sleeps. Without a GPU all but the second run small, which shows that the script
works and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.report import Figure, report
from sipo.decoding import OfflineDecoder
from sipo.decoding.reference import ReferenceDecoder
from sipo.decoding.request import Entry, mixture
from sipo.decoding.vllm.offline import POLICIES
from sipo.decoding.vllm.residents import Delta, FixedResidents, ResidentSet
from sipo.models import BUNDLED_MODEL, resolve_model
from support.decoder import random_adapter

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
HIDDEN, INTERMEDIATE, LAYERS = (4096, 11008, 8) if GPU else (256, 688, 2)
SHAPES = {
    "qkv_proj": (HIDDEN, 3 * HIDDEN, 3),
    "o_proj": (HIDDEN, HIDDEN, 1),
    "gate_up_proj": (HIDDEN, 2 * INTERMEDIATE, 2),
    "down_proj": (INTERMEDIATE, HIDDEN, 1),
}
SLOTS, RANK, COLUMNS = 2, 16, 64
ROUNDS = 5
TOKENS = 32
PROMPTS = [[1 + (79 * i + 131 * j) % 255 for j in range(24)] for i in range(4)]
FIRST_WEIGHTS = [1.0, 0.7, 0.5, 0.0]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def timed(run: Callable[[], object], repeats: int = 50) -> float:
    """Seconds of one call."""
    for _ in range(3):
        run()
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if GPU:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as one CUDA graph; as it is without a GPU."""
    if not GPU:
        return run
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Layers:
    """The linear layers of a transformer one after the other, without what lies between them, and what each adds to its rows."""

    def __init__(self, requests: int) -> None:
        rows = requests * SLOTS
        self.requests = requests
        shapes = {f"{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES.items()}
        self.weights = {name: random(out, inputs) * inputs**-0.5 for name, (inputs, out, _) in shapes.items()}
        self.residents = FixedResidents(DEVICE, DTYPE, shapes, COLUMNS, rows)
        self.x = {size: random(rows, size) for size in (HIDDEN, INTERMEDIATE)}
        self.outputs: dict[str, Tensor] = {}

    def one_model(self) -> None:
        for weight in self.weights.values():
            linear(self.x[weight.shape[1]][: self.requests], weight)

    def mixed(self) -> None:
        ((whole, coefficients),) = self.residents.place([])
        for name, weight in self.weights.items():
            x = self.x[weight.shape[1]]
            self.outputs[name] = linear(x, weight)
            whole.deltas[name].add(self.outputs[name], x, coefficients)

    def load(self, seed: int) -> ResidentSet:
        """A set of two random policies."""
        torch.manual_seed(seed)
        deltas = {}
        for i in range(LAYERS):
            for name, (inputs, out, parts) in SHAPES.items():
                a = random(parts * 2 * RANK, inputs) * inputs**-0.5
                blocks = [random(2 * RANK, out // parts) for _ in range(parts)]
                deltas[f"{i}.{name}"] = Delta(a, torch.block_diag(*blocks), parts)  # type: ignore[no-untyped-call]
        loaded = ResidentSet((RANK, RANK), deltas)
        self.residents.add(str(seed), loaded)
        return loaded

    def error(self, loaded: ResidentSet, replay: Callable[[], object], key: str) -> float:
        """The largest difference of what a replay computes from float64's, over the largest value: rows are one-hot in turn."""
        entries = [
            Entry(policy_set=key, coefficients=(1.0, 0.0) if i % 2 else (0.0, 1.0), weight=0.5)
            for i in range(self.requests * SLOTS)
        ]
        self.residents.place(self.residents.coefficients(entries))
        replay()
        worst = 0.0
        for name, weight in self.weights.items():
            x, delta = self.x[weight.shape[1]].double(), loaded.deltas[name]
            chosen = torch.zeros(len(x), delta.parts, 2, RANK, device=DEVICE, dtype=torch.float64)
            chosen[1::2, :, 0] = chosen[::2, :, 1] = 1
            exact = x @ weight.double().T + ((x @ delta.a.double().T) * chosen.flatten(1)) @ delta.b.double()
            worst = max(worst, float((self.outputs[name].double() - exact).abs().max() / exact.abs().max()))
        return worst


def layers() -> list[Figure]:
    figures = []
    for requests in (1, 8, 32):
        stack = Layers(requests)
        stack.mixed()
        replay, plain = captured(stack.mixed), captured(stack.one_model)
        # Loaded after the capture, and one of them in the place of another.
        first = stack.load(1)
        error = stack.error(first, replay, "1")
        second = stack.load(2)
        stack.residents.remove("1")
        third = stack.load(3)
        error = max(error, stack.error(second, replay, "2"), stack.error(third, replay, "3"))
        ratios = [timed(plain) / timed(replay) for _ in range(ROUNDS)]
        eager = [timed(stack.one_model) / timed(stack.mixed) for _ in range(ROUNDS)]
        tolerance = 2e-2 if GPU else 1e-5
        figures += [
            Figure(f"layers of one model over layers with deltas, {requests} requests, one graph", statistics.median(ratios), ""),
            Figure(f"the same launched one by one, {requests} requests", statistics.median(eager), ""),
            Figure(
                f"largest error of a graph captured before its policies, {requests} requests", error, "", tolerance, at_most=True
            ),
        ]
    return figures


def reference(base: Path, adapters: dict[str, Path]) -> list[Figure]:
    """Greedy tokens of the reference on the GPU and on the CPU, both in float32."""
    here, there = (ReferenceDecoder(base, adapters, device=device) for device in (DEVICE, torch.device("cpu")))
    equal = 0
    for prompt, first in zip(PROMPTS, FIRST_WEIGHTS, strict=True):
        weights = {"a": first, "b": 1 - first}
        equal += here.generate(prompt, weights, max_tokens=TOKENS) == there.generate(prompt, weights, max_tokens=TOKENS)
    return [Figure(f"reference on {DEVICE.type} as on the CPU", equal, f"of {len(PROMPTS)} answers", len(PROMPTS))]


def decoder(base: Path, adapters: dict[str, Path]) -> list[Figure]:
    """The engine with compiled graphs against the reference, in float32, and its speed over the engine without."""
    exact = ReferenceDecoder(base, adapters, device=DEVICE)
    weights = [{"a": first, "b": 1 - first} for first in FIRST_WEIGHTS]
    expected = [exact.generate(prompt, w, max_tokens=TOKENS) for prompt, w in zip(PROMPTS, weights, strict=True)]
    mixtures = [mixture(POLICIES, ["a", "b"], w)[0] for w in weights]

    def run(compiled: bool) -> tuple[int, float]:
        """Answers equal to the reference's, and the seconds of one batch."""
        with OfflineDecoder(base, adapters, dtype="float32", max_model_len=128, compiled=compiled, ranks=COLUMNS) as engine:

            def generate() -> list[list[int]]:
                return engine.generate_mixtures(PROMPTS, mixtures, temperature=0, max_tokens=TOKENS, ignore_eos=True)

            equal = sum(answer == wanted for answer, wanted in zip(generate(), expected, strict=True))
            return equal, timed(generate, 5)

    (equal_eager, eager), (equal_compiled, compiled) = run(False), run(True)
    return [
        Figure("decoder as the reference, without graphs", equal_eager, f"of {len(PROMPTS)} answers", len(PROMPTS)),
        Figure("decoder as the reference, with graphs", equal_compiled, f"of {len(PROMPTS)} answers", len(PROMPTS)),
        Figure(f"speed with graphs over without, {len(PROMPTS)} requests", eager / compiled, "times"),
    ]


def sleeping(base: Path, adapters: dict[str, Path]) -> list[Figure]:
    """The memory that a sleeping engine gives up, and whether it answers as before once awake, its policies loaded anew."""
    mixtures = [mixture(POLICIES, ["a", "b"], {"a": first, "b": 1 - first})[0] for first in FIRST_WEIGHTS]
    at_start = free_memory()
    with OfflineDecoder(base, adapters, dtype="float32", max_model_len=128, ranks=COLUMNS, enable_sleep_mode=GPU) as engine:

        def generate() -> list[list[int]]:
            return engine.generate_mixtures(PROMPTS, mixtures, temperature=0, max_tokens=TOKENS, ignore_eos=True)

        before, awake = generate(), free_memory()
        engine.unload(POLICIES)
        engine.llm.sleep(level=1)
        asleep = free_memory()
        engine.llm.wake_up()
        engine.load(POLICIES, adapters)
        equal = sum(answer == wanted for answer, wanted in zip(generate(), before, strict=True))
    figures = [Figure("answers as before the engine slept", equal, f"of {len(PROMPTS)} answers", len(PROMPTS))]
    if GPU:
        figures.append(Figure("memory that a sleeping engine gives up", (asleep - awake) / (at_start - awake), "of all it holds"))
    return figures


def free_memory() -> int:
    """Bytes of the GPU."""
    return torch.cuda.mem_get_info()[0] if GPU else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=BUNDLED_MODEL, help="a folder, or a hub name")
    model = parser.parse_args().model
    machine = torch.cuda.get_device_name() if GPU else "no GPU: small shapes on the CPU"
    figures = layers()
    base = resolve_model(model, Path("~/.cache/sipo").expanduser())
    with tempfile.TemporaryDirectory() as folder:
        adapters = {name: random_adapter(base, Path(folder, name), seed=i, rank=RANK, scale=0.02) for i, name in enumerate("ab")}
        if GPU:
            figures += reference(base, adapters)
        if importlib.util.find_spec("vllm"):
            figures += [*decoder(base, adapters), *sleeping(base, adapters)]
        else:
            print("the decoder itself is left out: vLLM is not installed", file=sys.stderr)
    report("gpu", machine, figures)


if __name__ == "__main__":
    main()
