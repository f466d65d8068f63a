"""After an upgrade: messages that an earlier version had to pass over are read again (see `db.unread`)."""

from __future__ import annotations

import logging

from nats.aio.client import Client

from harmonylite.db.unread import OpenGroup, Rereading
from harmonylite.engine import Engine
from harmonylite.model import Position
from harmonylite.stream.lineage import same_log
from harmonylite.stream.log import LogSettings, stored_time_ns, stream_state

log = logging.getLogger(__name__)


async def read_again(engine: Engine, client: Client, settings: LogSettings) -> None:
    """Unless this version has done it. Raises LogError when the log cannot be asked; done again by the next call."""
    replica, clock = engine.replica, engine.time
    if not await is_due(engine):
        return
    rereading = await engine.write(lambda: Rereading(replica))
    while await engine.write_gently(lambda: rereading.step(clock.bound_ms(), clock.correction)):
        pass
    # Of several in one stream the first decides where reading goes on.
    groups = sorted(rereading.open_groups(), key=lambda each: each.first, reverse=True)
    done = [await _go_back(engine, client, settings, rereading, group) for group in groups]
    if not all(done):
        return
    await engine.write(rereading.finish)
    fields = {"groups": rereading.applied, "messages_left": replica.completeness.unread_messages}
    log.info("messages that could not be read by an earlier version were read again", extra={"fields": fields})


async def is_due(engine: Engine) -> bool:
    """Whether there are some that this version has not read again, or not yet to the end."""
    return await engine.write(lambda: Rereading.due(engine.replica))


async def _go_back(
    engine: Engine, client: Client, settings: LogSettings, rereading: Rereading, group: OpenGroup
) -> bool:
    """Half of a group was passed over, the rest may be in the stream still: it is read from its first message. False:
    it is not known yet whether that can be."""
    position = await engine.position(group.stream)
    if (
        group.stream not in settings.streams
        or position is None
        or position.created != group.created
        or position.sequence < group.first  # the log lost its end, and gives that number out again
    ):
        await engine.write(lambda: rereading.give_up(group))
        return True
    state = await stream_state(client, settings, group.stream)
    if not (await same_log(client, settings, state, position)).intact:
        return False  # that gap comes first
    before = group.first - 1
    stored_ns = await stored_time_ns(client, settings, state, before) if before else None
    await engine.write(
        lambda: rereading.go_back(group, Position(group.stream, group.created, before, stored_ns or 0)),
    )
    return True
