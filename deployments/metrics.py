"""Prometheus metrics of one ingress process, and the replicas' own figures as of the scrape.

Each ingress replica counts what it served; a scrape reaches one of them, so sum over `ingress`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deployments.turn_call import ReplicaStats, TurnDone

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30.0, 60.0, 300.0)


class ServiceMetrics:
    """Counters and histograms of the front; a fresh registry each, so tests may have many."""

    def __init__(self, ingress: str = "0") -> None:
        self._registry = CollectorRegistry()
        self._ingress = ingress
        labels = ("ingress",)

        def counter(name: str, what: str, *more: str) -> Counter:
            return Counter(f"sinkserve_{name}", what, (*labels, *more), registry=self._registry)

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(
                f"sinkserve_{name}", what, labels, registry=self._registry, buckets=_SECONDS
            )

        self._http = counter("http_requests", "HTTP requests answered.", "route", "status")
        self._errors = counter("errors", "Requests that failed, by error code.", "code")
        self._turns = counter("turns", "Turns committed.", "recovery", "finish_reason")
        self._tokens = counter(
            "tokens", "Tokens of committed turns, by what became of them.", "kind"
        )
        self._abandoned = counter(
            "turns_abandoned", "Accepted turns that failed or were cancelled."
        )
        self._called_again = counter(
            "turn_failovers", "Calls of a replica that broke off and were made again.", "code"
        )
        self._first_token = histogram("first_token_seconds", "Call of a replica to first token.")
        self._turn_seconds = histogram("turn_seconds", "Call of a replica to commit.")
        self._running = Gauge(
            "sinkserve_running_turns", "Turns in progress.", labels, registry=self._registry
        )
        # Shown as 0 before the first turn.
        self._running.labels(ingress)
        self._abandoned.labels(ingress)

    def http_request(self, route: str, status: int) -> None:
        self._http.labels(self._ingress, route, str(status)).inc()

    def failed(self, code: str) -> None:
        self._errors.labels(self._ingress, code).inc()

    def turn_started(self) -> None:
        self._running.labels(self._ingress).inc()

    def turn_ended(self) -> None:
        self._running.labels(self._ingress).dec()

    def turn_abandoned(self) -> None:
        self._abandoned.labels(self._ingress).inc()

    def turn_called_again(self, code: str) -> None:
        self._called_again.labels(self._ingress, code).inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.labels(self._ingress).observe(seconds)

    def turn_done(self, done: TurnDone, seconds: float) -> None:
        counts = done.usage
        self._turns.labels(self._ingress, counts.recovery, done.finish_reason).inc()
        self._turn_seconds.labels(self._ingress).observe(seconds)
        for kind, amount in (
            ("input", counts.input_tokens),
            ("output", counts.output_tokens),
            ("prefill", counts.prefill_tokens),
            ("cached", counts.cached_tokens),
        ):
            self._tokens.labels(self._ingress, kind).inc(amount)

    def render(self, replicas: Sequence[ReplicaStats]) -> bytes:
        """The exposition text, CONTENT_TYPE."""
        shown = CollectorRegistry()
        shown.register(_ReplicaCollector(replicas))
        return generate_latest(self._registry) + generate_latest(shown)


class _ReplicaCollector(Collector):
    def __init__(self, replicas: Sequence[ReplicaStats]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("sinkserve_replicas", "Replicas that answered this scrape.")
        up.add_metric([], len(self._replicas))
        yield up
        names = sorted({name for replica in self._replicas for name in replica.values})
        for name in names:
            family = GaugeMetricFamily(
                f"sinkserve_replica_{name}", f"{name} of a replica, as of now.", labels=["replica"]
            )
            for replica in self._replicas:
                if name in replica.values:
                    family.add_metric([replica.replica], replica.values[name])
            yield family
