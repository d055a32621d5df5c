"""The contract of a file of routes: it is made with the house and gives one router."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fastapi import APIRouter, UploadFile

from clm_app.errors import BadData

if TYPE_CHECKING:
    from ui.house import House


MB = 1024 * 1024


class Api:
    """Some routes of the app. `house.workspace` is what is remembered, `house.router` is who answers."""

    name: ClassVar[str]  # the file's stem, set by the catalog

    def __init__(self, house: House) -> None:
        self.house = house

    def routes(self) -> APIRouter:
        """Return the routes, ready to be included."""
        raise NotImplementedError

    def receive(self, file: UploadFile, path: Path) -> None:
        """Write an upload to `path`, block by block.

        Raises:
            BadData: it is larger than the app's settings allow.
        """
        most, written = self.house.workspace.settings.max_file_mb, 0
        with open(path, "wb") as out:
            while block := file.file.read(MB):
                written += len(block)
                if written > most * MB:
                    raise BadData(f"{path.name} is larger than {most} MB. Split it, or raise CLM_MAX_FILE_MB.")
                out.write(block)


CONTRACT = Api
