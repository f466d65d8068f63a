"""Rules of the engine, each broken on purpose: the simulation must notice. `python -m tests.sim.mutations` says how."""

from __future__ import annotations

from tests.sim.mutations import applying, capture, limits, refilling, snapshots, tombstones, versions

MUTATIONS = (
    *versions.MUTATIONS,
    *capture.MUTATIONS,
    *applying.MUTATIONS,
    *snapshots.MUTATIONS,
    *tombstones.MUTATIONS,
    *refilling.MUTATIONS,
    *limits.MUTATIONS,
)
