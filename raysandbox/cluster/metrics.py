"""What the guard's surroundings count, as a Prometheus page.

Labels take values from fixed sets only: what a certificate or call says never
becomes a label, or strangers could make the page grow without end.
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
    generate_latest,
)

from raysandbox.cluster.settings import ROLES

__all__ = ["ALERTS", "Metrics"]

# Every alert that there is.
ALERTS = (
    "unexpected_node", "node_without_admission", "node_not_removed", "node_removed",
    "node_beyond_inventory",
    "odd_call", "reload_failed", "guard_died", "certificate_ends", "certificate_bad",
    "audit_broken", "audit_not_writable", "facts_not_written",
    "no_worker_certificates", "not_told", "unexpected_address", "few_files",
)  # fmt: skip


class Metrics:
    """Counters of one supervisor; they begin at 0 when it starts."""

    def __init__(self) -> None:
        # Twice the lines for what a supervisor's start says once.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=self.registry)

        self.events = counter("rsb_events", "Events that are no calls", "event")
        self.alerts = counter("rsb_alerts", "Alerts", "alert")
        self.handshakes = counter(
            "rsb_handshakes_refused", "TLS handshakes that the guard refused"
        )
        self._calls = counter("rsb_calls", "Calls of the GCS", "role", "ok")
        self._bytes = counter("rsb_bytes", "Bytes of calls, both ways", "role")
        self.expires = gauge(
            "rsb_certificate_expires_timestamp_seconds",
            "When a certificate of this member ends, Unix time",
            "component",
        )
        self.writable = gauge("rsb_audit_writable", "1 while the log can be written")
        self.nodes = gauge("rsb_nodes_alive", "Nodes that the GCS holds alive")
        self.writable.set(1)
        for alert in ALERTS:
            # A series that begins at 1 has no increase that a rule could see.
            self.alerts.labels(alert)

    def call(self, role: str, ok: bool, size: int) -> None:
        """Count one call."""
        role = role if role in ROLES else "other"
        self._calls.labels(role, str(ok).lower()).inc()
        self._bytes.labels(role).inc(size)

    def page(self) -> bytes:
        """Return the page in Prometheus' text format."""
        return generate_latest(self.registry)
