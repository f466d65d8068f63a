"""Steps of the wall clock, the server's time, and what the kernel says about both."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonylite import clock
from harmonylite.clock import ServerClock, Step, StepDetector

T = 1_715_000_000_000


class Device:
    """A device's two clocks, in ms. `pause_ms`: how long the process is stopped after each reading."""

    def __init__(self) -> None:
        self.wall_ms = T
        self.boot_ms = 10_000
        self.pauses: list[int] = []

    def run(self, ms: int, *, wall_ms: int | None = None) -> None:
        self.boot_ms += ms
        self.wall_ms += ms if wall_ms is None else wall_ms

    def wall(self) -> int:
        return self._read(lambda: self.wall_ms)

    def boottime(self) -> int:
        return self._read(lambda: self.boot_ms)

    def _read(self, reading: Callable[[], int]) -> int:
        value = reading()
        if self.pauses:
            self.run(self.pauses.pop(0))
        return value

    def detector(self, **options: int) -> StepDetector:
        return StepDetector(wall=self.wall, boottime=self.boottime, **options)


def test_a_steady_clock_makes_no_step() -> None:
    device = Device()
    detector = device.detector()
    for _ in range(5):
        device.run(60_000)
        assert detector.check() is None


@pytest.mark.parametrize("jump", [3 * 86_400_000, -5_000, 1_001, -1_001])
def test_a_step_is_told_once_with_the_old_clocks_time(jump: int) -> None:
    device = Device()
    detector = device.detector()
    device.run(7_000)
    device.wall_ms += jump
    device.run(500)
    assert detector.check() == Step(delta_ms=jump, before_ms=T + 7_500)
    device.run(500)
    assert detector.check() is None


def test_the_threshold_is_not_a_step() -> None:
    device = Device()
    detector = device.detector()
    device.wall_ms += 1000
    assert detector.check() is None
    fine = device.detector(threshold_ms=50)
    device.wall_ms += 60
    assert fine.check() == Step(60, device.wall_ms - 60)


def test_two_steps_are_two_steps() -> None:
    device = Device()
    detector = device.detector()
    device.wall_ms += 10_000
    assert detector.check() == Step(10_000, T)
    device.wall_ms -= 4_000
    assert detector.check() == Step(-4_000, T + 10_000)


def test_slow_slewing_does_not_add_up_to_a_step() -> None:
    device = Device()
    detector = device.detector()
    for _ in range(1000):
        device.run(10_000, wall_ms=10_005)
        assert detector.check() is None
    device.wall_ms += 2_000
    step = detector.check()
    assert step is not None and step.delta_ms == 2_000


def test_a_process_stopped_between_two_readings_saw_no_step() -> None:
    device = Device()
    detector = device.detector()
    device.run(1000)
    device.pauses = [5_000]  # after the first reading; the next try is clean
    assert detector.check() is None
    device.pauses = [5_000] * 100  # again and again
    assert detector.check() is None
    device.pauses = []
    assert detector.check() is None
    device.wall_ms += 2_000
    step = detector.check()
    assert step is not None and step.delta_ms == 2_000


def test_a_small_step_hidden_by_stops_is_found_by_the_next_check() -> None:
    device = Device()
    detector = device.detector()
    device.wall_ms += 3_000
    device.pauses = [5_000] * 100
    assert detector.check() is None
    device.pauses = []
    step = detector.check()
    assert step is not None and step.delta_ms == 3_000


def server_clock(device: Device, **options: int) -> ServerClock:
    return ServerClock(boottime=device.boottime, **options)


def test_without_a_sample_nothing_is_known() -> None:
    unknown = server_clock(Device())
    assert (unknown.now_ms(), unknown.offset_ms(T), unknown.error_ms) == (None, None, None)


def test_the_servers_time_goes_on_by_boot_time_whatever_the_wall_clock_does() -> None:
    device = Device()
    server = server_clock(device)
    server.sample(10_000, 10_040, T + 500_000)
    device.run(40)
    assert server.now_ms() == T + 500_020
    assert server.error_ms == 20
    assert server.offset_ms(device.wall_ms) == 499_980
    device.run(1000)
    device.wall_ms -= 10**9
    assert server.now_ms() == T + 501_020
    assert server.offset_ms(device.wall_ms) == 499_980 + 10**9


def test_the_smallest_round_trip_wins() -> None:
    device = Device()
    server = server_clock(device)
    server.sample(10_000, 10_100, T)
    assert server.error_ms == 50
    server.sample(11_000, 11_011, T + 940)
    assert server.error_ms == 6
    server.sample(12_000, 12_100, T + 1_990)
    assert server.error_ms == 6
    device.boot_ms = 12_005
    assert server.now_ms() == T + 1_940


def test_an_old_sample_is_replaced_by_a_worse_one() -> None:
    device = Device()
    server = server_clock(device)
    server.sample(10_000, 10_002, T)
    server.sample(609_900, 609_998, T + 599_950)
    assert server.error_ms == 1
    server.sample(610_000, 610_100, T + 600_050)
    assert server.error_ms == 50


def test_a_server_whose_clock_was_set_is_believed_at_once() -> None:
    device = Device()
    server = server_clock(device)
    server.sample(10_000, 10_002, T)
    device.run(5_000)
    server.sample(14_900, 15_000, T + 80_000)
    assert server.error_ms == 50
    assert server.now_ms() == T + 80_050


def test_an_answer_before_its_request_is_refused() -> None:
    with pytest.raises(ValueError, match="before its request"):
        server_clock(Device()).sample(10_000, 9_999, T)


def test_the_real_clocks() -> None:
    assert abs(clock.wall_ms() - time.time() * 1000) < 5_000
    before, start = clock.boottime_ms(), time.monotonic_ns() // 1_000_000
    time.sleep(0.02)
    ran, expected = clock.boottime_ms() - before, time.monotonic_ns() // 1_000_000 - start
    assert abs(ran - expected) <= 1_000 and ran >= 19
    assert StepDetector().check() is None


def test_boot_time_without_the_kernels_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    assert abs(clock.boottime_ms() - time.monotonic_ns() // 1_000_000) < 5_000


def test_boot_id_is_the_same_from_kernel_and_unit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = clock.boot_id()
    assert len(known) == 32 and int(known, 16) >= 0
    assert clock.boot_id() == known
    monkeypatch.setattr(clock, "_BOOT_ID", tmp_path / "hidden")
    monkeypatch.delenv("HARMONYLITE_BOOT_ID", raising=False)
    assert clock.boot_id() == ""
    monkeypatch.setenv("HARMONYLITE_BOOT_ID", known)
    assert clock.boot_id() == known


def test_the_kernel_says_whether_it_is_synchronised() -> None:
    state = clock._adjtimex_state()
    assert state is not None and 0 <= state <= 5
    assert isinstance(clock.ntp_synchronized(), bool)


@pytest.mark.parametrize(
    ("state", "running", "mark", "expected"),
    [
        (0, False, False, True),
        (5, False, False, False),
        (5, True, True, False),
        (None, False, False, None),
        (None, True, False, False),
        (None, True, True, True),
    ],
)
def test_ntp_state_where_adjtimex_is_forbidden(
    state: int | None,
    running: bool,
    mark: bool,
    expected: bool | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    directory = tmp_path / "timesync"
    if running:
        directory.mkdir()
    if mark:
        (directory / "synchronized").touch()
    monkeypatch.setattr(clock, "_TIMESYNC_SYNCHRONIZED", directory / "synchronized")
    monkeypatch.setattr(clock, "_adjtimex_state", lambda: state)
    assert clock.ntp_synchronized() is expected
