#!/usr/bin/python3 -I
# The command /usr/bin/harmonylite. -I: what PYTHONPATH, the user's folder or the working directory hold is not
# imported by a program that root runs. NATS's client is not in Debian; it lies beside our own modules.
import os
import sys

LIBRARY = "/usr/share/harmonylite"

sys.path.insert(0, LIBRARY)
# For further processes of our own (`harmonylite demo` starts daemons with `python3 -m harmonylite`).
os.environ["PYTHONPATH"] = LIBRARY

from harmonylite.cli.main import entry  # noqa: E402

entry()
