"""The workspace: one folder with the record, the objects and the runs, and the settings that hold for it."""

from __future__ import annotations

import os
from pathlib import Path

from clm_app.errors import OutOfRoom
from clm_app.settings import Settings
from store.db import Database, Home
from store.objects import Objects


class Workspace:
    """Everything that belongs to one home folder. `lock=True` makes this process its one writer."""

    def __init__(self, settings: Settings | None = None, *, lock: bool = True) -> None:
        self.settings = settings or Settings()
        self.home = Path(self.settings.home).expanduser().resolve()
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            if os.name == "posix":
                self.home.chmod(0o700)
        except OSError as err:
            raise OutOfRoom(
                f"The workspace {self.home} cannot be made: {err.strerror}. Choose another with --home."
            ) from err
        self.lock = Home(self.home)
        if lock:
            self.lock.take()
        self.database = Database(self.home)
        self.objects = Objects(self.home / "objects")
        self.runs = self.home / "runs"
        self.runs.mkdir(exist_ok=True)
        self.uploads = self.home / "uploads"
        self.uploads.mkdir(exist_ok=True)

    def read(self):
        """Yield a session for reading; see Database.read."""
        return self.database.read()

    def write(self):
        """Yield a session that commits at the end; see Database.write."""
        return self.database.write()

    def close(self) -> None:
        """Close the databases and give the folder back."""
        self.database.close()
        self.lock.release()
