"""The simulation would notice: each rule of mutations/, broken on purpose, makes a history fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sim.breaking import Mutation, broken, catch
from tests.sim.mutations import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.rule)
def test_the_edits_fit_the_code(mutation: Mutation) -> None:
    with broken(mutation):
        pass


def test_the_documentation_lists_every_rule() -> None:
    text = Path(__file__).parents[2].joinpath("docs/simulation.md").read_text()
    assert [mutation.rule for mutation in MUTATIONS if f"\n- {mutation.rule}\n" not in text] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.rule)
def test_a_broken_rule_is_noticed(mutation: Mutation) -> None:
    caught = catch(mutation)
    assert caught is not None, f"no history notices that this rule is broken: {mutation.rule}"
