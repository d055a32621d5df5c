"""Write docs/settings.md from the code: every knob with its default, bound and meaning, so that the table cannot lie.

`python docs/make.py` writes it; `python docs/make.py --check` exits with 1 where the file is older than the code.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from pydantic import BaseModel  # noqa: E402

from clm_app.catalog import shelf  # noqa: E402
from clm_app.engine.examiner import ExaminationSettings  # noqa: E402
from clm_app.engine.settings import TrainingSettings  # noqa: E402
from clm_app.judging.bisect import BisectWish  # noqa: E402
from clm_app.judging.gate import GateSettings  # noqa: E402
from clm_app.judging.pairwise import JudgingSettings  # noqa: E402
from clm_app.judging.parity import ParitySettings  # noqa: E402
from clm_app.repairs._base import RepairSettings  # noqa: E402
from clm_app.settings import Settings  # noqa: E402
from clm_app.wishes import ExamineWish, LearnWish, SuiteWish  # noqa: E402
from ui.comparing import PromptsWish, Side  # noqa: E402
from ui.judging import JudgedWish  # noqa: E402

INTRODUCTION = "# Settings\n\nWritten by `python docs/make.py` from the code's own models; change it there.\n"
SHELVES = (
    ("clm_app.strategies", "Strategy"), ("clm_app.methods", "Method"), ("clm_app.probes", "Probe"),
    ("clm_app.probes.kinds", "Kind of benchmark"),
)  # fmt: skip
SIGNS = {"Ge": ("≥", "ge"), "Gt": (">", "gt"), "Le": ("≤", "le"), "Lt": ("<", "lt")}


def table(title: str, model: type[BaseModel], note: str = "") -> str:
    """Return a Markdown section with one row per field of a model."""
    rows = []
    for name, field in model.model_fields.items():
        bounds = [
            f"{SIGNS[k][0]} {getattr(m, SIGNS[k][1])}" for m in field.metadata if (k := type(m).__name__) in SIGNS
        ]
        given = "" if field.default_factory or field.is_required() else repr(field.default)
        rows.append(f"| `{name}` | {given} | {', '.join(bounds)} | {field.description or ''} |")
    body = "\n".join(rows) if rows else "| (none) | | | |"
    return f"\n## {title}\n\n{note}\n\n| knob | default | bounds | meaning |\n|---|---|---|---|\n{body}\n"


def page() -> str:
    """Return the whole page."""
    parts = [
        INTRODUCTION,
        table("The app", Settings, "Environment variables: `CLM_` and the name in capitals, such as `CLM_PORT`."),
        table("A learn job", LearnWish, "Body of `POST /api/learn`, and the form of the Train tab."),
        table("Training", TrainingSettings),
        table("Gate", GateSettings),
        table("Repair", RepairSettings, "Under `repair` of a learn job."),
        table("Export parity", ParitySettings, "`CLM_PARITY`, as a JSON object."),
        table("An examination", ExamineWish, "Body of `POST /api/examine`, and the form of the Benchmarks tab."),
        table("How an examination asks", ExaminationSettings, "Under `run` of an examination."),
        table("The search for an update", BisectWish, "Body of `POST /api/bisect`, and a form of the Compare tab."),
        table(
            "A public suite", SuiteWish, "Body of `POST /api/suites`, and a form of the Benchmarks tab. Needs lm-eval."
        ),
        table(
            "Prompts to two sides", PromptsWish, "Body of `POST /api/compare/prompts`, and a form of the Compare tab."
        ),
        table("A model as judge", JudgedWish, "Body of `POST /api/compare/judged`, and a form of the Compare tab."),
        table("A side, or a judge", Side, "Under `left`, `right` and `judge` of the two before."),
        table("How a judge is asked", JudgingSettings, "Under `judging`."),
    ]
    for package, word in SHELVES:
        for name, cls in shelf(package).items():
            needs = getattr(cls, "needs", "")
            parts.append(table(f"{word}: {name}", cls.Settings, cls.title + (f". Needs {needs}." if needs else ".")))
    return "".join(parts)


if __name__ == "__main__":
    file = HERE / "settings.md"
    if "--check" in sys.argv:
        sys.exit(file.read_text(encoding="utf-8") != page())
    file.write_text(page(), encoding="utf-8")
