"""Django with its own users, groups, sessions, content types and admin log on two nodes; docs/applications.md.

Each node has a process of its own that runs the site (`django_site`), with a connection that stays open, as a web
server's would. The tests speak to it by function calls; the sites use the ORM and the admin's own pages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("django")

from tests.e2e.cluster import Cluster, Contents, Node, Settings, contents_of, eventually, hub_and_leaves
from tests.e2e.proxy import Link, Proxy

ROOT = "root", "root-password"

# Each node keeps its own record of the migrations that ran there.
LOCAL = "django_migrations"
RECOMMENDED: Settings = {"tables": {"exclude": [LOCAL]}}


class Site:
    """A process that runs the Django site over a node's database. `site("create_user", "anna", "secret")`."""

    def __init__(self, db: Path, *, random_ids: bool) -> None:
        environment = {**os.environ, "DJANGO_DB": str(db)}
        if random_ids:
            environment["DJANGO_RANDOM_IDS"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.django_site"],
            env=environment,
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, function: str, *arguments: object) -> Any:
        """Call a function of the site. Raises RuntimeError with the site's traceback."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([function, arguments]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def two_sites(folder: Path, *, random_ids: bool) -> Iterator[tuple[Cluster, Proxy, Site, Site]]:
    """Migrated on one node, its file copied to the other, then both daemons started: the recommended way."""
    cluster, (link,) = hub_and_leaves(folder, "", leaves=1, proxied=True, more=RECOMMENDED)
    one, two = cluster.nodes.values()
    with cluster, closing(Site(one.db, random_ids=random_ids)) as first:
        first("migrate")
        first("create_superuser", *ROOT)
        one.execute("VACUUM INTO ?", str(two.db))
        with closing(Site(two.db, random_ids=random_ids)) as second:
            cluster.start()
            yield cluster, link, first, second


def application_data(node: Node) -> Contents:
    found = contents_of(node.db)
    found.pop(LOCAL)
    return found


def quiet(node: Node) -> bool:
    """Connected, nothing pending, nothing known to be on its way."""
    status = node.status()
    return bool(status and status["nats_connected"] and not status["pending_rows"] and not status["catching_up"])


def wait_identical(cluster: Cluster) -> None:
    """Nothing pending on any node, and all of them hold the same rows."""
    nodes = list(cluster.nodes.values())

    def identical() -> bool:
        contents = [application_data(node) for node in nodes]
        return all(map(quiet, nodes)) and all(content == contents[0] for content in contents)

    eventually(identical, 30.0, "identical tables on all nodes", pause_s=0.1)
    for node in nodes:
        assert node.execute("PRAGMA foreign_key_check") == []
        assert node.execute("PRAGMA integrity_check") == [("ok",)]


def known_permissions(node: Node) -> list[tuple[Any, ...]]:
    """With the content types they refer to."""
    sql = "SELECT p.*, t.* FROM auth_permission AS p JOIN django_content_type AS t ON t.id = content_type_id"
    return sorted(node.execute(sql))


def cut(link: Proxy, node: Node) -> None:
    link.set(Link.CUT)
    eventually(lambda: (node.status() or {}).get("nats_error"), 30.0, "the node is offline")


def conflicts(node: Node) -> list[tuple[str, str]]:
    """(table, reason) of every discarded row."""
    return node.execute("SELECT tbl, reason FROM __harmonylite__conflict ORDER BY id")


def test_users_made_and_edited_on_both_nodes_one_of_them_offline(tmp_path: Path) -> None:
    with two_sites(tmp_path, random_ids=True) as (cluster, link, first, second):
        two = cluster.nodes[2]
        first("create_user", "anna", "annas-password")
        second("create_user", "bert", "berts-password")
        session = first("log_in", *ROOT)
        eventually(lambda: second("session_user", session) == "root", what="the session is good on the other node")
        second("admin_add_user", session, "carl", "carls-password")
        wait_identical(cluster)
        assert first("users") == second("users") == ["anna", "bert", "carl", "root"]

        cut(link, two)
        first("create_user", "dora", "doras-password")
        second("create_user", "emil", "emils-password")
        first("admin_edit_user", session, "anna", {"first_name": "Anna"})
        second("admin_edit_user", session, "bert", {"first_name": "Bert", "email": "bert@example.net"})
        first("join_group", "anna", "editors", ["add_user", "change_user"])
        second("join_group", "bert", "readers", ["view_user"])
        second("set_password", "carl", "carls-new-password")
        first("admin_delete_user", session, "bert")  # and what a deletion loses against
        second("edit_user", "bert", {"last_name": "Brecht"})
        elsewhere = second("log_in", *ROOT)

        link.set(Link.PASS)
        wait_identical(cluster)

        for site in (first, second):
            assert site("users") == ["anna", "bert", "carl", "dora", "emil", "root"]
            for name in ("anna", "bert", "dora", "emil"):
                assert site("password_fits", name, f"{name}s-password")
            assert site("password_fits", "carl", "carls-new-password")
            assert not site("password_fits", "carl", "carls-password")
            assert site("may", "anna", "auth.change_user") and site("may", "bert", "auth.view_user")
            assert not site("may", "bert", "auth.change_user")
            assert site("session_user", session) == site("session_user", elsewhere) == "root"
            assert site("admin_log") == [
                "root: Added “carl”.",
                "root: Changed “anna” — Changed First name and Date joined.",
                "root: Changed “bert” — Changed First name, Email address and Date joined.",
                "root: Deleted “bert.”",
            ]


def test_daemon_stopped_for_a_while(tmp_path: Path) -> None:
    with two_sites(tmp_path, random_ids=True) as (cluster, _, first, second):
        one, two = cluster.nodes.values()
        first("create_user", "anna", "annas-password")
        wait_identical(cluster)
        two.stop()
        second("create_user", "bert", "berts-password")
        first("edit_user", "anna", {"first_name": "earlier"})
        second("edit_user", "anna", {"first_name": "later"})
        second("delete_user", "root")
        two.start()
        wait_identical(cluster)
        assert first("users") == second("users") == ["anna", "bert"]
        assert first("password_fits", "bert", "berts-password")
        assert one.execute("SELECT first_name FROM auth_user WHERE username = 'anna'") == [("later",)]
        assert conflicts(one) == conflicts(two) == [("auth_user", "concurrent write")]


def test_automatic_ids_lose_one_of_two_users(tmp_path: Path) -> None:
    """What happens without a remedy: both nodes give the same id to different users, and one row is one user."""
    with two_sites(tmp_path, random_ids=False) as (cluster, link, first, second):
        one, two = cluster.nodes.values()
        cut(link, two)
        anna = first("create_user", "anna", "annas-password")
        bert = second("create_user", "bert", "berts-password")
        assert anna == bert
        link.set(Link.PASS)
        wait_identical(cluster)
        assert first("users") == second("users") == ["bert", "root"]
        for node in (one, two):
            listed = harmonylite(node, "conflicts")
            assert "auth_user" in listed and "username='anna'" in listed and "concurrent write" in listed


def test_migrated_on_each_node_instead_of_copied(tmp_path: Path) -> None:
    """Content types and permissions with other ids on each node: a group's permissions mean nothing elsewhere."""
    cluster, _ = hub_and_leaves(tmp_path, "", leaves=1, more=RECOMMENDED)
    one, two = cluster.nodes.values()
    with (
        cluster,
        closing(Site(one.db, random_ids=True)) as first,
        closing(Site(two.db, random_ids=True)) as second,
    ):
        first("migrate")
        second("migrate")
        first("create_user", "anna", "annas-password")
        cluster.start()
        first("edit_user", "anna", {"first_name": "Anna"})
        first("join_group", "anna", "readers", ["view_user"])
        eventually(lambda: two.execute("SELECT 1 FROM auth_group_permissions"))
        assert first("may", "anna", "auth.view_user")
        assert not second("may", "anna", "auth.view_user")
        assert ("auth_group_permissions", "auth_permission") in {
            (row[0], row[2]) for row in two.execute("PRAGMA foreign_key_check")
        }


def test_later_migrations_one_node_after_the_other(tmp_path: Path) -> None:
    """With the daemon stopped on the node that migrates; the next node waits for the rows of the one before."""
    cluster, _ = hub_and_leaves(tmp_path, "", leaves=1, more=RECOMMENDED)
    one, two = cluster.nodes.values()
    with cluster, closing(Site(one.db, random_ids=True)) as first:
        first("migrate", "auth")  # an early version of the site: no admin, no sessions
        first("create_superuser", *ROOT)
        one.execute("VACUUM INTO ?", str(two.db))
        with closing(Site(two.db, random_ids=True)) as second:
            cluster.start()
            for node, site in ((one, first), (two, second)):
                node.stop()
                site("migrate")
                node.start()
                eventually(lambda: quiet(one) and quiet(two) and known_permissions(one) == known_permissions(two))
            session = first("log_in", *ROOT)
            first("admin_add_user", session, "anna", "annas-password")
            wait_identical(cluster)
            assert second("session_user", session) == "root"
            assert second("admin_log") == ["root: Added “anna”."]
            assert conflicts(one) == conflicts(two) == []


def test_replicated_migration_records_hide_a_migration(tmp_path: Path) -> None:
    """Why django_migrations is excluded: the other node believes that the migration ran there, too."""
    cluster, _ = hub_and_leaves(tmp_path, "", leaves=1)
    one, two = cluster.nodes.values()
    with cluster, closing(Site(one.db, random_ids=True)) as first:
        first("migrate", "auth")
        one.execute("VACUUM INTO ?", str(two.db))
        with closing(Site(two.db, random_ids=True)) as second:
            cluster.start()
            one.stop()
            first("migrate", "sessions")
            one.start()
            eventually(lambda: two.execute("SELECT 1 FROM django_migrations WHERE app = 'sessions'"))
            second("migrate", "sessions")
            assert two.execute("SELECT 1 FROM sqlite_schema WHERE name = 'django_session'") == []


def harmonylite(node: Node, *arguments: str) -> str:
    """The output of one of our commands."""
    done = subprocess.run(
        [sys.executable, "-m", "harmonylite", *arguments, "--config", str(node.config)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout
