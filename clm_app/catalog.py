"""How every shelf is read: each file in the folder gives one class, and the file's stem is its name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from clm_app.errors import BadSettings


@cache
def shelf(package: str) -> dict[str, type]:
    """Return {file stem: the class that file gives} for a shelf such as "clm_app.strategies".

    The class is the one that `_base.py` names in `CONTRACT` and that the file defines itself. A public method that
    the contract does not know stops the start: a misspelled hook would never be called, and nobody would be told.

    Raises:
        TypeError: a file gives no such class, or more than one, or a hook that the contract does not know.
    """
    contract: type = importlib.import_module(f"{package}._base").CONTRACT
    found: dict[str, type] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if info.name.startswith("_") or info.ispkg:  # a folder on a shelf is a shelf of its own
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        own = [
            c
            for c in vars(module).values()
            if isinstance(c, type) and issubclass(c, contract) and c.__module__ == module.__name__
        ]
        if len(own) != 1:
            raise TypeError(
                f"{module.__name__} gives {len(own)} subclasses of {contract.__name__}; it needs exactly one."
            )
        _refuse_unknown_hooks(own[0], contract)
        own[0].name = info.name
        found[info.name] = own[0]
    return found


def _refuse_unknown_hooks(cls: type, contract: type) -> None:
    known = {n for base in contract.__mro__ for n in vars(base)}
    for name, value in vars(cls).items():
        is_hook = isinstance(value, classmethod | property) or (callable(value) and not isinstance(value, type))
        if is_hook and not name.startswith("_") and name not in known:
            raise TypeError(
                f"{cls.__module__} has a hook {name!r} that {contract.__name__} does not know. Is it misspelled?"
            )


def pick(package: str, name: str) -> type:
    """Return the class with this name on the shelf.

    Raises:
        BadSettings: there is no file of that name; the message lists those there are.
    """
    try:
        return shelf(package)[name]
    except KeyError as err:
        kind = package.rsplit(".", 1)[1]
        raise BadSettings(
            f"{name!r} is not among the {kind}: {', '.join(shelf(package))}. Choose one of these."
        ) from err
