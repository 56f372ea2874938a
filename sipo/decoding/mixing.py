"""The mixing rules of MOD (arXiv 2406.18853) as functions of tensors. They know neither models nor requests.

One rule so far: reverse KL, the paper's default. The rules for other divergences take the same arguments as `reverse_kl` and belong
beside it; they need the log-probabilities of all policies, so `mix_hidden_states` is no help to them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reverse_kl(log_probs: Tensor, weights: Tensor) -> Tensor:
    """The mixture's log-probabilities [..., vocabulary].

    `log_probs` [..., policies, vocabulary] are normalised; `weights` [..., policies] are >= 0 with sum 1. MOD's solution for the
    reverse KL divergence (SIPO Eq. 3) is the weighted geometric mean

        pi(y_t | x, y_<t)  ∝  prod_i pi_i(y_t | x, y_<t) ^ w_i

    A policy of weight 0 has no say, even about tokens that it rules out.
    """
    weighted = torch.where(weights.unsqueeze(-1) > 0, weights.unsqueeze(-1) * log_probs, 0.0)
    return torch.log_softmax(weighted.sum(-2), dim=-1)


def mix_hidden_states(hidden: Tensor, weights: Tensor) -> Tensor:
    """[rows, slots, hidden] final hidden states and [rows, slots] weights to [rows, hidden], of the same type as `hidden`.

    With an unembedding W that all policies share, sum_i w_i (W · h_i) = W · (sum_i w_i h_i): the logits of the result are, up to
    a constant per row, what `reverse_kl` gives, at the price of one unembedding.
    """
    return torch.einsum("rs,rsh->rh", weights, hidden.float()).to(hidden.dtype)
