"""Metrics: the names that are promised, the values that were counted, and no cost where nobody scrapes."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from harmonylite import __version__
from harmonylite.observe.metrics import LAG_BUCKETS_S, Counter, Histogram, Metrics

PROMISED = {
    *("published", "pending_publish", "applied", "conflicts", "parked", "replication_lag_seconds"),
    *("apply_lock_seconds", "clock_offset_seconds", "nats_connected", "snapshot_age_seconds"),
    *("stream_position", "schema_mismatch_paused"),
}


def scrape(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def plain(metrics: Metrics) -> dict[str, float]:
    return {name: value for (name, labels), value in scrape(metrics).items() if not labels}


def test_every_promised_metric_is_exposed_under_its_name() -> None:
    metrics = Metrics()
    metrics.clock_offset_seconds.set(0.5)
    metrics.snapshot_age_seconds.set(1)
    metrics.stream_position.labels("s").set(1)
    families = {
        line.split()[2].removeprefix("harmonylite_")
        for line in metrics.render().decode().splitlines()
        if line.startswith("# TYPE ")
    }
    assert families >= PROMISED


def test_counters_have_the_promised_name_and_prometheus_own() -> None:
    metrics = Metrics()
    metrics.published.inc(500)
    metrics.published.inc()
    values = plain(metrics)
    assert values["harmonylite_published"] == values["harmonylite_published_total"] == 501
    assert metrics.published.value == 501
    text = metrics.render().decode()
    assert "# TYPE harmonylite_published_total counter" in text
    assert "# TYPE harmonylite_published untyped" in text
    assert "_created" not in text


def test_namespace_and_subsystem() -> None:
    assert "fleet_pi_parked" in plain(Metrics("fleet", "pi"))
    assert "parked" in plain(Metrics("", ""))
    with pytest.raises(ValueError, match="harmony-lite"):
        Metrics("harmony-lite")
    with pytest.raises(ValueError, match="9a"):
        Metrics("ok", "9a")


def test_unknown_gauges_are_absent_until_set() -> None:
    metrics = Metrics()
    assert "harmonylite_clock_offset_seconds" not in plain(metrics)
    assert plain(metrics)["harmonylite_nats_connected"] == 0
    metrics.clock_offset_seconds.set(-1.5)
    assert plain(metrics)["harmonylite_clock_offset_seconds"] == -1.5
    metrics.clock_offset_seconds.set(None)
    assert "harmonylite_clock_offset_seconds" not in plain(metrics)


def test_a_gauge_can_be_asked_at_every_scrape() -> None:
    metrics = Metrics()
    ages = iter([1.0, 2.0])
    metrics.snapshot_age_seconds.set_function(lambda: next(ages))
    assert plain(metrics)["harmonylite_snapshot_age_seconds"] == 1
    assert plain(metrics)["harmonylite_snapshot_age_seconds"] == 2


def test_stream_positions_are_labelled() -> None:
    metrics = Metrics()
    metrics.stream_position.labels("changes-1").set(7)
    metrics.stream_position.labels(stream="changes-2").set(9)
    metrics.stream_position.labels("changes-1").set(8)
    values = scrape(metrics)
    assert values["harmonylite_stream_position", (("stream", "changes-1"),)] == 8
    assert values["harmonylite_stream_position", (("stream", "changes-2"),)] == 9


def test_histogram_buckets_are_cumulative_and_inclusive() -> None:
    metrics = Metrics()
    lag = metrics.replication_lag_seconds
    for seconds in (0.0005, 0.001, 0.0011, 3600, 3601, -5):
        lag.observe(seconds)
    lag.observe(0.02, count=10)
    values = scrape(metrics)

    def up_to(bound: str) -> float:
        return values["harmonylite_replication_lag_seconds_bucket", (("le", bound),)]

    assert [up_to(bound) for bound in ("0.001", "0.002", "0.025", "3600.0", "+Inf")] == [3, 4, 14, 15, 16]
    assert values["harmonylite_replication_lag_seconds_count", ()] == 16 == lag.count
    assert values["harmonylite_replication_lag_seconds_sum", ()] == pytest.approx(0.0026 + 7201 + 0.2)
    assert LAG_BUCKETS_S[0] == 0.001 and LAG_BUCKETS_S[-1] == 3600


def test_build_info() -> None:
    metrics = Metrics(build={"sqlite": "3.40.1"})
    ((labels, value),) = [
        (dict(labels), value) for (name, labels), value in scrape(metrics).items() if name == "harmonylite_build_info"
    ]
    assert value == 1 and labels["version"] == __version__ and labels["sqlite"] == "3.40.1"


def test_counter_cannot_go_down() -> None:
    with pytest.raises(ValueError):
        Counter("x").inc(-1)


def test_threads_lose_nothing() -> None:
    counter, histogram = Counter("x"), Histogram("x", (1.0,))

    def work() -> None:
        for _ in range(5000):
            counter.inc()
            histogram.observe(0.5)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.value == 20000
    assert histogram.cumulative() == ([("1.0", 20000), ("+Inf", 20000)], 10000.0)


def test_prometheus_client_is_not_loaded_before_the_first_scrape() -> None:
    code = (
        "import sys\n"
        "from harmonylite.observe.metrics import Metrics\n"
        "metrics = Metrics(); metrics.published.inc(); metrics.apply_lock_seconds.observe(1)\n"
        "before = 'prometheus_client' in sys.modules\n"
        "metrics.render()\n"
        "print(before, 'prometheus_client' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
