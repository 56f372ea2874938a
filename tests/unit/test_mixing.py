"""The mixing rules against the equation that they come from, solved numerically in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from sipo.decoding.mixing import alpha_divergence, forward_kl, jensen_shannon, linear, mix_hidden_states, reverse_kl

Distribution = Sequence[float]

ALPHA = 0.3

GRADIENTS: dict[str, Callable[[float], float]] = {
    "reverse_kl": lambda x: math.log(x) + 1,
    "forward_kl": lambda x: -1 / x,
    "alpha_divergence": lambda x: (1 - x**-ALPHA) / ALPHA,
    "jensen_shannon": lambda x: math.log(2 * x / (1 + x)),
}
"""grad f of each divergence."""

EQUATION = list(GRADIENTS)


def solved(rule: str, policies: Sequence[Distribution], weights: Sequence[float], reference: Distribution) -> list[float]:
    """pi_ref (grad f)^-1(sum_i w_i grad f(pi_i / pi_ref)), normalised; the inverse by bisection on a logarithm."""
    gradient = GRADIENTS[rule]
    values = []
    for token, base in enumerate(reference):
        target = sum(w * gradient(policy[token] / base) for policy, w in zip(policies, weights, strict=True) if w > 0)
        low, high = -60.0, 60.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if gradient(math.exp(middle)) < target else (low, middle)
        values.append(base * math.exp(low))
    return [value / sum(values) for value in values]


def mix(rule: str, log_probs: Tensor, weights: Tensor, reference: Tensor) -> Tensor:
    rules = {
        "reverse_kl": reverse_kl,
        "forward_kl": forward_kl,
        "alpha_divergence": partial(alpha_divergence, alpha=ALPHA),
        "jensen_shannon": partial(jensen_shannon, reference=reference),
        "linear": linear,
    }
    return rules[rule](log_probs, weights)


def random_distributions(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    values = scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.log_softmax(values, dim=-1)


@pytest.mark.parametrize("rule", EQUATION)
@pytest.mark.parametrize("weights", [(0.25, 0.75), (0.5, 0.5), (0.2, 0.3, 0.5), (1.0, 0.0), (0.0, 0.4, 0.6)])
def test_each_rule_solves_its_divergences_equation(rule: str, weights: tuple[float, ...]) -> None:
    for seed in range(5):
        log_probs = random_distributions(len(weights), 11, seed=seed)
        reference = random_distributions(11, seed=100 + seed)

        mixed = mix(rule, log_probs, torch.tensor(weights, dtype=torch.float64), reference)

        expected = solved(rule, log_probs.exp().tolist(), weights, reference.exp().tolist())
        assert mixed.exp().tolist() == pytest.approx(expected, abs=1e-10)


def test_reverse_kl_by_hand() -> None:
    """Two policies over three tokens at w = (0.25, 0.75): p ∝ a^0.25 · b^0.75."""
    a, b = [0.5, 0.3, 0.2], [0.1, 0.6, 0.3]
    product = [x**0.25 * y**0.75 for x, y in zip(a, b, strict=True)]
    expected = [math.log(value / sum(product)) for value in product]

    mixed = reverse_kl(torch.tensor([a, b], dtype=torch.float64).log(), torch.tensor([0.25, 0.75], dtype=torch.float64))

    assert mixed.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("alpha, neighbour", [(1e-7, reverse_kl), (1 - 1e-7, forward_kl)])
def test_alpha_divergence_lies_between_the_two_kl_rules(alpha: float, neighbour: Callable[[Tensor, Tensor], Tensor]) -> None:
    log_probs, weights = random_distributions(2, 9), torch.tensor([0.3, 0.7], dtype=torch.float64)

    assert torch.allclose(alpha_divergence(log_probs, weights, alpha), neighbour(log_probs, weights), atol=1e-5)


@pytest.mark.parametrize("rule", [*EQUATION, "linear"])
def test_a_vertex_is_that_policy_even_where_another_rules_tokens_out(rule: str) -> None:
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()
    reference = torch.tensor([0.3, 0.3, 0.4]).log()

    assert torch.allclose(mix(rule, log_probs, torch.tensor([0.0, 1.0]), reference), log_probs[1], atol=1e-6)


@pytest.mark.parametrize("rule", [*EQUATION, "linear"])
def test_what_a_policy_with_weight_rules_out_stays_ruled_out(rule: str) -> None:
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()

    mixed = mix(rule, log_probs, torch.tensor([0.1, 0.9]), torch.tensor([0.3, 0.3, 0.4]).log())

    assert mixed[2] == -math.inf
    assert mixed.exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("rule", [*EQUATION, "linear"])
def test_equal_policies_mix_to_themselves_at_any_weights(rule: str) -> None:
    log_probs = random_distributions(7).expand(3, 7)

    mixed = mix(rule, log_probs, torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), random_distributions(7, seed=1))

    assert torch.allclose(mixed, log_probs[0], atol=1e-12)


@pytest.mark.parametrize("rule", [*EQUATION, "linear"])
def test_float32_holds_where_probabilities_are_far_too_small_for_it(rule: str) -> None:
    """Ratios of e^±200 overflow as numbers; as logarithms they are harmless."""
    log_probs = random_distributions(2, 50, scale=80.0)
    reference = random_distributions(50, seed=1, scale=80.0)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)

    exact = mix(rule, log_probs, weights, reference)
    mixed = mix(rule, log_probs.float(), weights.float(), reference.float())

    assert torch.isfinite(mixed).all()
    assert torch.allclose(mixed.double(), exact, rtol=1e-5, atol=1e-4)


def test_jensen_shannon_keeps_what_the_reference_rules_out_ruled_out() -> None:
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]]).log()
    reference = torch.tensor([0.5, 0.0, 0.5]).log()

    mixed = jensen_shannon(log_probs, torch.tensor([0.5, 0.5]), reference)

    assert mixed.exp().tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_linear_takes_negative_coefficients_and_any_sum() -> None:
    """Proxy tuning: base + (expert - anti-expert), over three tokens by hand."""
    base, expert, anti = [0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]
    product = [b * e / a for b, e, a in zip(base, expert, anti, strict=True)]

    mixed = linear(torch.tensor([base, expert, anti], dtype=torch.float64).log(), torch.tensor([1.0, 1.0, -1.0]).double())

    assert mixed.exp().tolist() == pytest.approx([value / sum(product) for value in product], abs=1e-12)


def test_linear_keeps_ruled_out_what_a_model_of_negative_coefficient_rules_out() -> None:
    log_probs = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.8, 0.0]]).log()

    mixed = linear(log_probs, torch.tensor([1.5, -0.5]))

    assert mixed[2] == -math.inf
    assert mixed.exp().sum().item() == pytest.approx(1)


def test_one_unembedding_of_mixed_hidden_states_equals_mixing_the_policies() -> None:
    generator = torch.Generator().manual_seed(0)
    unembedding = torch.randn(50, 8, dtype=torch.float64, generator=generator)
    hidden = torch.randn(4, 3, 8, dtype=torch.float64, generator=generator)
    weights = torch.softmax(torch.randn(4, 3, dtype=torch.float64, generator=generator), dim=-1)
    log_probs = torch.log_softmax(hidden @ unembedding.T, dim=-1)

    for rule, coefficients in ((reverse_kl, weights), (linear, weights - 0.4)):
        each = rule(log_probs, coefficients)
        once = torch.log_softmax(mix_hidden_states(hidden.float(), coefficients.float()).double() @ unembedding.T, dim=-1)
        assert torch.allclose(each, once, atol=1e-4)
