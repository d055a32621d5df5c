"""The child that checks export parity: `python -m clm_app.engine.parity_child ORDER.json`; speaks events, as all do."""

from __future__ import annotations

import sys
from pathlib import Path

from clm_app.engine.child import bordered, leave
from clm_app.events import Comparing, say
from clm_app.judging.parity import ParityOrder
from clm_app.serving.host import prepare_environment


def main(file: Path) -> int:
    """Do the order in `file` and say what was found; see `bordered`."""
    return bordered(lambda: check(ParityOrder.model_validate_json(file.read_text(encoding="utf-8"))))


def check(order: ParityOrder) -> None:
    """Compare both sides of an order, and say how."""
    prepare_environment(order.threads)
    import torch

    from clm_app.engine.parity import compare

    torch.set_num_threads(order.threads)
    say(compare(order, lambda stage, share: say(Comparing(stage=stage, share=round(share, 3)))))


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
