"""Run every benchmark, or those named: `python -m benchmarks [retention training_speed starter_tuning] [flags]`.

Each runs in a process of its own, so that none inherits the warm caches of another.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Pass the flags on to each benchmark and return the number that failed."""
    known = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
    flags = sys.argv[1:]
    named = []
    while flags and not flags[0].startswith("-"):
        named.append(flags.pop(0))
    if unknown := set(named) - set(known):
        print(f"There is no benchmark {min(unknown)!r}; there are {', '.join(known)}.", file=sys.stderr)
        return 2
    return sum(subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *flags]) != 0 for name in named or known)


if __name__ == "__main__":
    sys.exit(main())
