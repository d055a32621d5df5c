"""Run every benchmark, or those named: `python -m benchmarks [gate retention training_speed starter_tuning] [flags]`.

Each runs in a process of its own, so that none inherits the warm caches of another.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Pass the flags on to each benchmark and return how many failed."""
    known = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
    flags = sys.argv[1:]
    named = []
    while flags and not flags[0].startswith("-"):
        named.append(flags.pop(0))
    if unknown := set(named) - set(known):
        print(f"There is no benchmark {min(unknown)!r}; there are {', '.join(known)}.", file=sys.stderr)
        return 2
    failed = 0
    for name in named or known:
        failed += subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *own(flags, name, len(named) != 1)]) != 0
    return failed


def own(flags: list[str], name: str, is_one_of_several: bool) -> list[str]:
    """Return the flags with a --json file of this benchmark's own: figures.json becomes figures-retention.json."""
    flags = list(flags)
    if is_one_of_several and "--json" in flags[:-1]:
        at = flags.index("--json") + 1
        flags[at] = str(Path(flags[at]).with_stem(f"{Path(flags[at]).stem}-{name}"))
    return flags


if __name__ == "__main__":
    sys.exit(main())
