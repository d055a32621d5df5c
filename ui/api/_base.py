"""The contract of a file of routes: it is made with the house and gives one router."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fastapi import APIRouter

if TYPE_CHECKING:
    from ui.house import House


class Api:
    """Some routes of the app. `house.workspace` is what is remembered, `house.router` is who answers."""

    name: ClassVar[str]  # the file's stem, set by the catalog

    def __init__(self, house: House) -> None:
        self.house = house

    def routes(self) -> APIRouter:
        """Return the routes, ready to be included."""
        raise NotImplementedError


CONTRACT = Api
