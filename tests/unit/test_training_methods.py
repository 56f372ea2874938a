"""The methods' data and losses, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sipo.errors import InvalidWeights
from sipo.preferences import Example
from sipo.training.losses import nll_per_response, opposing_weight_term
from sipo.training.methods import lw_pairs, modpo_margins
from sipo.training.settings import Margin


def test_the_nll_of_equation_8_is_a_mean_per_response() -> None:
    log_probs = torch.tensor([[0.0, -1.0, -3.0, 0.0], [-5.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    assert nll_per_response(log_probs, mask).item() == pytest.approx((2 + 5) / 2)  # a mean per token would be 3


def test_the_opposing_weight_makes_the_weighted_loss_of_both_orders() -> None:
    margins, opposing = torch.tensor([0.3, -1.2]), torch.tensor([0.0, 0.4])

    def loss(margin: float) -> float:
        return math.log(1 + math.exp(-margin))

    wanted = (loss(0.3) + 0.6 * loss(-1.2) + 0.4 * loss(1.2)) / 2
    ours = torch.nn.functional.softplus(-margins).mean() + opposing_weight_term(margins, opposing)
    assert ours.item() == pytest.approx(wanted)


def test_lw_pairs_are_oriented_by_the_heavier_side_of_any_number_of_objectives() -> None:
    examples = [
        Example(prompt="a", response_0="a0", response_1="a1", labels={"x": 1, "y": 0, "z": 0}),
        Example(prompt="b", response_0="b0", response_1="b1", labels={"x": 0, "y": 0}),
        Example(prompt="c", response_0="c0", response_1="c1", labels={"y": 1}),
        Example(prompt="d", response_0="d0", response_1="d1", labels={"x": 1, "y": 0}),
        Example(prompt="e", response_0="e0", response_1="e1", labels={"w": 1}),
    ]
    pairs = list(lw_pairs(examples, {"x": 0.25, "y": 0.5, "z": 0.25}))
    assert [(pair["prompt"], pair["chosen"]) for pair in pairs] == [("a", "a0"), ("b", "b0"), ("c", "c1"), ("d", "d0")]
    assert [pair["opposing_weight"] for pair in pairs] == pytest.approx([0.25, 0, 0, 1 / 3])
    one_sided = list(lw_pairs(examples, {"x": 1.0, "y": 0.0, "z": 0.0}))
    assert [(pair["chosen"], pair["opposing_weight"]) for pair in one_sided] == [("a1", 0), ("b0", 0), ("d1", 0)]


def test_modpos_margins_are_the_other_objectives_that_have_a_weight() -> None:
    adapters = {name: Path(name) for name in "xyz"}
    weights = {"x": 0.4, "y": 0.6, "z": 0.0}
    assert modpo_margins(weights, "x", adapters) == [Margin(adapter=Path("y"), weight=0.6)]
    with pytest.raises(InvalidWeights, match="divides by the weight of 'z'"):
        modpo_margins(weights, "z", adapters)
