"""The house: what every route and every tab is given, so that none of them reaches for a global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clm_app.workspace import Workspace

if TYPE_CHECKING:
    from clm_app.serving.router import Router


@dataclass
class House:
    """One running app. `router` is None until models can be served; the rest of the app works without it."""

    workspace: Workspace
    router: Router | None = None
    page: Any = None  # the inner ASGI app with the page; None until it is built
    page_problem: str = ""  # one sentence, where the page could not be built
    address: str = ""  # http://127.0.0.1:<port>, known once the port is open
    actor: str = "local"  # who the record names for what is done here
    is_stopping: bool = False  # long answers end themselves when this turns true

    @property
    def page_is_ready(self) -> bool:
        """Whether the page answers, buttons included."""
        return self.page is not None
