"""Prometheus metrics under vLLM's names, so that its dashboards work with the prefix changed to `hybrid:`.

Gauges and counters of the engine are read from the bridge when scraped; what only the REST side sees is observed as it
happens. The one label value that is not from a closed set here is the operator's own model name.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.bridge import EngineBridge

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REASONS = ("stop", "length", "tool_calls", "abort", "error")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_TOKENS = (1, 10, 100, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, bridge: EngineBridge, model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(bridge, model))
        self._ended = self._counter("request_success", "Sequences that ended", model, "finished_reason")
        for reason in REASONS:
            self._ended.labels(model, reason)
        self._first = self._histogram("time_to_first_token_seconds", "Request to first token", model, _SECONDS)
        self._next = self._histogram("inter_token_latency_seconds", "Between two tokens", model, _TOKEN_SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "Request to last token", model, _SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a sequence", model, _TOKENS)
        self._model = model

    def text(self) -> bytes:
        """The exposition, in Prometheus text format."""
        return generate_latest(self._registry)

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        """A sequence got its first token."""
        self._first.observe(seconds)
        self._prompt.observe(prompt_tokens)

    def next_token(self, seconds: float) -> None:
        """A sequence got another token."""
        self._next.observe(seconds)

    def sequence_ended(self, reason: str) -> None:
        """One sequence ended; `reason` is one of REASONS."""
        self._ended.labels(self._model, reason).inc()

    def reply_ended(self, seconds: float) -> None:
        """A whole reply ended, however it did."""
        self._whole.observe(seconds)

    def _counter(self, name: str, text: str, model: str, label: str) -> Counter:
        return Counter(f"hybrid:{name}", text, ["model_name", label], registry=self._registry)

    def _histogram(self, name: str, text: str, model: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"hybrid:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
        return made.labels(model)


class _EngineCollector(Collector):
    """The engine's own numbers, as the last step's message brought them."""

    def __init__(self, bridge: EngineBridge, model: str) -> None:
        self._bridge = bridge
        self._model = model

    def collect(self) -> Iterable[Metric]:
        stats = self._bridge.stats
        usage = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        yield self._gauge("num_requests_running", "Sequences that hold pages", stats.running)
        yield self._gauge("num_requests_waiting", "Sequences queued in the engine", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the key-value pages in use, 0 to 1", usage)
        yield self._gauge("kv_device_pages_used", "Key-value pages on the device that requests hold", stats.pages_used)
        yield self._gauge("kv_ram_pages_used", "Key-value pages in RAM that hold a known prefix", stats.ram_pages_used)
        yield self._gauge("engine_ready", "1 while the model answers", float(self._bridge.phase == "ready"))
        yield self._counter("num_preemptions", "Sequences put back because pages ran out", stats.preemptions)
        yield self._counter("prompt_tokens", "Prompt tokens processed", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated", stats.generated_tokens)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in shared pages", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in shared pages", stats.prefix_hits)
        yield self._counter("kv_pages_demoted", "Key-value pages copied from the device to RAM", stats.demoted)
        yield self._counter("kv_pages_promoted", "Key-value pages copied from RAM to the device", stats.promoted)
        yield self._counter("prefix_ram_hits", "Tokens found in RAM instead of being computed again", stats.ram_hits)
        yield self._counter("engine_steps", "Engine steps", stats.steps)
        yield self._counter("engine_step_seconds", "Time spent in engine steps", stats.step_seconds)
        yield self._counter("expert_bytes", "Bytes of routed experts read", stats.expert_bytes)
        yield self._counter("distinct_experts", "Distinct experts per layer and step, summed", stats.distinct_experts)
        yield self._counter("engine_restarts", "Times the engine was started again", self._bridge.restarts)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"hybrid:{name}", text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"hybrid:{name}", text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family
