"""Prometheus metrics: how much, how fast, how full. Nothing in them says who asked, or what."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from danlu.serve.served import Catalogue

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One server's."""

    def __init__(self, catalogue: Catalogue) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter(
            "danlu_requests", "Requests by path and status", ["path", "status"], registry=own
        )
        self.prompt_tokens = Counter("danlu_prompt_tokens", "Tokens of prompts", registry=own)
        self.generated_tokens = Counter("danlu_generated_tokens", "Tokens of answers", registry=own)
        self.answers = Counter("danlu_answers", "Answers by why they ended", ["reason"], registry=own)
        self.pending = Gauge("danlu_answers_pending", "Answers asked for and not yet whole", registry=own)
        self.first_token = Histogram(
            "danlu_time_to_first_token_seconds",
            "From a request to its first token",
            buckets=_SECONDS,
            registry=own,
        )
        self.per_token = Histogram(
            "danlu_time_per_token_seconds",
            "Of an answer's later tokens, each",
            buckets=_TOKEN_SECONDS,
            registry=own,
        )
        self.whole = Histogram(
            "danlu_request_seconds", "From a request to the end of its answer", buckets=_SECONDS, registry=own
        )
        own.register(_Engines(catalogue))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engines:
    """What the engines say of themselves, when they are asked."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

    def collect(self) -> Iterator[Any]:
        named = {
            "danlu_jobs_running": "Jobs that the engine computes",
            "danlu_jobs_waiting": "Jobs that wait for room",
            "danlu_cache_blocks_in_use": "Blocks of keys and values that somebody uses",
            "danlu_cache_blocks_remembered": "Blocks kept for prompts that begin alike",
            "danlu_cache_blocks": "Blocks in all",
            "danlu_packed_bytes": "Copies of the weights that are computed with",
        }
        found = {name: GaugeMetricFamily(name, told, labels=["model"]) for name, told in named.items()}
        for served in self.catalogue.models:
            if served.adapter is not None:
                continue
            scheduler = served.engine.scheduler
            blocks = scheduler.lanes[0].tables.blocks
            values = (
                len(scheduler.running),
                len(scheduler.waiting),
                blocks.in_use,
                len(blocks.idle),
                blocks.n_blocks,
                served.engine.packing.n_bytes,
            )
            for family, value in zip(found.values(), values, strict=True):
                family.add_metric([served.name], value)
        yield from found.values()

    def describe(self) -> list[Any]:
        return []
