"""Public suites through the lm-evaluation-harness, where it is installed: its own tasks from local files, on our weights.

Source: Biderman et al. 2024 (arXiv:2405.14782); https://github.com/EleutherAI/lm-evaluation-harness. A task is a YAML file in a
folder of the person's; its data must lie on this machine too (`dataset_path: json`, `dataset_kwargs: {data_files: ...}`).
No hub is asked: what is not there is refused. A task may name Python of its own (`!function`), which then runs: that is
refused until the person says that the files are trusted.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from clm_app.errors import BadData, BadSettings, NotThere

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from clm_app.engine.routed import Routed

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
HERE_ALONE = "DISABLE_MULTIPROC"  # no processes of the harness's own beside this one
RESAMPLES = 1000  # for the standard error of a figure that has no formula, such as BLEU; the harness's own 100,000 takes minutes
SEED = 1234  # of the solved examples and of sampling; the harness's own


class HarnessSettings(BaseModel):
    """Which tasks are run, and how."""

    model_config = ConfigDict(extra="forbid")

    folder: Path = Field(description="folder with the YAML files of the tasks")
    tasks: list[str] = Field(min_length=1, description="names of tasks or groups in that folder")
    most_items: int | None = Field(
        None, ge=1, description="items of each task that are read, from the first; empty: all"
    )
    examples: int | None = Field(
        None, ge=0, description="solved examples shown before each item; empty: as the task says"
    )
    chat: bool = Field(
        False, description="ask through the model's chat template; off: as running text, as published figures are"
    )
    batch_rows: int = Field(16, ge=1, le=1024, description="rows in one forward pass")
    trust_code: bool = Field(
        False, description="let the task files run Python of their own, with all that it may do on this machine"
    )


def is_installed() -> bool:
    """Return whether the harness can be imported."""
    return importlib.util.find_spec("lm_eval") is not None


def refuse(settings: HarnessSettings) -> list[Path]:
    """Look whether the tasks could be run, and return the YAML files that they are made of. Nothing of theirs is run.

    Raises:
        NotThere: the harness is not installed.
        BadSettings: a task is not in the folder, or runs Python of its own and is not trusted.
    """
    if not is_installed():
        raise NotThere(
            "The lm-evaluation-harness is not installed. Install it with "
            f'"{sys.executable} -m pip install -c constraints.txt -e .[harness]" in the folder of CLM, then run this again.'
        )
    if not settings.folder.is_dir():
        raise BadSettings(f"{settings.folder} is no folder. Name the folder with the YAML files of the tasks.")
    manager = _manager(settings)
    if missing := [name for name in settings.tasks if name not in manager.all_tasks]:
        raise BadSettings(
            f"{missing[0]!r} is not among the tasks in {settings.folder}: {', '.join(manager.all_tasks) or 'none'}. "
            "Choose one of these, or put its YAML file there."
        )
    files = _files(manager, settings.tasks)
    if not settings.trust_code:
        for file in files:
            _refuse_code(file)
    return files


def run(
    model: PreTrainedModel | Routed,
    tokenizer: PreTrainedTokenizerBase,
    settings: HarnessSettings,
    tell: Callable[[int, int], object] = lambda done, of: None,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return {task: {metric: {"value", "standard_error"}}}; None where the harness gives no number.

    A metric has the harness's own name, with its filter behind a comma where it has one: "acc", "exact_match,strict-match".
    tell: called with (rows read, rows of the requests so far) after each forward pass.

    Raises:
        NotThere, BadSettings: as `refuse`.
        BadData: a task's files cannot be used, or are not on this machine.
    """
    refuse(settings)
    with _offline(), _no_cache(), nullcontext() if settings.trust_code else _sandboxed():
        return _figures(_results(model, tokenizer, settings, tell))


def _manager(settings: HarnessSettings) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(settings.folder), include_defaults=False)


def _results(model, tokenizer: PreTrainedTokenizerBase, settings: HarnessSettings, tell: Callable) -> dict:
    import torch
    from lm_eval.evaluator import evaluate  # not simple_evaluate: it starts a dozen programs to describe the machine

    from clm_app.engine.suite_reader import Reader

    try:
        loaded = _manager(settings).load(settings.tasks)
        for task in loaded["tasks"].values():
            given = task.get_config("num_fewshot") or 0
            task.set_config(key="num_fewshot", value=given if settings.examples is None else settings.examples)
            task.set_fewshot_seed(seed=SEED)
        reader = Reader(model, tokenizer, settings.batch_rows, tell)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return evaluate(
                reader, task_dict=loaded, limit=settings.most_items, apply_chat_template=settings.chat,
                bootstrap_iters=RESAMPLES, log_samples=False,
            )["results"]  # fmt: skip
    except (
        Exception
    ) as err:  # a task is a program of somebody else: whatever it raises, the person learns which and why
        reason = (str(err) or type(err).__name__).splitlines()[0]
        raise BadData(
            f"{', '.join(settings.tasks)} in {settings.folder} cannot be run: {reason}. "
            "Are its data files on this machine, and named by whole paths?"
        ) from err


# --- what a task is made of ---------------------------------------------------------------------------------------------


def _files(manager: TaskManager, names: list[str]) -> list[Path]:
    """Return the files of these tasks, of the tasks that their groups and tags name, and of all that these include."""
    waiting, seen, files = list(names), set(), {}
    while waiting:
        name = waiting.pop()
        entry = manager.task_index.get(name)
        if entry is None or name in seen:
            continue
        seen.add(name)
        waiting += entry.tags if entry.yaml_path is None else _members(entry.cfg)
        files |= dict.fromkeys(_with_included(entry.yaml_path) if entry.yaml_path else ())
    return sorted(files)


def _members(told: object) -> list[str]:
    """Return every name that a group's `task` and `group` keys mention, however deep."""
    if isinstance(told, str):
        return [told]
    if isinstance(told, list):
        return [name for one in told for name in _members(one)]
    return [name for key in ("task", "group") for name in _members(told.get(key))] if isinstance(told, dict) else []


def _with_included(file: Path) -> list[Path]:
    from lm_eval.tasks._yaml_loader import load_yaml

    told = load_yaml(file, resolve_func=False, recursive=False).get("include", [])
    return [file, *(
        inner for one in (told if isinstance(told, list) else [told]) for inner in _with_included(file.parent / one)
    )]  # fmt: skip


def _refuse_code(file: Path) -> None:
    """Refuse a file that names Python: by a tag, as a class, or as a metric that is a file."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    with open(file, encoding="utf-8") as text:
        tags = [one.value for one in yaml.scan(text) if isinstance(one, yaml.TagToken)]
    named = [f"the tag {handle or ''}{end}" for handle, end in tags if handle != "!!" or end.startswith("python")]
    named += _code(load_yaml(file, resolve_func=False, recursive=False))
    if named:
        raise BadSettings(
            f"{file} would run Python of its own ({named[0]}), which may do anything on this machine. Read it and set "
            "trust_code to true, or choose a task without."
        )


def _code(told: object) -> Iterator[str]:
    """Yield what in a YAML file names Python otherwise than by a tag."""
    if isinstance(told, list):
        for one in told:
            yield from _code(one)
    elif isinstance(told, dict):
        if "class" in told:
            yield f"the class {told['class']}"
        metric = told.get("metric")
        if isinstance(metric, str) and not metric.isidentifier():
            yield f"the metric {metric}"
        for one in told.values():
            yield from _code(one)


@contextmanager
def _sandboxed() -> Iterator[None]:
    """Let templates read and not reach into Python: `{{ "".__class__ }}` is refused by Jinja itself."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    was, safe = utils.env, SandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )  # fmt: skip
    safe.filters |= was.filters
    utils.env = safe
    try:
        yield
    finally:
        utils.env = was


# --- what comes of it ---------------------------------------------------------------------------------------------------


def _figures(results: dict[str, dict]) -> dict[str, dict[str, dict[str, float | None]]]:
    return {task: dict(_metrics(found)) for task, found in results.items()}


def _metrics(found: dict) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Yield (metric, its value and standard error) from the harness's {"acc,none": 0.5, "acc_stderr,none": 0.1}."""
    for name, value in found.items():
        metric, comma, way = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}_stderr,{way}")
        is_known = isinstance(error, int | float) and math.isfinite(error)
        yield (
            metric if way == "none" else name,
            {
                "value": float(value) if math.isfinite(value) else None,
                "standard_error": float(error) if is_known else None,
            },
        )


@contextmanager
def _no_cache() -> Iterator[None]:
    """Let the rows of a task be converted in a folder that goes afterwards, not in the person's home."""
    import datasets.config

    was = datasets.config.HF_DATASETS_CACHE
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps a file that is still mapped
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = was


@contextmanager
def _offline() -> Iterator[None]:
    """Let no Hugging Face library ask its hub; they read the environment once, at import, so the constants are set too."""
    import datasets.config
    import huggingface_hub.constants as hub

    before = {name: os.environ.get(name) for name in (*OFFLINE, HERE_ALONE)}
    was = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    os.environ.update(dict.fromkeys(before, "1"))
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = was
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
