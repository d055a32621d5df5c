"""The child that checks export parity: `python -m clm_app.engine.parity_child ORDER.json`; speaks events, as all do."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from clm_app.engine.child import end_with_parent
from clm_app.errors import plain
from clm_app.events import Comparing, Failed, Finished, say
from clm_app.judging.parity import ParityOrder
from clm_app.serving.host import prepare_environment


def main(file: Path) -> int:
    """Do the order in `file`, say what was found and return 0; or say why not and return 1."""
    end_with_parent()
    if hasattr(os, "nice"):
        os.nice(15)  # the page and the serving hosts come first
    order = ParityOrder.model_validate_json(file.read_text(encoding="utf-8"))
    prepare_environment(order.threads)
    try:
        import torch

        from clm_app.engine.parity import compare

        torch.set_num_threads(order.threads)
        say(compare(order, lambda stage, share: say(Comparing(stage=stage, share=round(share, 3)))))
    except Exception as error:  # the border of the child: a row and the log are told
        say(Failed(sentence=plain(error), detail=traceback.format_exc()))
        return 1
    say(Finished())
    return 0


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is said; taking torch apart first costs seconds
