"""`sipo generate`: one answer, streamed to the terminal, at the caller's preference weights."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from gateway.cli.client import DEFAULT_URL, Gateway, GatewayUrl
from gateway.cli.console import complaints, console
from sipo.errors import InvalidRequest
from sipo.preferences import format_weights, parse_weights


def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from standard input.")],
    *,
    weights: Annotated[str | None, typer.Option("--weights", "-w", help="helpful=0.7,harmless=0.3; default: uniform.")] = None,
    model: Annotated[str | None, typer.Option(help="NAME, NAME:VERSION, or base. Default: the only policy.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="mod (the policies mixed; default), soup (merged), one objective's name, or base.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token each time.")] = 0.7,
    seed: Annotated[int | None, typer.Option(help="For the same answer twice.")] = None,
    url: GatewayUrl = DEFAULT_URL,
) -> None:
    """Answer a prompt at the given preference weights.

    Examples:

      sipo generate -w concise=0.7,warm=0.3 "How do I boil an egg?"

      sipo generate --model demo:1 --mode soup - <question.txt
    """
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode(errors="replace").strip() if sys.stdin else ""
    if not prompt:
        raise InvalidRequest("the prompt is empty: write what to answer, or give - and the prompt on standard input")
    preferences = parse_weights(weights, param="--weights") if weights else None
    gateway = Gateway(url)
    body: dict[str, Any] = {
        "model": model or _only_policy(gateway),
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    body |= {} if seed is None else {"seed": seed}
    body |= {} if mode is None else {"mode": mode}
    body |= {} if preferences is None else {"preference_weights": preferences}
    chunk: dict[str, Any] = {}
    for chunk in gateway.stream_chat(body):
        for choice in chunk["choices"]:
            console.print(choice["delta"].get("content") or "", end="", markup=False)
    console.print()
    if chunk.get("policy_set") and chunk.get("preference_weights"):
        complaints.print(f"{chunk['policy_set']} at {format_weights(chunk['preference_weights'])}", style="dim", markup=False)


def _only_policy(gateway: Gateway) -> str:
    models = gateway.get("/v1/models")["data"]
    names: list[str] = [model["id"] for model in models if model.get("objectives") and ":" not in model["id"]]
    if len(names) != 1:
        known = f"there are {', '.join(names)}" if names else "there are no policies yet, only `--model base`"
        raise InvalidRequest(f"name a model with --model: {known}")
    return names[0]
