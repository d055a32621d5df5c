"""Serve with llama.cpp: the fastest on a CPU, for the families that our converter to GGUF knows.

Token ids go in and logits come out. llama.cpp's own tokenizer, detokenizer (it drops tokens longer than 32 bytes) and
samplers are not used, so that a reply does not depend on the backend. One thread at a time may touch a context: four
at once crash the process (measured), which the turn in Backend.stream rules out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from clm_app.errors import BadModel
from clm_app.routes import is_routed
from clm_app.serving import gguf as convert
from clm_app.serving.backends._base import Backend

F32, F16 = 0, 1  # ggml's numbers for the types of the key-value cache


class LlamaCpp(Backend):
    """A GGUF file of the merged weights, made once and kept in the cache folder, read by one llama.cpp context."""

    title = "llama.cpp"

    def __init__(self, base: Path, adapter: Path | None, threads: int, converted: Path) -> None:
        super().__init__(base, adapter, threads, converted)
        file = convert.cached(base, adapter, converted)
        llama_cpp = _quiet()
        kind = F32 if convert.is_small(base) else F16  # F32 keeps logits within 3e-6 of transformers, F16 within 3e-3
        try:
            self.llama = llama_cpp.Llama(
                model_path=str(file), n_ctx=self.prompt.context, n_threads=threads, n_threads_batch=threads,
                type_k=kind, type_v=kind, n_gpu_layers=-1, verbose=False,
            )  # fmt: skip
        except ValueError as err:
            file.unlink(missing_ok=True)
            raise BadModel(
                f"llama.cpp cannot load {file.name}: {err}. The file is removed and made anew at the next start; "
                "if this returns, set CLM_BACKEND=transformers."
            ) from err

    @classmethod
    def is_available(cls) -> str | None:
        """Return None where llama-cpp-python is installed, else how to install it."""
        if importlib.util.find_spec("llama_cpp"):
            return None
        return "llama.cpp is not installed. Add it with: pip install llama-cpp-python==0.3.36 (it compiles a while)."

    @classmethod
    def supports(cls, base: Path, adapter: Path | None = None) -> str | None:
        """Return None where this folder can be converted to GGUF, else the reason."""
        if is_routed(adapter):
            return "A version with an adapter per task is served by transformers."
        return convert.supports(base)

    def tokens(self, ids: list[int], choose: Callable[[np.ndarray], int]) -> Iterator[int]:
        """Yield reply tokens without end; see the contract."""
        import llama_cpp

        self.llama.reset()  # the next eval drops what an earlier conversation left in the cache
        fresh = ids
        while True:
            self.llama.eval(fresh)
            pointer = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
            token = choose(np.ctypeslib.as_array(pointer, shape=(self.llama.n_vocab(),)).copy())
            yield token
            fresh = [token]


def _quiet():
    """Import llama_cpp without its chatter on stderr, and return it."""
    import llama_cpp

    global _no_log  # the library keeps only the pointer, so the callback has to outlive every model
    _no_log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(_no_log, None)
    return llama_cpp
