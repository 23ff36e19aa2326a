"""What Prometheus reads: numbers of the engine, and how long clients wait."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .options import MOST_DRAFTS
from .worker import EXPERT_LOAD, Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
GAUGES = {
    "running": ("dslc:num_requests_running", "Requests that the engine computes."),
    "waiting": ("dslc:num_requests_waiting", "Requests that wait for the engine."),
    "kv_cache_usage": ("dslc:kv_cache_usage_perc", "Used share of the cache, from 0 to 1."),
}
COUNTERS = {
    "preemptions": ("dslc:num_preemptions", "Requests that lost their cache to older ones."),
    "prompt_tokens": ("dslc:prompt_tokens", "Tokens of prompts."),
    "cached_tokens": ("dslc:prefix_cache_hits", "Tokens of prompts found in the prefix cache."),
    "generated_tokens": ("dslc:generation_tokens", "Tokens of answers."),
    "steps": ("dslc:engine_steps", "Steps of the engine."),
    "drafts": ("dslc:spec_decode_num_draft_tokens", "Tokens that the MTP module drafted."),
    "accepted_drafts": ("dslc:spec_decode_num_accepted_tokens", "Drafts that were right."),
}
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics(Collector):
    """Counts what the server sees; numbers of the engine are those of the last `render`."""

    def __init__(self) -> None:
        self._stats: Stats = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._finished = Counter(
            "dslc:request_success",
            "Answers that have ended, by reason.",
            ["finished_reason"],
            registry=self._registry,
        )
        self._first = self._seconds("time_to_first_token", "From the request to its first token.")
        self._between = self._seconds("inter_token_latency", "Between two tokens of an answer.")
        self._whole = self._seconds("e2e_request_latency", "From the request to its end.")

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"dslc:{name}_seconds", text, buckets=SECONDS, registry=self._registry)

    def tokens(self, count: int, seconds: float, first: bool) -> None:
        """So many tokens have come, `seconds` after the ones before or after the request."""
        for place in range(count):
            if first and place == 0:
                self._first.observe(seconds)
            else:
                self._between.observe(0.0 if first else seconds / count)

    def ended(self, reason: str, seconds: float) -> None:
        self._finished.labels(reason).inc()
        self._whole.observe(seconds)

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        for key, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=self._stats.get(key, 0))
        for key, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=self._stats.get(key, 0))
        places = CounterMetricFamily(
            "dslc:spec_decode_num_accepted_tokens_per_pos",
            "Drafts that were right, by their place after the known tokens.",
            labels=["position"],
        )
        for place in range(1, MOST_DRAFTS + 1):
            if (count := self._stats.get(f"accepted_drafts_{place}")) is not None:
                places.add_metric([str(place - 1)], count)
        yield places
        loads = GaugeMetricFamily(
            "dslc:expert_load_max_over_mean",
            "Tokens of the rank whose experts have most, over the mean of all ranks, by layer.",
            labels=["layer"],
        )
        for key, value in self._stats.items():
            if key.startswith(EXPERT_LOAD):
                loads.add_metric([key.removeprefix(EXPERT_LOAD)], value)
        yield loads

    def render(self, stats: Stats) -> bytes:
        """The text of /metrics."""
        self._stats = stats
        return generate_latest(self._registry)
