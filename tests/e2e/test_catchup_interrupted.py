"""Catching up that is interrupted again and again: by kill -9, by a link that breaks, by a disk that is full. The
application writes on, and at the end nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.disks import fill, small_disk
from tests.e2e.cluster import Node, eventually, hub_and_leaves, merged
from tests.e2e.proxy import Link
from tests.e2e.snapshots import (
    MORE_THAN_THE_STREAM_MB,
    SCHEMA,
    STORE,
    NatsPlace,
    Place,
    S3Place,
    churn,
    many_rows,
    nothing_lost,
    reasons,
    save,
    shared_folder,
    small_store,
    wait_caught_up,
    writers_of,
)
from tests.e2e.writers import writing
from tests.snapshot.proxy import Proxy, proxied

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("place", "kills"), [("folder", 30), ("nats", 15), ("s3", 15)], indirect=["place"])
def test_killed_again_and_again_while_catching_up(tmp_path: Path, place: Place, kills: int) -> None:
    """At random moments of fetching, unpacking, merging, publishing; the application writes on. Files that a kill
    leaves are used again or removed."""
    moments = random.Random(3)
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=place.settings)
    # So that NATS has room for two of these snapshots.
    larger = 5 if isinstance(place, NatsPlace) else 1
    hub, leaf = small_store(cluster, larger * STORE)
    writers = writers_of([hub, leaf])
    hit = {"before": 0, "fetching": 0, "merging": 0, "after": 0}

    def gap() -> None:
        """Many rows are new, the stream has dropped what brought them, and there is a snapshot."""
        many_rows(hub, 40_000, together=40_000)
        churn(hub, larger * MORE_THAN_THE_STREAM_MB, row_bytes=larger * 10_000)
        save(hub)

    with cluster:
        cluster.start()
        with writing(writers):
            leaf.kill()
            gap()
            for _ in range(kills):
                begun = len(leaf.log_text())
                leaf.start()
                eventually(lambda begun=begun: "connected to NATS" in leaf.log_text()[begun:], 20, "connected")  # type: ignore[misc]
                time.sleep(moments.uniform(0.0, 1.5 if isinstance(place, S3Place) else 0.8))
                leaf.kill()
                text = leaf.log_text()[begun:]
                over = "snapshot merged" in text or "caught up, publishing" in text
                merging = any(leaf.folder.glob(".*snapshot-*"))
                fetching = "fetching a snapshot" in text
                hit["after" if over else "merging" if merging else "fetching" if fetching else "before"] += 1
                if over:
                    gap()
            leaf.start()
        nothing_lost(cluster, writers)
        print(f"killed: {hit}")
        assert hit["fetching"] + hit["merging"] >= kills // 3, hit
        eventually(lambda: not list(leaf.folder.glob(".app.db*")), 20, "no files are left over")


@pytest.mark.timeout(300)
def test_over_a_link_that_breaks_again_and_again(tmp_path: Path) -> None:
    """The snapshot comes through the very link that is cut as soon as it begins to come: each time it goes on where it
    was, and arrives."""
    cluster, [link] = hub_and_leaves(tmp_path, SCHEMA, 1, proxied=True)
    hub, leaf = cluster.nodes.values()
    hub.configure(merged(hub.settings, {"nats": {"max_store": 48 << 20}}))
    writers = writers_of([hub, leaf])
    cuts = 0
    with cluster:
        cluster.start()
        cluster.wait_settled()
        leaf.stop()
        with writing(writers):
            many_rows(hub, 1000, size=10_000, together=100)
            churn(hub, 45)
            save(hub)
            begun = len(leaf.log_text())

            def fetches() -> int:
                return leaf.log_text()[begun:].count("fetching a snapshot")

            def bridged() -> bool:
                return "caught up from a snapshot" in leaf.log_text()[begun:]

            leaf.start()
            for number in range(1, 6):
                eventually(lambda number=number: fetches() >= number or bridged(), 60, "it begins again")  # type: ignore[misc]
                if bridged():
                    break
                time.sleep(0.03)
                link.set(Link.CUT)
                cuts += 1
                eventually(lambda: not leaf.connected(), 20, "the leaf has noticed")
                link.set(Link.PASS)
            eventually(bridged, 60, "it arrives")
        nothing_lost(cluster, writers)
        print(f"{cuts} cuts")
        assert cuts


@pytest.mark.timeout(300)
def test_a_merge_over_a_link_that_is_cut_all_the_time(tmp_path: Path) -> None:
    """It takes longer than the link ever holds, and does not begin again."""
    cluster, [link] = hub_and_leaves(tmp_path, SCHEMA, 1, more=shared_folder(tmp_path), proxied=True)
    hub, leaf = small_store(cluster)
    writers = writers_of([hub, leaf])
    with cluster:
        cluster.start()
        cluster.wait_settled()
        leaf.stop()
        many_rows(hub, 300_000)
        churn(hub, MORE_THAN_THE_STREAM_MB)
        save(hub)
        begun = len(leaf.log_text())
        with writing(writers):
            leaf.start()
            merging = re.compile("merging snapshot [^,]*, ([0-9]+) %")
            percents: list[int] = []
            cuts = 0

            def bridged() -> bool:
                found = merging.search(reasons(leaf))
                percents.extend([int(found[1])] if found else [])
                return "caught up from a snapshot" in leaf.log_text()[begun:]

            eventually(lambda: bridged() or percents, 60, "it merges", pause_s=0.02)
            while not bridged():
                link.set(Link.CUT)
                cuts += 1
                eventually(lambda: bridged() or not leaf.connected(), 20, "the leaf has noticed", pause_s=0.05)
                link.set(Link.PASS)
                eventually(lambda: bridged() or leaf.connected(), 20, "the leaf is back", pause_s=0.05)
        nothing_lost(cluster, writers)
        print(f"{cuts} cuts, {percents}")
        assert cuts >= 2
        assert percents == sorted(percents), "it began again"
        assert hub.execute("SELECT count(*) FROM bulk") == leaf.execute("SELECT count(*) FROM bulk")


# -- a link to the store that is slow, and breaks


@contextlib.contextmanager
def link_to(port: int, *, rate: float) -> Iterator[tuple[Proxy, Callable[[], None]]]:
    """A link as `tests.snapshot.proxy` makes them, in a thread; what breaks all its connections."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    links: list[Proxy] = []
    ended = asyncio.Event()

    async def serve() -> None:
        async with proxied(port, rate=rate) as link:
            links.append(link)
            ready.set()
            await ended.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()

    def break_it() -> None:
        loop.call_soon_threadsafe(links[0].break_all)

    try:
        assert ready.wait(10)
        yield links[0], break_it
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_s3_is_slow_and_breaks_in_the_middle_of_a_part(tmp_path: Path, place: S3Place) -> None:
    """It says what it waits for, and goes on where it was once the link is there again."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=place.settings)
    hub, leaf = small_store(cluster)
    writers = writers_of([hub, leaf])
    with cluster, link_to(place.service.port, rate=2e6) as (link, break_it):
        cluster.start()
        leaf.stop()
        leaf.configure(merged(leaf.settings, place.through(link.port)))
        with writing(writers):
            many_rows(hub, 800, size=10_000, together=100)
            churn(hub, MORE_THAN_THE_STREAM_MB)
            save(hub)
            leaf.start()
            fetched = re.compile("fetching snapshot [^,]*, ([0-9]+) %")

            def under_way() -> bool:
                found = fetched.search(reasons(leaf))
                return found is not None and 10 <= int(found[1]) < 90

            eventually(under_way, 30, "a part of it is here", pause_s=0.02)
            link.cut_after_down = 0
            break_it()
            eventually(lambda: "waiting: " in reasons(leaf), 60, "the status says what it waits for")
            assert str(link.port) in reasons(leaf)
            assert "catching up waits" in leaf.log_text()
            assert_whole(leaf)
            [part] = leaf.folder.glob(".app.db*download-*")
            had, before = part.stat().st_size, link.down
            link.cut_after_down, link.rate = None, None
            wait_caught_up(leaf)
            assert had > 500_000
            assert link.down - before < 8_000_000 - had + 500_000, "it began again"
        nothing_lost(cluster, writers)


def assert_whole(node: Node) -> None:
    with contextlib.closing(sqlite3.connect(node.db, timeout=30)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# -- a disk that is full


def test_a_disk_that_is_full_in_the_middle_of_a_merge(tmp_path: Path) -> None:
    """The database's own: the daemon says so, and merges on once there is room. The application is refused meanwhile:
    what it was not refused counts."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=shared_folder(tmp_path))
    hub, leaf = small_store(cluster)
    disk = tmp_path / "disk"
    with small_disk(disk, "128m"), cluster:
        leaf.db = Path(shutil.move(leaf.db, disk))  # the log, the ledger and the folder of its server stay
        leaf.configure(merged(leaf.settings, {"nats": {"store_dir": str(leaf.folder / "nats")}}))
        writers = writers_of([hub, leaf])
        writers[1].folder = leaf.folder
        cluster.start()
        cluster.wait_settled()
        leaf.stop()
        many_rows(hub, 200_000)
        churn(hub, MORE_THAN_THE_STREAM_MB)
        save(hub)
        with writing(writers):
            begun = len(leaf.log_text())
            leaf.start()
            merging = re.compile("merging snapshot [^,]*, ([0-9]+) %")

            def under_way() -> bool:
                found = merging.search(reasons(leaf))
                return found is not None and 5 <= int(found[1]) < 60

            eventually(under_way, 60, "it merges", pause_s=0.01)
            fill(disk / "ballast")
            eventually(lambda: "cannot be written" in leaf.log_text()[begun:], 30, "a line about the disk")
            eventually(writers[1].refused, 30, "the application is refused, too")
            time.sleep(2)
            assert "caught up from a snapshot" not in leaf.log_text()[begun:]
            assert leaf.running
            status = leaf.status()
            assert status is not None
            assert status["status"] != "healthy", status
            assert "full" in reasons(leaf), status
            assert_whole(leaf)
            assert len([line for line in leaf.log_text()[begun:].splitlines() if "cannot be written" in line]) < 5
            (disk / "ballast").unlink()
            wait_caught_up(leaf, begun=begun)
        nothing_lost(cluster, writers)
        assert "Traceback" not in leaf.log_text()
        assert leaf.execute("SELECT count(*) FROM bulk") == hub.execute("SELECT count(*) FROM bulk")
        assert leaf.stop() == 0
