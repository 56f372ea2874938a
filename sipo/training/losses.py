"""The parts of our losses that TRL's DPO loss does not have, as pure functions of log-probabilities.

With m = beta · [log pi(y_c)/pi_ref(y_c) − log pi(y_l)/pi_ref(y_l)] and ℓ(m) = −log sigmoid(m), TRL computes mean ℓ(m) (Eq. 2);
what is added to it here makes

    Eq. 8     ℓ(m) + alpha · (−log pi(y_c|x) / |y_c|)              the second term per response, not per token of the batch
    DPO LW    W · ℓ(m) + (1 − W) · ℓ(−m)  =  ℓ(m) + (1 − W) · m    W: the weights of the objectives that prefer y_c

MODPO needs nothing here: it is Eq. 2 with another beta and another reference (sipo.training.methods).
"""

from __future__ import annotations

from torch import Tensor


def nll_per_response(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Mean over responses of −log pi(y|x) / |y|. log_probs [responses, length], mask 1 where a response's token is predicted."""
    per_response = (log_probs * mask).sum(dim=1) / mask.sum(dim=1)
    return -per_response.mean()


def opposing_weight_term(margins: Tensor, opposing: Tensor) -> Tensor:
    """Mean over pairs of (1 − W) · m. margins m [pairs], with beta; opposing 1 − W [pairs]."""
    return (opposing * margins).mean()
