"""The whole system on one machine: which processes there are, in which order they start, and how they find each other.

docker-compose.yml says the same for containers, with the same commands and variables.
"""

from __future__ import annotations

import os
import sys

from services.common.local.processes import free_ports
from services.common.local.supervisor import ProcessSpec
from services.common.settings import CommonSettings

LOCAL = "127.0.0.1"

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""For processes whose tensors come and go on the CPU: memory that glibc keeps need not be mapped and zeroed for each (7 % of a
training step)."""
ENGINE_THREADS = str(max(1, (os.cpu_count() or 1) - 1))
"""Of the decoder on a CPU, which it shares with everything else here."""
NO_KEYS = {"SIPO_TEACHERS": ""}
"""For processes that ask no teacher: an empty variable counts as none."""


def stack_specs(settings: CommonSettings, *, gateway_port: int = 8000) -> list[ProcessSpec]:
    """Queue, decoder, reviewer, scorer, trainer, worker and gateway. The gateway listens on settings.host, all others on this
    machine only, on free ports.

    The queue is embedded, in <data_dir>/queue, unless SIPO_REDIS_URL was given.
    """
    names = ("queue", "decoder", "reviewer", "scorer", "trainer", "worker")
    ports = dict(zip(names, free_ports(len(names)), strict=True)) | {"gateway": gateway_port}
    urls = {name: f"http://{LOCAL}:{port}" for name, port in ports.items()}
    if settings.host not in ("0.0.0.0", "::"):
        urls["gateway"] = f"http://{settings.host}:{gateway_port}"
    external = "redis_url" in settings.model_fields_set
    redis_url = settings.redis_url if external else f"redis://{LOCAL}:{ports['queue']}"
    env = {
        "SIPO_DATA_DIR": str(settings.data_dir),
        "SIPO_CACHE_DIR": str(settings.cache_dir),
        "SIPO_MODEL": settings.model,
        "SIPO_LOG_LEVEL": settings.log_level,
        "SIPO_DECODER_SLEEPS": str(settings.decoder_sleeps),
        "SIPO_REDIS_URL": redis_url,
        "SIPO_DECODER_URL": urls["decoder"],
        "SIPO_REVIEWER_URL": urls["reviewer"],
    }

    threads = os.environ.get("SIPO_DECODER_THREADS", ENGINE_THREADS)

    def service(name: str, module: str, after: tuple[str, ...], **own: str) -> ProcessSpec:
        address = {"SIPO_HOST": settings.host if name == "gateway" else LOCAL, f"SIPO_{name.upper()}_PORT": str(ports[name])}
        secrets = {} if name in ("worker", "gateway") else NO_KEYS
        return ProcessSpec(name, (sys.executable, "-m", module), env | address | secrets | own, f"{urls[name]}/ready", after)

    if external:
        queue: list[ProcessSpec] = []
    else:
        server = (sys.executable, "-m", "services.common.local.valkey", str(settings.data_dir / "queue"), str(ports["queue"]))
        queue = [ProcessSpec("queue", server, ready_url=redis_url)]
    needs_queue = tuple(spec.name for spec in queue)
    # A trainer that goes on with a job may put the decoder to sleep at once, and others wait for the decoder to be ready.
    before_trainer = (*needs_queue, "worker", "gateway") if settings.decoder_sleeps else needs_queue
    return [
        *queue,
        # What takes long to load starts at once; what is quick waits, so that it stops before what it works with.
        service("decoder", "services.decoder", after=(), SIPO_DECODER_THREADS=threads),
        service("reviewer", "services.reviewer", after=()),
        service("scorer", "services.scorer", after=needs_queue, **KEEP_MEMORY),
        service("trainer", "services.trainer", after=before_trainer, **KEEP_MEMORY),
        service("worker", "gateway.worker", after=(*needs_queue, "decoder", "reviewer")),
        service("gateway", "gateway", after=(*needs_queue, "decoder")),
    ]
