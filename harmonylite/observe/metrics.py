"""What the daemon counts and measures, and its exposition for Prometheus.

The values are plain numbers, always counted: `status` reads them too, and a node without a Prometheus
endpoint does not pay for prometheus_client (about 2 MB), which is imported by the first `Metrics.render`.

Names are `<namespace>_<subsystem>_<name>`, `<name>` being the attribute of `Metrics`. A counter appears
twice: as `<name>_total`, which is Prometheus' convention and typed as a counter, and as plain `<name>`,
untyped, which is the name that this project promises and that dashboards made for the Go implementation ask
for.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from platform import python_version
from typing import TYPE_CHECKING, Final

from harmonylite import __version__

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

LAG_BUCKETS_S: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0),
)
LOCK_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

_NAME: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class Counter:
    """A number that only grows, from 0 at the start of the process. Safe to use from several threads."""

    def __init__(self, help: str) -> None:
        self.help = help
        self._value = 0
        self._lock = threading.Lock()

    def inc(self, amount: int = 1) -> None:
        """Add `amount`; ValueError when it is negative."""
        if amount < 0:
            raise ValueError(f"a counter cannot go down by {-amount}")
        with self._lock:
            self._value += amount

    @property
    def value(self) -> int:
        """What was counted since the start."""
        return self._value


class Gauge:
    """A number that goes up and down; None as long as nobody knows it, and then it is not exposed."""

    def __init__(self, help: str, initial: float | None = None) -> None:
        self.help = help
        self._read: Callable[[], float | None] = lambda: initial

    def set(self, value: float | None) -> None:
        """The value from now on."""
        self._read = lambda: value

    def set_function(self, read: Callable[[], float | None]) -> None:
        """Ask `read` at every scrape, for what changes by itself, like an age. It must not block."""
        self._read = read

    @property
    def value(self) -> float | None:
        """The value now."""
        return self._read()


class StreamGauge:
    """A gauge for each stream."""

    def __init__(self, help: str) -> None:
        self.help = help
        self._gauges: dict[str, Gauge] = {}

    def labels(self, stream: str) -> Gauge:
        """The gauge of one stream, made on first use."""
        return self._gauges.setdefault(stream, Gauge(self.help))

    def items(self) -> Sequence[tuple[str, Gauge]]:
        """All streams seen so far, each with its gauge."""
        return list(self._gauges.items())


class Histogram:
    """How often values fell into buckets, in seconds. Safe to use from several threads."""

    def __init__(self, help: str, buckets: Sequence[float]) -> None:
        self.help = help
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, seconds: float, count: int = 1) -> None:
        """Count `count` events of this duration.

        Below 0 counts as 0: the time between two nodes' commits is a difference of two clocks.
        """
        seconds = max(0.0, seconds)
        with self._lock:
            self._counts[bisect_left(self._bounds, seconds)] += count
            self._sum += seconds * count

    @property
    def count(self) -> int:
        """Events since the start."""
        return sum(self._counts)

    def cumulative(self) -> tuple[list[tuple[str, int]], float]:
        """Per bound (as text, `+Inf` last) the events up to it, and the sum of all values."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        bounds = [*(repr(bound) for bound in self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(counts), strict=True)), total


class Metrics:
    """Every metric of one daemon as an attribute of the name under which it is exposed.

    `build`: labels of the metric `build_info` beside the versions of HarmonyLite and Python. ValueError when
    namespace or subsystem cannot be part of a metric's name.
    """

    def __init__(
        self,
        namespace: str = "harmonylite",
        subsystem: str = "",
        *,
        build: Mapping[str, str] | None = None,
    ) -> None:
        for part in filter(None, (namespace, subsystem)):
            if not _NAME.fullmatch(part):
                raise ValueError(f"{part!r} cannot be part of a metric's name: use letters, digits and _")
        self._prefix = "".join(f"{part}_" for part in (namespace, subsystem) if part)
        self._build = {"version": __version__, "python": python_version(), **(build or {})}
        self._registry: CollectorRegistry | None = None

        self.published = Counter("Rows published and acknowledged")
        self.pending_publish = Gauge("Rows changed here and not yet acknowledged", 0)
        self.held = Gauge("Of the pending rows, those of transactions that the stream cannot hold", 0)
        self.applied = Counter("Rows received that took effect here")
        self.conflicts = Counter("Rows discarded by a conflict and kept in the conflict log")
        self.parked = Gauge("Received rows that wait because they do not fit this database", 0)
        self.replication_lag_seconds = Histogram(
            "From the commit on the writing node to the commit here", LAG_BUCKETS_S
        )
        self.apply_lock_seconds = Histogram("How long the database's write lock was held", LOCK_BUCKETS_S)
        self.clock_offset_seconds = Gauge("This node's clock minus the NATS server's")
        self.nats_connected = Gauge("1 while connected to NATS, else 0", 0)
        self.snapshot_age_seconds = Gauge("Age of the newest snapshot in the store; absent without one")
        self.snapshots_taken = Counter("Snapshots taken by this node")
        self.snapshot_failures = Counter("Snapshots that this node could not take, or not store")
        self.catching_up = Gauge("1 while this node catches up from a snapshot or refills the log, else 0", 0)
        self.catch_up_progress = Gauge(
            "How far the present step of that is (fetching, unpacking, merging), 0 to 1; 1 when nothing is under way", 1
        )
        self.messages_behind = Gauge("Messages of all streams that did not take effect here yet, as far as known", 0)
        self.stream_position = StreamGauge("Sequence of the last message of the stream that took effect here")
        self.schema_mismatch_paused = Gauge("Tables whose received rows wait because the schema differs", 0)
        self.oversized_transactions = Counter("Transactions published in pieces, being over the limit")
        self.undecodable = Counter("Messages that could not be read; they are kept and passed")
        self.unread_messages = Gauge("Messages of a newer version, kept until this node is upgraded", 0)
        self.unread_bytes = Gauge("Bytes that those messages take in the database", 0)
        self.unkeyed_rows = Gauge("Rows that are not replicated because of NULL in their primary key")
        self.busy_retries = Counter("Write transactions tried again because the database was locked")

    def collect(self) -> Iterator[Metric]:
        """The values as prometheus_client's families: the interface of a collector."""
        from prometheus_client import core

        for name, metric in vars(self).items():
            full = self._prefix + name
            if isinstance(metric, Counter):
                yield core.CounterMetricFamily(full, metric.help, value=metric.value)
                yield core.UntypedMetricFamily(full, f"{metric.help} (same as {full}_total)", value=metric.value)
            elif isinstance(metric, Histogram):
                buckets, total = metric.cumulative()
                yield core.HistogramMetricFamily(full, metric.help, buckets=buckets, sum_value=total)
            elif isinstance(metric, Gauge):
                if (value := metric.value) is not None:
                    yield core.GaugeMetricFamily(full, metric.help, value=value)
            elif isinstance(metric, StreamGauge):
                family = core.GaugeMetricFamily(full, metric.help, labels=["stream"])
                for stream, gauge in metric.items():
                    if (value := gauge.value) is not None:
                        family.add_metric([stream], value)
                yield family
        info = core.GaugeMetricFamily(
            f"{self._prefix}build_info", "Versions of what runs here", labels=list(self._build)
        )
        info.add_metric(list(self._build.values()), 1)
        yield info

    def render(self) -> bytes:
        """All metrics in Prometheus' text format (`CONTENT_TYPE`).

        The first call imports prometheus_client. The registry holds this collector alone: prometheus_client's
        own one adds collectors of the process and the garbage collector.
        """
        import prometheus_client

        if self._registry is None:
            self._registry = prometheus_client.CollectorRegistry()
            self._registry.register(self)
        return prometheus_client.generate_latest(self._registry)
