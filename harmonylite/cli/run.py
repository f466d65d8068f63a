"""`run`: the daemon, in the foreground."""

from __future__ import annotations

import argparse

from harmonylite.cli.command import Command, load_config
from harmonylite.config import Config
from harmonylite.observe import log as logs
from harmonylite.observe.notify import Notifier
from harmonylite.starts import Starts


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments)
    starts = Starts.of_service()
    if starts is not None and not _begin(starts, config):
        return 0
    # Only this command needs asyncio, NATS and the rest.
    from harmonylite import daemon

    code = daemon.run(config, reload=lambda: load_config(arguments))
    if starts is not None and code == 0:
        starts.ended_well()
    return code


def _begin(starts: Starts, config: Config) -> bool:
    """See `Starts.begin`."""
    logs.setup(verbose=config.logging.verbose, format=config.logging.format)  # type: ignore[arg-type]
    notifier = Notifier()
    try:
        return starts.begin(notifier)
    finally:
        notifier.close()


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
