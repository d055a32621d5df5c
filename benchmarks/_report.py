"""What every benchmark shares: its arguments, its tables, its figures with their targets, and an interval over repeats.

Imported before torch, so that a benchmark runs under the same environment that launch.py gives to the app.
"""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from launch import PRIVATE, TUNED

os.environ.update(PRIVATE)
for _name, _value in TUNED.items():
    os.environ.setdefault(_name, _value)

import psutil
from rich.console import Console
from rich.table import Table
from scipy import stats

from clm_app import hardware
from clm_app.errors import BadData, ClmError
from clm_app.provenance import ROOT, code_version

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of names that peers still use
WORK = ROOT / ".benchmarks"
DATA = ROOT.parent / "shared" / "data"  # a folder of data sets, each in a folder of its own name
CLINC150 = DATA / "clinc150"
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class Figure(NamedTuple):
    """One measured number. target: the number it is held to, as text; holds: None where nothing is judged."""

    name: str
    value: float
    target: str | None = None
    holds: bool | None = None


def figure(
    name: str, value: float, *, at_least: float | None = None, at_most: float | None = None, judged: bool = True
) -> Figure:
    """Return a figure and whether it meets its bound; not judged where the work was cut short."""
    if at_least is None and at_most is None:
        return Figure(name, round(value, 4) + 0.0)  # no negative zero
    if at_least is not None:
        target, holds = f"at least {at_least:g}", value >= at_least
    else:
        target, holds = f"at most {at_most:g}", value <= at_most
    return Figure(name, round(value, 4), target, bool(holds) if judged else None)


def arguments(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute, to see that it works; judges nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one repeat for each")
    return parser


def clinc150(folder: Path) -> Path:
    """Return the folder where it is there.

    Raises:
        BadData: it is not, or holds something else.
    """
    for name in ("domains.json", "data_full.json.gz"):
        if not (folder / name).exists():
            raise BadData(
                f"{folder} has no {name}; this benchmark learns the ten domains of CLINC150. Name its folder with --data "
                "(github.com/clinc/oos-eval has data_full.json, to be gzipped, and domains.json)."
            )
    return folder


def interval(values: list[float], level: float = 0.95) -> tuple[float, float | None]:
    """Return the mean and half the width of its t interval; None for the width of fewer than two values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    margin = stats.t.ppf(0.5 + level / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, float(margin)


def plus_minus(values: list[float], digits: int = 3) -> str:
    """Return "0.912 ± 0.010", or the value alone where there is only one."""
    mean, margin = interval(values)
    return f"{mean:.{digits}f}" + ("" if margin is None else f" ± {margin:.{digits}f}")


def table(title: str, columns: list[str], rows: list[list], notes: str = "") -> None:
    """Print a table; the first column is text, the others are numbers or ready-made text."""
    made = Table()
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    for part in (f"\n[bold]{title}[/]", made, *([notes] if notes else [])):
        console.print(part)


def verdicts(figures: list[Figure]) -> None:
    """Print what was held to a target."""
    words = {True: "[green]holds[/]", False: "[red]missed[/]", None: "not judged"}
    judged = [[f.name, f.value, f.target, words[f.holds]] for f in figures if f.target]
    if judged:
        table("Targets", ["figure", "measured", "target", ""], judged)


def write(file: Path | None, figures: list[Figure], settings: dict, raw: object = None) -> None:
    """Write figures, machine, libraries, settings and raw results as JSON, where a file was asked for."""
    if file is None:
        return
    content = {
        "figures": [f._asdict() for f in figures], "settings": settings,
        "hardware": hardware.description()
        | {"system": platform.system(), "load_at_end": [round(load, 2) for load in psutil.getloadavg()]},
        "libraries": libraries(), "code": code_version(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "raw": raw,
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def chosen(options: argparse.Namespace) -> dict:
    """Return the command line for a report; of files and folders the name alone, for a path tells of one machine."""
    return {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}


def libraries() -> dict[str, str]:
    """Return the versions that decide a figure, the peers' too where they are installed."""
    found = dict(hardware.libraries())
    for name in ("trl", "datasets"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass  # only training_speed needs them, and says so
    return found


def machine() -> str:
    """Return one line on the machine and how busy it is."""
    busy = ", ".join(f"{load:.1f}" for load in psutil.getloadavg())
    cards = "; ".join(card["name"] for card in hardware.gpus()) or "no GPU"
    return f"{psutil.cpu_count()} CPU cores, load {busy} (1, 5, 15 minutes), {cards}"


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; a refusal ends it with its sentence and exit code 2."""
    try:
        main()
    except ClmError as refusal:
        console.print(f"[red]{refusal}[/]", soft_wrap=True)
        sys.exit(2)
