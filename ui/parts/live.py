"""Live parts: pieces of the page that follow the record, read anew at every tick and sent only where they changed.

The browser holds no truth. A page that is reloaded, or opened a second time, reads the same rows and files and so
comes back to the job that runs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import pandas

from clm_app.errors import ClmError, plain
from ui.parts.words import notice

LOG = logging.getLogger("clm.ui")


@dataclass
class Live:
    """What `read(*values of inputs)` returns goes into `shows`: one value, or as many as there are components."""

    shows: list[gr.components.Component]
    read: Callable[..., Any]
    inputs: list[gr.components.Component] = field(default_factory=list)
    logged: str = ""

    def values(self, given: tuple[Any, ...]) -> list[Any]:
        """Return a value for each component; a refusal becomes its sentence in the first drawing."""
        try:
            found = self.read(*given)
            return [found] if len(self.shows) == 1 else list(found)
        except Exception as err:  # the border of a tick: the other parts of the page go on
            if not isinstance(err, ClmError) and repr(err) != self.logged:
                self.logged = repr(err)  # once, not at every tick
                LOG.exception("a part of the page could not be read")
            drawing = next((c for c in self.shows if isinstance(c, gr.HTML)), None)
            return [notice(plain(err), "problem") if c is drawing else gr.skip() for c in self.shows]


def drawing(value: str = "", **more: Any) -> gr.HTML:
    """Return an HTML component for our own drawings, without the typography of running text."""
    return gr.HTML(value, apply_default_css=False, padding=False, **({"js_on_load": None} | more))


def digest(value: Any) -> str:
    """Return a short mark that changes when the value does."""
    text = value.to_csv() if isinstance(value, pandas.DataFrame) else repr(value)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
