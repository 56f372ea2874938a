"""The paper's methods as transformations of data before one trainer.

    DPO per objective (Eq. 2)   alignment_pairs                          one policy per objective, mixed when decoding
    DPO soups                   the same, merged at w (sipo.lora)        one model per w
    DPO LW                      lw_pairs                                 one policy per w
    MODPO                       alignment_pairs of k, modpo_margins      one policy per w
    SIPO (Eq. 8)                pareto_rows, by a preference design      from the current policies, themselves frozen as reference

DPO LW weights each objective's loss by its w on the same pairs: W · ℓ(m) + (1 − W) · ℓ(−m), W of the objectives that prefer y_c.
MODPO trains objective k with the other objectives' frozen policies as margins:

    −log sigmoid( 1/w_k · [ beta · Δ log pi/pi_ref − Σ_{i≠k} w_i · Δ r_i ] ),   r_i = beta_i · log pi_i/pi_ref,   Δ = y_c minus y_l

which is Eq. 2 with beta/w_k and the reference log pi_ref + Σ_{i≠k} w_i · beta_i/beta · (log pi_i − log pi_ref).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sipo.conversation import as_json
from sipo.errors import InvalidWeights
from sipo.preferences import Example, Weights
from sipo.training.data import TrainingPair
from sipo.training.settings import Margin


def lw_pairs(examples: Iterable[Example], weights: Weights) -> Iterator[TrainingPair]:
    """DPO LW: the examples that carry an objective with a weight, each oriented as its heavier side prefers (of equal ones as
    response_1). Objectives without a label here count as if they had no weight: a pair with few labels counts as much as others."""
    for example in examples:
        labelled = {name: weights[name] for name in example.labels if weights.get(name, 0) > 0}
        total = sum(labelled.values())
        if not total:
            continue
        prefer_1 = sum(weight for name, weight in labelled.items() if example.labels[name] == 1) / total
        chosen, rejected = (example.response_1, example.response_0) if prefer_1 >= 0.5 else (example.response_0, example.response_1)
        yield TrainingPair(
            prompt=as_json(example.prompt), chosen=chosen, rejected=rejected, opposing_weight=min(prefer_1, 1 - prefer_1)
        )


def modpo_margins(weights: Weights, objective: str, adapters: Mapping[str, Path], *, beta_ratio: float = 1.0) -> list[Margin]:
    """MODPO for `objective` at `weights`: the policies of the other objectives that have a weight. `beta_ratio`: the beta that
    those were trained with over that of the run.

    Raises InvalidWeights if the objective itself has none: the loss divides by it.
    """
    if weights[objective] <= 0:
        raise InvalidWeights(f"MODPO divides by the weight of {objective!r}: it must be above 0, train another objective")
    others = {name: weight for name, weight in weights.items() if name != objective and weight > 0}
    return [Margin(adapter=adapters[name], weight=weight * beta_ratio) for name, weight in others.items()]
