"""What runs on this machine's nodes, and what jobs store, as a Prometheus page.

For the textfile collector of whatever scrapes the machine: the proxy in front of the
object store is no process of Ray's, and has no way into Ray's own metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from raysandbox.observe import live, nodes, stores

__all__ = ["page"]

_OF_JOB = ("node", "job")


class _Machine(Collector):
    def collect(self) -> Iterator[Metric]:
        yield from _of_stores()
        counts = Counter(
            (row.kind, row.node, row.profile, row.state)
            for row in live.rows()
            if row.kind != "job"
        )
        yield _gauge(
            "raysandbox_workers",
            "Workers that raylet started; outside: not in the sandbox.",
            ("node", "state"),
            {(n, s): c for (kind, n, _, s), c in counts.items() if kind == "worker"},
        )
        yield _gauge(
            "raysandbox_jails",
            "Jails that have had a call.",
            ("node", "profile", "state"),
            {(n, p, s): c for (kind, n, p, s), c in counts.items() if kind == "jail"},
        )


def _of_stores() -> Iterator[Metric]:
    held: dict[tuple[str, ...], stores.Held] = {}
    ended: dict[tuple[str, ...], int] = {}
    for node in nodes.nodes():
        store = stores.look(node)
        held |= {(node.node, job): each for job, each in store.jobs.items()}
        if store.ended is not None:
            ended[(node.node,)] = store.ended
    for name, text, field in (
        ("stored_bytes", "Bytes that a job has in the object store.", "bytes"),
        ("stored_objects", "Objects that a job has there.", "objects"),
        ("store_limit_bytes", "Bytes that its quota allows.", "most_bytes"),
        ("store_limit_objects", "Objects that its quota allows.", "most_objects"),
    ):
        values = {key: getattr(each, field) for key, each in held.items()}
        yield _gauge(
            f"raysandbox_job_{name}",
            text,
            _OF_JOB,
            {key: value for key, value in values.items() if value is not None},
        )
    yield _counter(
        "raysandbox_job_store_refusals",
        "Objects that a job's quota refused.",
        _OF_JOB,
        {key: each.refused for key, each in held.items()},
    )
    yield _counter(
        "raysandbox_store_connections_ended",
        "Connections of workers that broke a rule of Ray's local protocols.",
        ("node",),
        ended,
    )


def _gauge(
    name: str, text: str, labels: tuple[str, ...], values: dict[tuple[str, ...], int]
) -> Metric:
    metric = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        metric.add_metric(key, value)
    return metric


def _counter(
    name: str, text: str, labels: tuple[str, ...], values: dict[tuple[str, ...], int]
) -> Metric:
    metric = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        metric.add_metric(key, value)
    return metric


def page() -> bytes:
    """Return the page in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Machine())
    return generate_latest(registry)
