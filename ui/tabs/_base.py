"""The contract of a tab: its title, its place in the row, what it builds, and which of its parts are live."""

from __future__ import annotations

from typing import ClassVar

from ui.house import House
from ui.parts.live import Live


class Tab:
    """One tab of the page. `build` runs once, inside the tab; the page reads `live` afterwards and at each tick."""

    name: ClassVar[str]  # the file's stem, set by the catalog
    title: ClassVar[str] = ""
    order: ClassVar[int] = 100  # smaller stands further left

    def __init__(self, house: House) -> None:
        self.house, self.workspace = house, house.workspace

    def build(self) -> list:
        """Make the widgets and their events; return the events after which the page is read anew at once."""
        return []

    def live(self) -> list[Live]:
        """Return the parts that follow the record while this tab is open."""
        return []


CONTRACT = Tab
