"""Take the pictures of the README from an app that is open: `python docs/screenshots.py http://127.0.0.1:7860`.

Needs the test extra (Playwright) and a Chromium; CLM_CHROMIUM names another program than Debian's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


def shoot(address: str, out: Path, tabs: list[str], width: int = 1400, dark: bool = False) -> None:
    """Write one full-page picture per tab to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = os.environ.get("CLM_CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto(address + ("/?__theme=dark" if dark else "/?__theme=light"))
        for tab in tabs:
            page.get_by_role("tab", name=tab).click(timeout=60_000)
            page.wait_for_timeout(3500)
            page.screenshot(path=out / f"{tab.lower()}.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    chosen = sys.argv[3:] or ["Home", "Data", "Train", "Models", "Playground"]
    shoot(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent), chosen)
