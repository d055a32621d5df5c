"""What a public suite says of a version: a row for each metric of each task, with its standard error."""

from __future__ import annotations

from typing import Any

from ui.parts.words import card, safe, span, table


def suite(result: dict[str, Any]) -> str:
    """Return a suite job's result as HTML. result: as `jobs.suite.Suite.go` gives it."""
    rows = [
        [safe(task), safe(metric), _number(told["value"]), _number(told["standard_error"])]
        for scored in result["scores"].values()
        for task, metrics in scored["figures"].items()
        for metric, told in metrics.items()
    ]
    took = span(sum(scored["seconds"] for scored in result["scores"].values()))
    drawn = table(["Task", "Metric", "Value", "Standard error"], rows, "In the harness's own words", is_safe=True)
    return card(f"What the suite says of {result['version']}", drawn, f"lm-eval {result['harness']}, {took}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
