"""Which code made a version: the package's version and a digest over its own source files."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from clm_app import __version__

ROOT = Path(__file__).parent.parent


@cache
def code_version() -> str:
    """Return "0.1.0+<12 hex>"; the digest changes with any line of the app's Python files."""
    digest = hashlib.sha256()
    for room in ("clm_app", "jobs", "store"):
        for file in sorted((ROOT / room).rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"
