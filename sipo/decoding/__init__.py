"""Multi-objective decoding (MOD, arXiv 2406.18853; SIPO Eq. 3): one token stream from several policies at given preference weights.

mixing      what a mixture is, as functions
request     what one request asks of the decoder
reference   the exact decoder on plain transformers, one forward per policy: slow, obviously right
vllm/       the same inside vLLM, batched; nothing else imports vLLM
"""

from __future__ import annotations

from typing import Literal

Rule = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence", "linear"]
"""How policies are mixed: each is a function of that name in sipo.decoding.mixing. (Here, as it costs no import of torch.)"""
