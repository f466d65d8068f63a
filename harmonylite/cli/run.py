"""`run`: the daemon, in the foreground."""

from __future__ import annotations

import argparse

from harmonylite.cli.command import Command, load_config


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments)
    # Only this command needs asyncio, NATS and the rest.
    from harmonylite import daemon

    return daemon.run(config, reload=lambda: load_config(arguments))


COMMAND = Command(
    name="run",
    summary="run the daemon in the foreground",
    description="Run the daemon in the foreground until SIGTERM or Ctrl-C. This is what the systemd service starts.",
    examples=(
        "harmonylite run --config /etc/harmonylite/config.toml",
        "harmonylite run --config node2.toml --node-id 2 --leaf-servers nats-leaf://hub:7422",
    ),
    run=run,
)
