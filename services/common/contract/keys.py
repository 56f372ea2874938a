"""What things are called in Redis, and how much a stream holds. services.common.queue and the stores of services.common.contract
alone read and write there; others name a stream to them."""

from __future__ import annotations

PROMPTS = "sipo:prompts"
CANDIDATES = "sipo:candidates"
DECISIONS = "sipo:decisions"
STREAMS = (PROMPTS, CANDIDATES, DECISIONS)

JOBS = "sipo:jobs"  # sorted set of job ids by time of creation
EVALUATIONS = "sipo:evaluations"  # the same of evaluations
MACHINE = "sipo:machine"  # that of the trainer, as it told it last
CAPACITY = 256  # messages in a stream; a message of candidates has some 20 kB
GROUP = "sipo"  # one group a stream: what it has handled is deleted


def dead(stream: str) -> str:
    return f"{stream}:dead"


def job_key(job: str) -> str:
    """A job's hash: JSON values by field, `state` and the counts (see count_field) plain."""
    return f"sipo:job:{job}"


def evaluation_key(evaluation: str) -> str:
    """An evaluation's hash: JSON values by field, `state` plain."""
    return f"sipo:evaluation:{evaluation}"


def count_field(round_: int | str, name: str) -> str:
    """Counts are kept by round, so that a new round begins at 0. `queued` is also the round's feed cursor."""
    return f"count:{round_}:{name}"


def lease_keys(name: str) -> tuple[str, str]:
    """(who holds it: a token; the last token given)"""
    return f"sipo:lease:{name}", f"sipo:lease:{name}:token"
