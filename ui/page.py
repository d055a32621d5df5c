"""The page: a header, the tabs of the shelf, and one timer that keeps what is open true to the record."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

import clm_app
from clm_app import hardware
from clm_app.catalog import shelf
from ui import questions
from ui.house import House
from ui.parts.hardware import hardware_strip
from ui.parts.live import Live, digest, drawing
from ui.parts.theme import theme
from ui.parts.words import moment, safe

TICK_S = 2.0
EVERYWHERE = ""  # live parts that every tab shows


def mounted(house: House) -> FastAPI:
    """Return an app with the page at its root; whoever serves it has to enter its lifespan."""
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), build(house), path="/",
        server_name="127.0.0.1", theme=theme(), css_paths=[Path(__file__).parent / "parts" / "page.css"],
        footer_links=[], run_history=False, show_error=False, ssr_mode=False, pwa=False, mcp_server=False,
        max_file_size=f"{house.workspace.settings.max_file_mb}mb",
    )  # fmt: skip


def build(house: House) -> gr.Blocks:
    """Return the whole page."""
    tabs = sorted((cls(house) for cls in shelf("ui.tabs").values()), key=lambda tab: tab.order)
    with gr.Blocks(title="CLM", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86_400)) as page:
        header = drawing(elem_id="clm-header")
        parts = [(EVERYWHERE, Live([header], partial(_header, house)))]
        opened = gr.State(tabs[0].name)
        items, acts = [], []
        with gr.Tabs(elem_id="clm-tabs"):
            for tab in tabs:
                with gr.Tab(tab.title, id=tab.name) as item:
                    acts += tab.build()
                items.append((tab.name, item))
                parts += [(tab.name, live) for live in tab.live()]
        _keep_true(page, opened, items, acts, parts)
    for event in page.fns.values():
        event.api_visibility = "private"  # Gradio would offer each handler as a public endpoint
    return page


def _keep_true(
    page: gr.Blocks, opened: gr.State, items: list[tuple[str, gr.Tab]], acts: list, parts: list[tuple[str, Live]]
) -> None:
    """Read the live parts when the page loads, when a tab is opened, at each tick, and after each act or choice."""
    sent = gr.State({})
    inputs = [widget for _, live in parts for widget in live.inputs]
    outputs = [widget for _, live in parts for widget in live.shows]
    read = partial(_read, parts)
    # queue=False: a third less work per tick, and a tick never waits behind an answer that is being streamed
    quiet = {"show_progress": "hidden", "queue": False}
    page.load(partial(read, True), [opened, sent, *inputs], [sent, *outputs], **quiet)
    gr.Timer(TICK_S).tick(partial(read, False), [opened, sent, *inputs], [sent, *outputs], **quiet)
    for name, item in items:
        item.select(partial(_open, name), None, opened, **quiet).then(
            partial(read, True), [opened, sent, *inputs], [sent, *outputs], **quiet
        )
    for widget in {widget._id: widget for widget in inputs}.values():
        widget.input(
            partial(read, False), [opened, sent, *inputs], [sent, *outputs], trigger_mode="always_last", **quiet
        )
    for act in acts:
        act.then(partial(read, False), [opened, sent, *inputs], [sent, *outputs], **quiet)


def _open(name: str) -> str:
    return name


def _read(parts: list[tuple[str, Live]], is_all: bool, opened: str, sent: dict, *given: Any) -> list[Any]:
    """Return `sent` and a value for each live component; what did not change, or is not open, is skipped."""
    given, found, sent = list(given), [], dict(sent)
    for place, (tab, live) in enumerate(parts):
        mine, given = given[: len(live.inputs)], given[len(live.inputs) :]
        if tab not in (opened, EVERYWHERE):
            found += [gr.skip() for _ in live.shows]
            continue
        for slot, value in enumerate(live.values(tuple(mine))):
            mark, key = digest(value), f"{place}.{slot}"
            found.append(gr.skip() if sent.get(key) == mark and not is_all else value)
            sent[key] = mark
    return [sent, *found]


def _header(house: House) -> str:
    story = questions.live_story(house.workspace)
    version, since = story["version"], moment(story["deployment"].created_at)
    return (
        f'<header class="clm-header"><div class="clm-name"><b>CLM</b><small>{safe(clm_app.__version__)}</small></div>'
        f'<div class="clm-now"><span class="clm-dot" aria-hidden="true"></span>live: <b>{safe(version.name)}</b> '
        f"<small>since {since}</small></div>{hardware_strip(hardware.reading(house.workspace.home))}</header>"
    )
