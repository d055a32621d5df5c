"""One HTML file that needs nothing else: the page's own drawings with its stylesheet inside, for the browser and the printer."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import clm_app
from ui.parts.words import safe

STYLES = Path(__file__).parent / "page.css"
# What Gradio's theme gives on the page; a report follows the reader's own choice of light or dark, and prints light.
ALONE = """
:root { color-scheme: light dark; --block-background-fill: #ffffff; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; margin: 0 auto; padding: 24px 18px;
  max-width: 1280px; background: #f4f6f8; color: var(--clm-ink); }
h1 { font-size: 1.35rem; margin: 0; } .clm-card { margin-top: 14px; }
.clm-tall { max-height: none; }
"""
DARK = """
@media screen and (prefers-color-scheme: dark) { %s :root { --block-background-fill: #182028; } body { background: #10161b; } }
"""
PRINT = """
@page { size: landscape; margin: 12mm; }
@media print { body { background: none; padding: 0; max-width: none; }
  .clm-scroll, .clm-tall { overflow: visible; max-height: none; }
  .clm-card { break-inside: auto; border-color: #999; } tr, article, figure, svg { break-inside: avoid; }
  .clm-plot { max-width: 100%; height: auto; } thead { display: table-header-group; } .clm-wide .clm-table { min-width: 0; }
  .clm-table { font-size: 8pt; } .clm-standing .clm-table { min-width: 0; } .clm-standing small { white-space: normal; } }
"""


def report(title: str, body: str) -> str:
    """Return a whole document. body: HTML as the parts give it; it may load nothing, and the document says so itself."""
    made = f"made by CLM {clm_app.__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"content-security-policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{safe(title)}</title><style>{_styles()}</style></head>"
        f'<body><h1>{safe(title)}</h1><p class="clm-quiet">{safe(made)}</p>{body}</body></html>\n'
    )


def _styles() -> str:
    page = STYLES.read_text(encoding="utf-8")
    dark = "".join(f":root {{{block.split('}', 1)[0]}}}" for block in page.split(".dark {")[1:])
    return page + ALONE + DARK % dark + PRINT
