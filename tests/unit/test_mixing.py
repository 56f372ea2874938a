"""The mixing rules against sums worked out independently."""

from __future__ import annotations

import math

import pytest
import torch

from sipo.decoding.mixing import mix_hidden_states, reverse_kl


def test_reverse_kl_is_the_normalised_weighted_geometric_mean() -> None:
    """Two policies over three tokens at w = (0.25, 0.75), by hand: p_i ∝ a_i^0.25 · b_i^0.75."""
    a, b = [0.5, 0.3, 0.2], [0.1, 0.6, 0.3]
    product = [x**0.25 * y**0.75 for x, y in zip(a, b, strict=True)]
    expected = [math.log(value / sum(product)) for value in product]

    mixed = reverse_kl(torch.tensor([a, b], dtype=torch.float64).log(), torch.tensor([0.25, 0.75], dtype=torch.float64))

    assert mixed.tolist() == pytest.approx(expected, abs=1e-12)


def test_reverse_kl_at_a_vertex_is_that_policy_even_where_another_rules_tokens_out() -> None:
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()

    assert torch.allclose(reverse_kl(log_probs, torch.tensor([0.0, 1.0])), log_probs[1])


def test_reverse_kl_rules_out_what_any_weighted_policy_rules_out() -> None:
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()

    mixed = reverse_kl(log_probs, torch.tensor([0.1, 0.9]))

    assert mixed[2] == -math.inf
    assert mixed.exp().sum().item() == pytest.approx(1)


def test_equal_policies_mix_to_themselves_at_any_weights() -> None:
    log_probs = torch.log_softmax(torch.randn(7, generator=torch.Generator().manual_seed(0)), dim=-1).expand(3, 7)

    assert torch.allclose(reverse_kl(log_probs, torch.tensor([0.2, 0.3, 0.5])), log_probs[0], atol=1e-6)


def test_one_unembedding_of_mixed_hidden_states_equals_mixing_the_policies() -> None:
    generator = torch.Generator().manual_seed(0)
    unembedding = torch.randn(50, 8, dtype=torch.float64, generator=generator)
    hidden = torch.randn(4, 3, 8, dtype=torch.float64, generator=generator)
    weights = torch.softmax(torch.randn(4, 3, dtype=torch.float64, generator=generator), dim=-1)

    each = reverse_kl(torch.log_softmax(hidden @ unembedding.T, dim=-1), weights)
    once = torch.log_softmax(mix_hidden_states(hidden.float(), weights.float()).double() @ unembedding.T, dim=-1)

    assert torch.allclose(each, once, atol=1e-4)
