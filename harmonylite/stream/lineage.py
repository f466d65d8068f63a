"""Whether a stream is still the log that a position was taken in: the gap test, made after every connect."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from nats.aio.client import Client

from harmonylite.model import Position
from harmonylite.stream.log import LogSettings, StreamState, parse_time_ns, stored_time_ns, stream_state

# A direct get may be answered by a replica that has not caught up: ask again before believing "no such message".
_LAGGING_REPLICA_WAITS_S = (0.0, 0.1, 0.5)


@dataclass(frozen=True, slots=True)
class Lineage:
    """Whether a stream is still the log that a position was taken in; `reason` says why not."""

    intact: bool
    reason: str = ""


INTACT = Lineage(True)


def compare_lineage(state: StreamState, position: Position, found_ns: int | None) -> Lineage:
    """The gap test: may reading go on after `position`?

    `found_ns`: the time of the message now at the position's sequence, None if there is none; it only counts where
    the stream should hold that message and the position knows its time. A log that lost its tail keeps `created` and
    gives the same sequence numbers out again, which only this time tells. Where that message is gone, too, the log may
    have lost it and what came in its place: only of its last message a stream tells the time all the same.
    """
    if position.created and not _same_instant(position.created, state.created):
        return Lineage(False, f"the stream was created anew at {state.created}")
    if state.first_seq > position.sequence + 1:
        return Lineage(False, f"messages {position.sequence + 1} to {state.first_seq - 1} were discarded")
    if state.last_seq < position.sequence:
        return Lineage(False, f"the stream ends at {state.last_seq}, before {position.sequence}")
    if _is_just_gone(state, position):
        if state.last_seq > position.sequence or state.last_ns is None:
            reason = f"message {position.sequence} was discarded: whether it was the one read here is not known"
            return Lineage(False, reason)
        found_ns = state.last_ns
    elif not _time_decides(state, position):
        return INTACT
    if found_ns is None:
        return Lineage(False, f"message {position.sequence} is missing")
    if found_ns != position.stored_ns:
        return Lineage(False, f"message {position.sequence} is another one than before")
    return INTACT


def _is_just_gone(state: StreamState, position: Position) -> bool:
    """Whether the stream begins with the very next message. Without a time the position was put before that one."""
    return position.stored_ns != 0 and state.first_seq == position.sequence + 1


def note_emptied(emptied: dict[str, Position], state: StreamState, position: Position) -> None:
    """Remember (by stream) that a log was the same when all up to the position, and nothing else, was gone from it."""
    if _is_just_gone(state, position) and compare_lineage(state, position, None).intact:
        emptied[state.name] = position


def goes_on_from_empty(state: StreamState, position: Position) -> bool:
    """Whether reading may go on after a position that was noted by `note_emptied`: what came since, came after it. It
    would not begin there any more if anything had been discarded again."""
    return state.first_seq == position.sequence + 1 and _same_instant(position.created, state.created)


def _time_decides(state: StreamState, position: Position) -> bool:
    return position.stored_ns != 0 and 0 < state.first_seq <= position.sequence <= state.last_seq


def _same_instant(one: str, other: str) -> bool:
    return one == other or parse_time_ns(one) == parse_time_ns(other)


async def same_log(client: Client, settings: LogSettings, state: StreamState, position: Position) -> Lineage:
    """Compare a position with the stream as it is now, after every connect. Raises StreamUnavailable or ApiError."""
    lineage = compare_lineage(state, position, position.stored_ns)
    if not lineage.intact or not _time_decides(state, position):
        return lineage
    for wait_s in _LAGGING_REPLICA_WAITS_S:
        await asyncio.sleep(wait_s)
        found_ns = await stored_time_ns(client, settings, state, position.sequence)
        if found_ns is not None:
            return compare_lineage(state, position, found_ns)
    state = await stream_state(client, settings, state.name)  # discarded since `state` was asked for?
    return compare_lineage(state, position, None)
