"""Multi-objective decoding: one next-token distribution from several policies, at a weight that each request chooses.

OfflineDecoder  the decoder on a list of prompts and weights, without any service
mixing          the mixing rules of the MOD paper, as functions of tensors
request         what one request asks of the decoder
reference       the exact decoder on plain transformers, one forward per policy: slow, obviously right
vllm/           the same inside vLLM, batched; nothing else imports vLLM
"""

from sipo.decoding.vllm.offline import OfflineDecoder, Response

__all__ = ["OfflineDecoder", "Response"]
