"""Which room may know which: the directions of imports, what is slow stays out of the start, every shelf can be read."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from clm_app.catalog import pick, shelf
from clm_app.errors import BadSettings

ROOT = Path(launch.__file__).parent
SHELVES = (
    "clm_app.strategies", "clm_app.methods", "clm_app.probes", "clm_app.probes.kinds", "clm_app.repairs",
    "clm_app.serving.backends", "ui.api", "ui.tabs",
)  # fmt: skip
SLOW = ("torch", "transformers", "gradio", "peft", "llama_cpp")

OPEN_WITHOUT_THE_SLOW = """
import sys
for name in {slow!r}:
    sys.modules[name] = None  # importing it now is an ImportError
import json, os, signal, threading, urllib.request
from pathlib import Path
import ui.server, jobs.clock, clm_app.serving.router
from clm_app.settings import Settings
from clm_app.workspace import Workspace
from jobs.supervisor import spawn
from ui.house import House

workspace = Workspace(Settings(home=Path(sys.argv[1]), base_model=sys.argv[2]))
router = clm_app.serving.router.Router(workspace, spawn)
clock = jobs.clock.Clock(workspace, spawn)

def opened(address):
    clock.start()
    threading.Thread(target=ask, args=[address], daemon=True).start()

def ask(address):
    print(urllib.request.urlopen(address + "/api/health", timeout=30).read().decode(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

ui.server.serve(House(workspace, router), port=0, on_open=opened, on_stop=clock.stop)
"""


def imported_at_the_top(file: Path) -> set[str]:
    """Return the first names of what a file imports when it is imported itself."""
    found, waiting = set(), list(ast.parse(file.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return found


def imported_anywhere(file: Path) -> set[str]:
    """Return the first names of everything a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_the_rooms_lean_one_way():
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_linter_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("room, other", [("ui", "jobs"), ("jobs", "ui")])
def test_page_and_clock_never_import_each_other(room, other):
    guilty = [str(f.relative_to(ROOT)) for f in (ROOT / room).rglob("*.py") if other in imported_anywhere(f)]
    assert guilty == []


@pytest.mark.parametrize("room", ["ui/tabs", "ui/parts"])
def test_the_page_never_imports_torch(room):
    hot = {"torch", "transformers", "peft"}
    guilty = [str(f.relative_to(ROOT)) for f in (ROOT / room).rglob("*.py") if hot & imported_anywhere(f)]
    assert guilty == []


def test_only_hot_rooms_import_what_is_slow_at_the_top_of_a_file():
    warm = ("clm_app/engine/", "clm_app/serving/backends/", "clm_app/starter/", "ui/page.py", "ui/tabs/", "ui/parts/")
    files = [f for room in ("clm_app", "jobs", "store", "ui") for f in (ROOT / room).rglob("*.py")]
    cold = [f for f in [*files, ROOT / "launch.py"] if not f.relative_to(ROOT).as_posix().startswith(warm)]
    guilty = [str(f.relative_to(ROOT)) for f in cold if {*SLOW, "bitsandbytes", "trl"} & imported_at_the_top(f)]
    assert guilty == [] and len(cold) > 40


def test_the_port_answers_where_nothing_slow_can_be_imported(tmp_path, tiny_model):
    code = OPEN_WITHOUT_THE_SLOW.format(slow=SLOW)
    command = [sys.executable, "-c", code, str(tmp_path / "home"), str(tiny_model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert '"live":"v0"' in done.stdout and '"page":false' in done.stdout, done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]


# --- shelves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", SHELVES)
def test_every_file_on_a_shelf_is_found_by_its_name(package):
    found = shelf(package)
    folder = ROOT / package.replace(".", "/")
    assert set(found) == {f.stem for f in folder.glob("*.py") if not f.stem.startswith("_")} and found
    assert all(cls.name == stem and pick(package, stem) is cls for stem, cls in found.items())
    with pytest.raises(BadSettings, match=r"'abacus' is not among the .* Choose one of these\."):
        pick(package, "abacus")


BASE = '''
class Thing:
    title = ""
    def begin(self): ...
    @classmethod
    def is_available(cls): ...
    @property
    def cost(self): ...
CONTRACT = Thing
'''  # fmt: skip


@pytest.fixture
def made_shelf(tmp_path, monkeypatch):
    """Return a function that puts one file on a fresh shelf and reads the shelf."""
    monkeypatch.syspath_prepend(tmp_path)

    def read(body: str, stem: str) -> dict[str, type]:
        package = tmp_path / f"shelf_{stem}"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "_base.py").write_text(BASE)
        (package / f"{stem}.py").write_text(f"from shelf_{stem}._base import Thing\n{body}")
        return shelf(f"shelf_{stem}")

    return read


def test_a_new_file_is_on_the_shelf_by_lying_there(made_shelf):
    found = made_shelf("class New(Thing):\n    def begin(self): return 1\n    def _own(self): ...\n", "fine")
    assert found["fine"]().begin() == 1 and found["fine"].name == "fine"


@pytest.mark.parametrize("stem, hook", [
    ("method", "def begim(self): ..."), ("klass", "@classmethod\n    def is_avalable(cls): ..."),
    ("static", "@staticmethod\n    def bgin(): ..."), ("prop", "@property\n    def costs(self): ..."),
])  # fmt: skip
def test_a_misspelled_hook_stops_the_start(made_shelf, stem, hook):
    with pytest.raises(TypeError, match="does not know. Is it misspelled"):
        made_shelf(f"class New(Thing):\n    {hook}\n", stem)


def test_a_file_that_gives_no_class_or_two_stops_the_start(made_shelf):
    with pytest.raises(TypeError, match="gives 0 subclasses of Thing; it needs exactly one"):
        made_shelf("", "none")
    with pytest.raises(TypeError, match="gives 2 subclasses"):
        made_shelf("class A(Thing): ...\nclass B(Thing): ...\n", "two")


def test_a_file_that_cannot_be_imported_stops_the_start_with_its_own_error(made_shelf):
    with pytest.raises(ZeroDivisionError):
        made_shelf("1 / 0\n", "broken")
