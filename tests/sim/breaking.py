"""Breaks a rule of the engine on purpose and looks whether the simulation notices.

A mutation is a small edit of one or more functions, applied to their code while a `with` lasts. An edit whose text
is no longer in the function is an error: the table of mutations has to follow the code.
"""

from __future__ import annotations
import __future__

import contextlib
import importlib
import inspect
import random
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass

from tests.sim.generator import Generator
from tests.sim.history import History
from tests.sim.world import HistoryFailed, run

# A rule that so many histories do not miss is not tested.
MAX_HISTORIES = 1_500


@dataclass(frozen=True)
class Edit:
    """`function` ("module:qualified.name") with `old`, which it must contain, replaced by `new`."""

    function: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """A broken rule. `tables` and `profile`: the kinds of history that can show it soonest; empty: any.
    `first`: histories to begin with, where random ones find it too seldom.
    """

    rule: str
    edits: tuple[Edit, ...]
    tables: tuple[str, ...] = ()
    profile: str = ""
    first: tuple[History, ...] = ()


@contextlib.contextmanager
def broken(mutation: Mutation) -> Iterator[None]:
    """The engine with a rule broken, while it lasts. Raises LookupError if an edit does not fit the code."""
    originals: list[tuple[types.FunctionType, types.CodeType]] = []
    try:
        for function_name in dict.fromkeys(edit.function for edit in mutation.edits):
            function = _find(function_name)
            edits = [edit for edit in mutation.edits if edit.function == function_name]
            originals.append((function, function.__code__))
            function.__code__ = _edited(function, edits)
        yield
    finally:
        for function, code in originals:
            function.__code__ = code


def _find(name: str) -> types.FunctionType:
    module, _, path = name.partition(":")
    found: object = importlib.import_module(module)
    for part in path.split("."):
        found = inspect.getattr_static(found, part)
    found = getattr(found, "__func__", found)
    if not isinstance(found, types.FunctionType):
        raise LookupError(f"{name} is not a function")
    return found


def _edited(function: types.FunctionType, edits: list[Edit]) -> types.CodeType:
    """The code of a function with parts of its text replaced."""
    text = textwrap.dedent(inspect.getsource(function))
    for edit in edits:
        if text.count(edit.old) < 1:
            raise LookupError(f"{edit.function} does not contain {edit.old!r}")
        text = text.replace(edit.old, edit.new)
    text = text[text.index("def ") :]  # a decorator wraps the function that we change
    flags = __future__.annotations.compiler_flag
    module = compile(text, f"<{function.__qualname__}, broken>", "exec", flags=flags, dont_inherit=True)
    return next(part for part in module.co_consts if isinstance(part, types.CodeType))


@dataclass(frozen=True)
class Caught:
    """How a broken rule was noticed: after how many histories, and by what."""

    histories: int
    failure: HistoryFailed


def catch(mutation: Mutation, limit: int = MAX_HISTORIES) -> Caught | None:
    """Histories with the rule broken until one fails that passes otherwise; None: nothing is noticed."""
    for number, history in enumerate(_histories(mutation, limit), 1):
        with broken(mutation):
            failure = _failure(history)
        if failure is not None and _failure(history) is None:
            return Caught(number, failure)
    return None


def _histories(mutation: Mutation, limit: int) -> Iterator[History]:
    yield from mutation.first
    for number in range(limit):
        source = random.Random(f"{mutation.rule} {number}")
        yield Generator(source, mutation.tables or None, mutation.profile or None).history()


def _failure(history: History) -> HistoryFailed | None:
    try:
        run(history)
    except HistoryFailed as failed:
        return failed
    return None
