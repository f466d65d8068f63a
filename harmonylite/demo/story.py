"""What the demo shows, step by step, and whether it is true at the end."""

from __future__ import annotations

import json
import signal
import sqlite3
import statistics
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from harmonylite.demo.fleet import PATIENCE_S, DemoFailed, Fleet, Node
from harmonylite.demo.screen import Screen
from harmonylite.demo.shop import LINES_PER_ORDER, TABLES, Content, Ledger, Shop
from harmonylite.stream.server_process import StartError, find_binary

_PRICES = {"apple juice": 240, "bread": 320, "coffee": 300, "honey": 590, "milk": 130, "tea": 200, "umbrella": 1500}
# Two edits so far apart are told apart by every clock.
_APART_S = 0.05
_SALES = 100
_STAGES = 20
_SALES_OFFLINE = 20
_SALES_MEANWHILE = 5
_CUSTOMER_S = 0.005
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def main(*, keep: bool = False) -> int:
    """Show it on standard output. Returns 0 if the databases are identical and hold what was written, 1 if not.

    keep: leave the folder.
    """
    begun = time.monotonic()
    screen = Screen()
    try:
        with _interruptible():
            find_binary()  # one line now rather than a daemon's log later
            identical = _show(screen, keep=keep)
    except _Interrupted as interrupted:
        print("harmonylite: demo interrupted", file=sys.stderr)
        return 128 + interrupted.number
    except BrokenPipeError:
        raise
    except (DemoFailed, StartError, OSError, sqlite3.Error) as error:
        print(f"harmonylite: demo failed: {error}", file=sys.stderr)
        return 1
    screen.say(f"It took {time.monotonic() - begun:.1f} s.")
    return 0 if identical else 1


def _show(screen: Screen, *, keep: bool) -> bool:
    fleet = Fleet()
    try:
        return Story(screen, fleet).tell()
    finally:
        _undisturbed()
        fleet.stop()
        if keep:
            screen.say(f"Every process is ended; {fleet.folder} stays. For example:")
            for line in fleet.hand_over():
                screen.command(line)
        else:
            fleet.remove()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C, a closed terminal and `kill` end the demo in order, once: a second one does not disturb that."""

    def interrupt(number: int, _: FrameType | None) -> None:
        _undisturbed()
        raise _Interrupted(number)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # else somebody said so on purpose: nohup
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _undisturbed() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True, slots=True)
class _Edit:
    """One person sets a price. at: when, milliseconds since 1970."""

    shop: Shop
    product: str
    cents: int
    at: int

    def __str__(self) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(self.at / 1000))
        return f"{clock}.{self.at % 1000:03d} {self.shop.name} says {_money(self.cents)}"


class Story:
    """The demo's steps. Each raises DemoFailed when something does not happen."""

    def __init__(self, screen: Screen, fleet: Fleet) -> None:
        self._screen = screen
        self._fleet = fleet
        self._ledger = Ledger()
        self._office, self._north, self._south = (Shop(node.name, node.db_path, self._ledger) for node in fleet.nodes)
        self._shops = (self._office, self._north, self._south)

    def tell(self) -> bool:
        """All of it. Are the databases identical at the end, and as they should be?"""
        self._screen.title("HarmonyLite: three nodes, three SQLite files, every one of them writes")
        try:
            self._start()
            self._write_everywhere()
            self._keep_transactions_whole()
            self._cut()
            edits = self._edit_both_sides()
            self._mend(edits)
            return self._compare()
        finally:
            for shop in self._shops:
                shop.close()

    def _start(self) -> None:
        screen, fleet = self._screen, self._fleet
        screen.step("Three nodes start")
        screen.say("office   the hub: its nats-server keeps the log of changes")
        screen.say("north    a shop's device, a leaf of the hub")
        screen.say("south    another one")
        fleet.start()
        took = fleet.wait(lambda: all(_connected(node) for node in fleet.nodes), "a node that connects")
        screen.say(f"All daemons run and are connected after {took:.1f} s.")
        screen.why("The applications know nothing of it: each opens its own SQLite file.")

    def _write_everywhere(self) -> None:
        screen = self._screen
        screen.step("Every node writes into its own file")
        self._office.add_products(_PRICES)
        self._agreed("what office wrote", self._office)  # also waits for the hub's stream
        screen.say(f"office adds {len(_PRICES)} products: they are in all three files.")
        for shop in (self._north, self._south):
            shop.sell()
            ms = self._agreed(f"what {shop.name} wrote", shop)
            screen.say(f"{shop.name} sells something: the order is in all three files after {ms:.0f} ms.")
        self._office.remove_product("umbrella")
        ms = self._agreed("what office deleted", self._office)
        screen.say(f"office drops a product: gone everywhere after {ms:.0f} ms.")
        screen.why("No node is the master. Reads and writes stay local, and never wait for the others.")

    def _keep_transactions_whole(self) -> None:
        screen = self._screen
        screen.step("A transaction stays whole")
        screen.say(f"north sells and sells; an order and its {LINES_PER_ORDER} lines are one transaction.")
        with _Watcher(self._south) as watcher:
            sales = len(list(self._sales(self._north, lambda sold: sold < _SALES or watcher.stages < _STAGES)))
            self._agreed("what north sold", self._north)
        if watcher.error is not None:
            raise DemoFailed(f"south could not be read while orders came in: {watcher.error}")
        screen.say(f"{sales} orders came to south, which looked {watcher.looks:,} times and saw")
        screen.say(f"{watcher.stages} different states of its file: {watcher.torn} with half an order.")
        if watcher.torn:
            raise DemoFailed(f"south saw {watcher.torn} times an order without all of its lines")
        screen.why("What was committed together becomes visible together, on every node.")

    def _sales(self, shop: Shop, wanted: Callable[[int], bool]) -> Iterator[float]:
        """Sell, one customer after the other, while `wanted(number so far)`; yields the seconds of each."""
        sold, deadline = 0, time.monotonic() + PATIENCE_S
        while wanted(sold):
            if time.monotonic() > deadline:
                raise DemoFailed(f"what {shop.name} sells does not arrive elsewhere within {PATIENCE_S:g} s")
            self._fleet.check()
            yield shop.sell()
            sold += 1
            time.sleep(_CUSTOMER_S)

    def _cut(self) -> None:
        screen, fleet, north = self._screen, self._fleet, self._fleet.north
        screen.step("The network of north is cut")
        # What was acknowledged counts as pending until it was seen in its place in the log.
        fleet.wait(lambda: _pending(north) == 0, "a status of north that says nothing is pending")
        fleet.cut()
        sale_ms = 1000 * statistics.median(self._sales(self._north, lambda sold: sold < _SALES_OFFLINE))
        screen.say(f"north sells {_SALES_OFFLINE} times all the same, in {sale_ms:.1f} ms each: it waits for nobody.")
        pending = _SALES_OFFLINE * (1 + LINES_PER_ORDER)
        fleet.wait(lambda: _pending(north) == pending, f"a status of north that says {pending} rows are pending")
        screen.command("harmonylite status     # on north", _status_lines(north))
        for shop in (self._office, self._south):
            for _ in range(_SALES_MEANWHILE):
                shop.sell()
        took = fleet.wait(
            lambda: self._office.content() == self._south.content(), "office and south with the same orders"
        )
        screen.say(f"office and south sell too, and agree after {took * 1000:.0f} ms.")
        counts = ", ".join(f"{shop.name} {shop.count('orders')}" for shop in self._shops)
        screen.say(f"Orders known now: {counts}.")
        screen.why("Offline is normal: what waits is kept in the database, one entry per row.")

    def _edit_both_sides(self) -> tuple[tuple[_Edit, _Edit], ...]:
        """Two rows, each edited on both sides of the cut: once the office is later, once the shop."""
        screen = self._screen
        screen.step("The same rows are edited on both sides of the cut")
        pairs = (
            self._edit_twice("coffee", (self._north, 320), (self._office, 350)),
            self._edit_twice("tea", (self._office, 210), (self._north, 240)),
        )
        for first, second in pairs:
            screen.say(f"{first.product + ':':<8}{first}, {second}.")
        screen.why("Who wrote later shall win, whoever is heard of first.")
        return pairs

    def _edit_twice(self, product: str, *edits: tuple[Shop, int]) -> tuple[_Edit, _Edit]:
        done = []
        for shop, cents in edits:
            done.append(_Edit(shop, product, cents, shop.set_price(product, cents)))
            time.sleep(_APART_S)  # the next edit shall have a later time: that is what is shown
        return done[0], done[1]

    def _mend(self, edits: Sequence[tuple[_Edit, _Edit]]) -> None:
        screen, fleet = self._screen, self._fleet
        screen.step("The network is back")
        fleet.mend()
        screen.say("north links up with the hub again by itself, reads what it missed and sends what it has.")
        expected = self._ledger.content()
        took = fleet.reached(lambda: self._all_hold(expected))
        if took is None:
            return  # the comparison says what is missing
        screen.say(f"Both sides have caught up with each other after {took:.1f} s.")
        for _, won in edits:
            screen.say(f"{won.product} costs {_money(won.cents)} everywhere: {won.shop.name} was later.")
        fleet.wait(lambda: all(_pending(node) == 0 for node in fleet.nodes), "a status that says nothing is pending")
        # north read to the end before it published: an edit of its own that was beaten by then never left it.
        north = fleet.north
        _check_conflicts(north, [lost for lost, _ in edits])
        screen.command("harmonylite conflicts  # on north", north.run("conflicts").splitlines())
        screen.why(
            "A row that lost is not silently gone: the node that met the conflict keeps it, with all its columns."
        )

    def _compare(self) -> bool:
        self._screen.step("The three databases")
        contents = {shop.name: shop.content() for shop in self._shops}
        return compare(self._screen, contents, self._ledger.content())

    def _agreed(self, what: str, writer: Shop) -> float:
        """Milliseconds from the last commit of `writer` until every shop holds all that was ever written."""
        expected = self._ledger.content()
        self._fleet.wait(lambda: self._all_hold(expected), f"{what}, everywhere")
        return 1000 * (time.monotonic() - writer.committed)

    def _all_hold(self, expected: Content) -> bool:
        return all(shop.content() == expected for shop in self._shops)


class _Watcher:
    """Looks for torn transactions, as often as it can. torn: looks that found one; stages: states of the file, told
    apart by the number of orders.
    """

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self.looks = self.torn = self.stages = 0
        self.error: Exception | None = None

    def __enter__(self) -> _Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        last = -1
        try:
            for torn, orders in self._shop.half_orders(lambda: not self._stop.is_set()):
                self.looks += 1
                self.torn += bool(torn)
                self.stages += orders != last
                last = orders
        except Exception as error:
            self.error = error


def compare(screen: Screen, contents: dict[str, Content], expected: Content) -> bool:
    """Print the table and the verdict: are all `contents` (by node) as expected?"""
    screen.table(
        ("", *(table.replace("_", " ") for table in TABLES), "SHA-256 of all rows"),
        [
            (name, *(f"{count:,}" for count in content.counts), content.digest[:16])
            for name, content in (*contents.items(), ("expected", expected))
        ],
    )
    screen.why('"expected": one single database that took every write in the order of writing.')
    wrong = [name for name, content in contents.items() if content != expected]
    if not wrong:
        screen.verdict(
            f"IDENTICAL: all {len(contents)} databases hold the same {sum(expected.counts):,} rows,"
            " and nothing that was written is missing.",
            good=True,
        )
        return True
    if len(set(contents.values())) == 1:
        what = "NOT AS WRITTEN: the databases are identical, but something that was written is missing."
    else:
        what = f"NOT IDENTICAL: other than what was written: {', '.join(wrong)}."
    screen.verdict(what, good=False)
    return False


def _connected(node: Node) -> bool:
    status = node.status()
    return status is not None and status.db_connected and status.nats_connected


def _pending(node: Node) -> int | None:
    status = node.status()
    return None if status is None else status.pending_rows


def _status_lines(node: Node) -> list[str]:
    """What the command says of a node's work for others; of its connection, if it says that it has none."""
    lines = node.run("status").splitlines()
    offline = any(line.split()[:2] == ["nats", "offline"] for line in lines)
    wanted = ("status", "nats", "pending") if offline else ("pending",)
    shown = [line for line in lines if line.startswith(wanted)]
    return [part for line in shown for part in textwrap.wrap(line, 96, subsequent_indent=" " * 11)]


def _check_conflicts(node: Node, edits: Sequence[_Edit]) -> None:
    """Raises DemoFailed if one of these edits, which lost, is not in the node's conflict log."""
    logged = [conflict["row"] for conflict in json.loads(node.run("conflicts", "--table", "products", "--json"))]
    for lost in edits:
        if {"id": lost.product, "price": lost.cents} not in logged:
            what = f"{lost.product} for {_money(lost.cents)}"
            raise DemoFailed(f"the edit that lost ({what}) is not in {node.name}'s conflict log")


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"
