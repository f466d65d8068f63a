"""Prints every rule with the property that caught its absence."""

from __future__ import annotations

import sys
import time

from tests.sim.breaking import catch
from tests.sim.mutations import MUTATIONS


def main() -> int:
    """The exit code. Arguments: parts of rules; none: all rules."""
    missed = 0
    for mutation in MUTATIONS:
        if sys.argv[1:] and not any(part in mutation.rule for part in sys.argv[1:]):
            continue
        started = time.monotonic()
        caught = catch(mutation)
        missed += caught is None
        noticed = f"history {caught.histories}: {caught.failure.error}" if caught else "NOT NOTICED"
        print(f"{mutation.rule} ({time.monotonic() - started:.1f} s)\n    {noticed[:150]}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
