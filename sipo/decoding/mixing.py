"""The mixing rules of MOD (arXiv 2406.18853) as functions of tensors. They know neither models nor requests.

Policies that were aligned with a penalty I_f(pi || pi_ref) for leaving their reference hold their rewards in grad f(pi_i / pi_ref),
so the policy that is optimal for the weighted sum of the rewards is, with Z for the normalisation,

    pi(y_t | x, y_<t) = pi_ref (grad f)^-1( -Z + sum_i w_i grad f(pi_i / pi_ref) )

The rules are this equation for four divergences f, token by token, with Z = 0 inside and one softmax outside, as the paper decodes.
The first three lose pi_ref on the way; Jensen-Shannon keeps it. In all of them

- `log_probs` [..., policies, vocabulary] are normalised, and may be -inf;
- `weights` [..., policies] are >= 0 with sum 1; a policy of weight 0 has no say, even about tokens that it rules out;
- the result [..., vocabulary] are normalised log-probabilities; a token that a policy with weight rules out stays ruled out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sipo.decoding.request import MixingRule

SMALL = -15.0
"""Below this logarithm log(1 + e^d) and e^s - 1 equal their first-order terms in float32; used where the terms underflow."""


def mix(rule: MixingRule, log_probs: Tensor, weights: Tensor, alpha: float | None = None) -> Tensor:
    """The rule of that name; for Jensen-Shannon the first of the policies, of weight 0, is the reference."""
    match rule:
        case "reverse_kl":
            return reverse_kl(log_probs, weights)
        case "forward_kl":
            return forward_kl(log_probs, weights)
        case "jensen_shannon":
            return jensen_shannon(log_probs, weights, log_probs[..., 0, :])
        case "alpha_divergence":
            if alpha is None:
                raise ValueError("alpha_divergence needs alpha")
            return alpha_divergence(log_probs, weights, alpha)
        case "linear":
            return linear(log_probs, weights)


def reverse_kl(log_probs: Tensor, weights: Tensor) -> Tensor:
    """The weighted geometric mean (SIPO Eq. 3), from f(x) = x log x, grad f = log x + 1:

    pi  ∝  prod_i pi_i ^ w_i
    """
    return torch.log_softmax(_weighted_sum(log_probs, weights), dim=-1)


def forward_kl(log_probs: Tensor, weights: Tensor) -> Tensor:
    """The weighted harmonic mean, from f(x) = -log x, grad f = -1 / x:

    pi  ∝  ( sum_i w_i / pi_i ) ^ -1
    """
    return torch.log_softmax(-_log_sum(-log_probs, weights), dim=-1)


def alpha_divergence(log_probs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """A power mean between the geometric (alpha to 0) and the harmonic one (alpha to 1), 0 < alpha < 1, from
    f(x) = (x^(1-alpha) - (1-alpha) x - alpha) / (alpha (alpha - 1)), grad f = (1 - x^-alpha) / alpha:

    pi  ∝  ( sum_i w_i pi_i ^ -alpha ) ^ (-1 / alpha)
    """
    return torch.log_softmax(-_log_sum(-alpha * log_probs, weights) / alpha, dim=-1)


def jensen_shannon(log_probs: Tensor, weights: Tensor, reference: Tensor) -> Tensor:
    """The only rule with the reference's log-probabilities [..., vocabulary], from f(x) = x log x - (x + 1) log((x + 1) / 2),
    grad f = log(2 x / (1 + x)):

    pi  ∝  pi_ref / ( prod_i (1 + pi_ref / pi_i) ^ w_i  -  1 )

    A token that the reference rules out stays ruled out: no penalty lets a policy have it.
    """
    ratios = reference.unsqueeze(-2) - log_probs
    ratios = torch.where(torch.isneginf(reference).unsqueeze(-2), 0.0, ratios)
    log_plus_one = torch.where(ratios < SMALL, ratios, softplus(ratios).log())  # log log(1 + pi_ref / pi_i)
    log_exponent = _log_sum(log_plus_one, weights)  # log of s = sum_i w_i log(1 + pi_ref / pi_i)
    exponent = log_exponent.exp()
    # log(e^s - 1)
    denominator = torch.where(log_exponent < SMALL, log_exponent, exponent + torch.log1p(-torch.exp(-exponent)))
    return torch.log_softmax(reference - denominator, dim=-1)


def linear(log_probs: Tensor, coefficients: Tensor) -> Tensor:
    """prod_i pi_i ^ c_i, normalised, with free coefficients, negative ones too: reward-guided decoding, proxy tuning, contrastive
    decoding and classifier-free guidance are choices of models and coefficients.

    Models of coefficient 0 have no say. A token that any other model rules out stays ruled out, also where its coefficient is
    negative: the product would be infinite.
    """
    ruled_out = (torch.isneginf(log_probs) & (coefficients != 0).unsqueeze(-1)).any(-2)
    return torch.log_softmax(torch.where(ruled_out, -torch.inf, _weighted_sum(log_probs, coefficients)), dim=-1)


def mix_hidden_states(hidden: Tensor, weights: Tensor) -> Tensor:
    """[rows, slots, hidden] final hidden states and [rows, slots] weights to [rows, hidden], of the same type as `hidden`.

    With an unembedding W that all policies share, sum_i w_i (W · h_i) = W · (sum_i w_i h_i): the logits of the result are, up to
    a constant per row, what `reverse_kl` and `linear` give, at the price of one unembedding. The other rules need them all.
    """
    return torch.einsum("rs,rsh->rh", weights, hidden.float()).to(hidden.dtype)


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i v_i over the last dimension but one, where 0 · inf is 0."""
    weights = weights.unsqueeze(-1)
    return torch.where(weights != 0, weights * values, 0.0).sum(-2)


def _log_sum(values: Tensor, weights: Tensor) -> Tensor:
    """log sum_i w_i exp(v_i) over the last dimension but one, where 0 · inf is 0."""
    weights = weights.unsqueeze(-1)
    return torch.where(weights > 0, weights.log() + values, -torch.inf).logsumexp(-2)
