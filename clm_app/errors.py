"""Every error that a person may see; each says the value, the rule and the next step.

ClmError
├── BadInput            what was given cannot be used; nothing was changed
│   ├── BadData         a file, a row or a column
│   ├── BadModel        a model folder, or a model that does not fit
│   └── BadSettings     a knob out of its bounds, an unknown name
├── NotThere            asked for something that does not exist (a version, a job, a task)
├── OutOfRoom           disk or memory is short
└── ChildFailed         a training or serving child ended without finishing
"""

from __future__ import annotations


class ClmError(Exception):
    """A refusal with a sentence for the person; `status` is the HTTP status that fits it."""

    status = 500


class BadInput(ClmError):
    """What was given cannot be used; nothing was changed."""

    status = 400


class BadData(BadInput):
    """A file, a row or a column cannot be used."""


class BadModel(BadInput):
    """A model folder cannot be read, or its model does not fit this machine."""


class BadSettings(BadInput):
    """A knob is out of its bounds, or a name is unknown."""


class NotThere(ClmError):
    """Something was named that does not exist."""

    status = 404


class OutOfRoom(ClmError):
    """Disk or memory is short."""

    status = 507


class ChildFailed(ClmError):
    """A training or serving child ended without finishing."""

    status = 503


def plain(error: BaseException) -> str:
    """Return the sentence to show for any error: our own as written, others by what a person can do about them."""
    if isinstance(error, ClmError):
        return str(error)
    if isinstance(error, OSError) and error.errno == 28:
        return "The disk is full. Free some space, then start the job again: it goes on from its last checkpoint."
    if isinstance(error, MemoryError):
        return "Memory ran out. Close other programs, or choose a smaller batch or model, and start the job again."
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "the value"
        return f"{name} is {first.get('input')!r}: {first['msg']}. Correct it and try again."
    return f"{type(error).__name__}: {error}. The log of the app has the details."
