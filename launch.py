"""CLM's one click: `python3 launch.py` makes an environment beside this file, then opens the app inside it.

It runs twice. The first time by any Python on the machine: look whether .venv is complete, mend what is missing, start
again with .venv's own Python. The second time inside .venv: do what was asked (see `inside`, at the bottom).

Only the standard library at the top, and nothing that Python 3.8 cannot read: an old Python must get far enough to
print what it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, NoReturn  # noqa: UP035  Python 3.8 must be able to read this file

OLDEST_PYTHON = (3, 11)
TRIED_PYTHONS = "3.11 to 3.14"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
PORT = 7860
MOST_WORKERS = 4  # of the tests at a time: each holds the libraries and small models, about 1.5 GB

# Promises of the product: nothing leaves the machine unasked. They win over what the shell says; CLM_ONLINE=1 alone
# lets models be fetched.
PRIVATE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "DO_NOT_TRACK": "1",
}
# Tuning that libraries read while they load, so it must be there before Python starts. The shell's own value wins.
# OMP_WAIT_POLICY: threads that wait sleep instead of spinning; training shares its cores with the page.
# THP_MEM_ALLOC_ENABLE: PyTorch asks for large memory pages, so a training step spends less time on page faults.
# GGML_NO_BACKTRACE: otherwise each abort of llama.cpp forks a debugger, which can hang.
TUNED = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "THP_MEM_ALLOC_ENABLE": "1",
    "GGML_NO_BACKTRACE": "1",
}


class CannotStart(Exception):
    """Something a person has to mend first; its text names the value, the rule and the next step."""


class Place(NamedTuple):
    """The folder that holds launch.py, and where things lie in it."""

    root: Path
    windows: bool = os.name == "nt"

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        """.venv's interpreter. Never resolve it: the link's target is the Python outside."""
        return self.venv / "Scripts" / "python.exe" if self.windows else self.venv / "bin" / "python"

    @property
    def ledger(self) -> Path:
        return self.venv / "clm-steps.json"

    @property
    def log(self) -> Path:
        return self.venv / "install.log"

    @property
    def wheels(self) -> Path:
        """Wheels for a machine without a network; used first where the folder exists.

        Filled on a connected one: pip download -d wheels -c constraints.txt setuptools .
        """
        return self.root / "wheels"

    @property
    def lock(self) -> Path:
        return self.root / "constraints.txt"


class Finished(NamedTuple):
    """How a command ended: its exit code, and all it said."""

    code: int
    text: str


Run = Callable[..., Finished]  # (command, on_line=...) -> Finished; tests hand in their own
HERE = Place(Path(__file__).resolve().parent)


# ---- the steps: what .venv needs, and when a step has to be taken again ---------------------------------------------

STEPS = {
    "environment": "a Python environment of its own, in .venv",
    "torch": "PyTorch",
    "project": "CLM and its libraries",
    "test": "what the tests need",
    "bench": "what the benchmarks need",
    "llama": "llama.cpp, compiled on this machine (5 to 12 minutes)",
}
TO_OPEN = ("environment", "torch", "project")


def read_pin(place: Place, package: str) -> str:
    """Return the lock's line for one package, such as torch==2.13.0."""
    for line in place.lock.read_text(encoding="utf-8").splitlines():
        if line.startswith(package + "=="):
            return line.strip()
    raise CannotStart(f"{place.lock} has no line {package}==...; the folder is incomplete. Copy all of CLM again.")


def find_step_key(place: Place, step: str) -> str:
    """Return what a step was done for. A different key means: take it again.

    The libraries' key holds the folder too, because an editable install points at it.
    """
    if step == "environment":
        return "1"
    if step in ("torch", "llama"):
        return read_pin(place, {"torch": "torch", "llama": "llama-cpp-python"}[step])
    whole = hashlib.sha256(str(place.root).encode())
    for path in (place.root / "pyproject.toml", place.lock):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def read_ledger(place: Place) -> dict:
    """Return {step: {"key", "took_s"}}; empty where the interpreter is gone or the file is torn."""
    if not place.python.exists():
        return {}
    try:
        return json.loads(place.ledger.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_ledger(place: Place, ledger: dict) -> None:
    """Replace the ledger in one move: a start that is killed here leaves the old one whole."""
    fresh = place.ledger.with_suffix(".new")
    fresh.write_text(json.dumps(ledger, indent=1), encoding="utf-8")
    os.replace(fresh, place.ledger)


def list_missing_steps(place: Place, wanted: tuple) -> list:
    """Return the wanted steps that were never finished, or were finished for another lock."""
    try:
        ledger = read_ledger(place)
        return [step for step in wanted if ledger.get(step, {}).get("key") != find_step_key(place, step)]
    except FileNotFoundError as err:
        raise CannotStart(f"{err.filename} is missing; the folder is incomplete. Copy all of CLM again.") from err


# ---- the commands of each step --------------------------------------------------------------------------------------


def sees_nvidia() -> bool:
    """Whether this machine has an NVIDIA card with a driver."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()


def list_commands(place: Place, step: str, gpu: bool = False, system: str = sys.platform) -> list:
    """Return the commands of a pip step, to be tried in this order until one succeeds."""
    pip = [str(place.python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    pip += ["--progress-bar", "off"]
    if place.wheels.is_dir():
        pip += ["--find-links", str(place.wheels)]
    if step == "torch":
        return list_torch_commands(pip, read_pin(place, "torch"), gpu, system)
    pip += ["-c", str(place.lock)]
    what = [read_pin(place, "llama-cpp-python")] if step == "llama" else ["-e", "."]
    if step in ("test", "bench"):
        what = ["-e", f".[{step}]"]
    online = [*pip, *what]
    # Without a network each library would cost many seconds of retries; a full wheels folder needs none of them.
    return [[*pip, "--no-index", *what], online] if place.wheels.is_dir() else [online]


def list_torch_commands(pip: list, pin: str, gpu: bool, system: str) -> list:
    """Return how to get PyTorch alone; its own needs come with the next step. On Linux without a card: the CPU build.

    PyPI's Linux build carries several GB of CUDA. The CPU build may lie in a local folder that pip knows (half a second
    to find out), else on PyTorch's own index, which some sites block: after seconds, PyPI's build after all.
    """
    pip = [*pip, "--no-deps", "--only-binary", ":all:"]
    if gpu or system != "linux":
        return [[*pip, pin]]
    return [
        [*pip, "--no-index", pin + "+cpu"],
        [*pip, "--timeout", "10", "--retries", "1", "--extra-index-url", CPU_WHEELS, pin + "+cpu"],
        [*pip, pin],
    ]


def run_logged(command: list, on_line: Callable = lambda line: None, place: Place = HERE) -> Finished:
    """Run a command in the folder; hand each line to on_line and to .venv/install.log."""
    unpacking = place.venv / "tmp"  # /tmp is often too small for PyTorch; here the disk was checked
    unpacking.mkdir(parents=True, exist_ok=True)
    env = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF", "PYTHONUTF8": "1", **os.environ, "TMPDIR": str(unpacking)}
    said = [f"$ {' '.join(command)}"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    with open(place.log, "a", encoding="utf-8") as log:
        log.write(said[0] + "\n")
        with subprocess.Popen(command, cwd=place.root, env=env, stdin=subprocess.DEVNULL, **how) as child:
            for line in child.stdout:
                log.write(line)
                said.append(line.rstrip())
                on_line(said[-1])
    shutil.rmtree(unpacking, ignore_errors=True)
    return Finished(child.returncode, "\n".join(said))


def make_environment(place: Place, run: Run, on_line: Callable) -> Finished:
    """Adopt a .venv whose Python is new enough and has pip; otherwise make it anew, without what was left in it."""
    if place.python.exists():
        works = f"import sys, pip; sys.exit(sys.version_info < {OLDEST_PYTHON})"
        tried = run([str(place.python), "-c", works], on_line=on_line)
        if tried.code == 0:
            return tried
    shutil.rmtree(place.venv, ignore_errors=True)
    return run([sys.executable, "-m", "venv", str(place.venv)], on_line=on_line)


def take_step(place: Place, step: str, run: Run, on_line: Callable) -> None:
    """Do one step, or raise CannotStart with the reason and the remedy."""
    if step == "environment":
        ended = make_environment(place, run, on_line)
        return None if ended.code == 0 else refuse(place, step, ended.text)
    for command in list_commands(place, step, sees_nvidia()):
        ended = run(command, on_line=on_line)
        if ended.code == 0:
            return None
        if any(sign in ended.text for sign in DISK_FULL):
            break
    return refuse(place, step, ended.text)


# ---- what can go wrong, in a person's words -------------------------------------------------------------------------

DISK_FULL = ("No space left on device", "Errno 28", "not enough space on the disk")
# What pip and the tools under it say, and what a person can do about it; the first that fits is told.
REASONS = (
    (DISK_FULL, "The disk became full ({free_gb:.1f} GB free). Free space or move the folder, then start again."),
    (
        ("ensurepip is not available", "No module named venv", "No module named ensurepip"),
        "{python} cannot make environments. Install the missing part (Debian, Ubuntu: apt install python3-venv).",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED",),
        "The package index shows a certificate that this machine does not trust. Set PIP_CERT to your network's file.",
    ),
    (
        (
            *("Temporary failure in name resolution", "Name or service not known", "nodename nor servname"),
            *("getaddrinfo failed", "NameResolutionError", "NewConnectionError", "ConnectTimeoutError"),
            *("ReadTimeoutError", "ProxyError", "Connection refused", "Connection reset", "connection broken"),
            *("Network is unreachable",),
        ),
        "The package index cannot be reached. Connect to the network, or put wheels into {wheels}; then start again.",
    ),
    (
        ("Could not find a version", "No matching distribution"),
        "pip found no build of a library for {system}. Check the network, or put wheels into {wheels}; "
        f"if both are right, use a Python from {TRIED_PYTHONS}.",
    ),
    (
        ("CMAKE_CXX_COMPILER", "CMAKE_C_COMPILER", "CMake Error"),
        "A C++ compiler is needed (Debian: apt install g++; macOS: xcode-select --install). CLM works without it.",
    ),
    (("Permission denied", "Access is denied"), "{root} may not be written. Move the folder to where you may write."),
)


def explain(place: Place, text: str) -> str:
    """Turn what a failed command said into one sentence with its remedy."""
    facts = {
        "free_gb": count_free_gb(place),
        "python": sys.executable,
        "root": place.root,
        "wheels": place.wheels,
        "system": f"Python {platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    for signs, sentence in REASONS:
        if any(sign in text for sign in signs):
            return sentence.format(**facts)
    return f"The reason is none that CLM knows. Read the log; deleting {place.venv} starts afresh."


def refuse(place: Place, step: str, text: str) -> NoReturn:
    """Raise the failed step as one sentence, under the last lines of what was said."""
    tail = "\n".join("    " + line for line in deque(text.splitlines(), 8))
    raise CannotStart(f"{tail}\nCould not install {STEPS[step]}. {explain(place, text)}\nAll of it: {place.log}")


def check_python(version: tuple = sys.version_info, system: str = platform.system()) -> None:
    """Raise CannotStart for a Python that is too old."""
    if tuple(version[:2]) >= OLDEST_PYTHON:
        return
    remedy = {
        "Darwin": "brew install python@3.12, or python.org/downloads; then python3.12 launch.py",
        "Windows": "install it from python.org/downloads; then py -3.12 launch.py",
    }.get(system, "apt install python3.12 (or your system's way); then python3.12 launch.py")
    found = ".".join(str(part) for part in version[:3])
    raise CannotStart(f"This is Python {found}; CLM needs 3.11 or newer. Get one: {remedy}.")


def count_free_gb(place: Place) -> float:
    return shutil.disk_usage(place.root).free / 1e9


def check_disk(place: Place, missing: list, free_gb: float, cuda: bool) -> None:
    """Raise CannotStart when the missing steps would not fit.

    Without CUDA .venv holds 2.3 GB and pip unpacks 0.2 GB beside it; CUDA's libraries add about 5 GB.
    """
    needs_gb = 0.5
    if "torch" in missing:
        needs_gb = 9.0 if cuda else 3.0
    if free_gb < needs_gb:
        remedy = "Free space or move the folder, then start again."
        raise CannotStart(f"{free_gb:.1f} GB free in {place.root}, needs {needs_gb:g} GB. {remedy}")


# ---- installing -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hold_alone(place: Place) -> Iterator[None]:
    """Hold the folder while installing: a second click waits instead of installing over the first."""
    try:
        file = open(place.root / ".clm-setup.lock", "w")
    except OSError as err:
        raise CannotStart(f"{place.root} may not be written. Move the folder to where you may write.") from err
    with file:
        told = False
        while not try_lock(file.fileno()):
            if not told:
                print("Another start is installing into this folder; waiting for it.", flush=True)
            told = True
            time.sleep(0.5)
        yield


def try_lock(number: int) -> bool:
    """Take the lock on an open file; False while another process holds it. It ends with the file or the process."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks: going on is better than waiting for ever
        pass
    return True


def install(place: Place, wanted: tuple, run: Run = run_logged, free_gb: float | None = None) -> list:
    """Take the steps that are missing, in order, each recorded as soon as it is done. Returns the ones taken."""
    if not list_missing_steps(place, wanted):
        return []
    with hold_alone(place):
        missing = list_missing_steps(place, wanted)
        cuda = sees_nvidia() and sys.platform == "linux"
        check_disk(place, missing, count_free_gb(place) if free_gb is None else free_gb, cuda)
        for number, step in enumerate(missing, start=1):
            started = time.monotonic()
            title = f"[{number}/{len(missing)}] {STEPS[step]}"
            print(title + " ...", end="", flush=True)
            take_step(place, step, run, lambda line, title=title: show_line(f"{title}: {line}"))
            took_s = time.monotonic() - started
            show_line(title)
            print(f" done in {took_s:.0f} s", flush=True)
            done = {"key": find_step_key(place, step), "took_s": round(took_s, 1)}
            write_ledger(place, {**read_ledger(place), step: done})
    return missing


def show_line(line: str) -> None:
    """Rewrite the terminal's last line; silent where the output is a file."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 20
        print("\r" + " " * (width + 19) + "\r" + line[:width], end="", flush=True)


def list_wanted(arguments: argparse.Namespace) -> tuple:
    """Return the steps that a verb needs."""
    extras = [name for name in ("test", "bench", "llama") if getattr(arguments, name, False)]
    return (*TO_OPEN, "test") if arguments.verb == "test" else (*TO_OPEN, *extras)


def prepare(arguments: argparse.Namespace, place: Place = HERE) -> None:
    """Make .venv complete for what was asked, and say how to add what is optional."""
    taken = install(place, list_wanted(arguments))
    if taken and "llama" not in read_ledger(place):
        print("Optional: python3 launch.py setup --llama adds llama.cpp to serve GGUF files (compiles some minutes).")


# ---- entering .venv -------------------------------------------------------------------------------------------------


def make_settings(shell: dict) -> dict:
    """Return the variables that every CLM process starts with, seen from a shell's variables."""
    settings = {**{name: shell.get(name, value) for name, value in TUNED.items()}, **PRIVATE, "CLM_LAUNCHED": "1"}
    if shell.get("CLM_ONLINE") == "1":
        settings["HF_HUB_OFFLINE"] = "0"
    return settings


def is_inside(place: Place = HERE) -> bool:
    """Whether this is .venv's Python, started by `enter`."""
    return os.environ.get("CLM_LAUNCHED") == "1" and Path(sys.prefix).resolve() == place.venv.resolve()


def enter(argv: list, place: Place = HERE) -> int:
    """Start again with .venv's Python; on POSIX this process becomes it, on Windows it waits for it."""
    command = [str(place.python), str(place.root / "launch.py"), *argv]
    env = {**os.environ, **make_settings(dict(os.environ))}
    sys.stdout.flush()
    if not place.windows:
        os.execve(command[0], command, env)
    child = subprocess.Popen(command, env=env)  # Windows' exec returns to the shell while the app still runs
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches the child too; it closes, then we do
            return child.wait()


# ---- what can be asked ----------------------------------------------------------------------------------------------


def count_from(lowest: int, highest: float = float("inf")) -> Callable:
    """Return a reader of whole numbers in a range, for argparse."""

    def read(text: str) -> int:
        if not text.lstrip("-").isdigit() or not lowest <= int(text) <= highest:
            limit = f" to {highest:.0f}" if highest < float("inf") else " or more"
            raise argparse.ArgumentTypeError(f"{text} is not a whole number, {lowest}{limit}")
        return int(text)

    return read


def add_opening(parser: argparse.ArgumentParser, inherits: bool) -> None:
    """Add what every opening verb takes; a verb inherits what stood before it: `launch.py --home X demo`."""

    def default(value: object) -> object:
        return argparse.SUPPRESS if inherits else value

    add = parser.add_argument
    home_help = "where CLM keeps its data (default: your user folder)"
    add("--home", type=Path, metavar="DIR", default=default(None), help=home_help)
    port_help = f"the page's port; 0 takes a free one (default: {PORT})"
    add("--port", type=count_from(0, 65535), metavar="N", default=default(PORT), help=port_help)
    add("--no-browser", dest="browser", action="store_false", default=default(True), help="do not open the page")


def add_learning(parser: argparse.ArgumentParser, many: bool) -> None:
    """Add what demo and learn share; an option left out is None and takes the product's own default."""
    add = parser.add_argument
    more = "may be given again" if many else "default: what came along"
    action = "append" if many else "store"
    add("--data", type=Path, metavar="PATH", action=action, required=many, help=f"folder or file of examples ({more})")
    add("--tasks", type=count_from(1), metavar="N", help="learn only the first N tasks")
    add("--strategy", metavar="NAME", help="the way against forgetting")
    add("--method", metavar="NAME", help="the way to tune: lora, qlora, full, ...")
    add("--epochs", type=count_from(1), metavar="N", help="passes over each task")
    add("--seed", type=count_from(0), metavar="N", help="start of the random numbers")
    naive_help = "also learn without any strategy, to compare (default: yes)"
    add("--naive", action=argparse.BooleanOptionalAction, default=True, help=naive_help)


def build_parser() -> argparse.ArgumentParser:
    first_line = "Open CLM. The first start makes .venv beside launch.py; later ones open at once."
    parser = argparse.ArgumentParser(prog="launch.py", description=first_line, allow_abbrev=False)
    parser.set_defaults(verb="open")
    add_opening(parser, inherits=False)
    verbs = parser.add_subparsers(title="verbs (none: open the app)", metavar="")

    def add_verb(name: str, says: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=says, description=says, allow_abbrev=False)
        verb.set_defaults(verb=name)
        return verb

    demo = add_verb("demo", "learn a few tasks one after another and show what was kept")
    learn = add_verb("learn", "learn from your own examples")
    for verb in (demo, learn):
        add_opening(verb, inherits=True)
        add_learning(verb, many=verb is learn)
    demo.add_argument("--exit", action="store_true", help="end when it is shown, instead of leaving the page open")
    add_verb("test", "run the tests; whatever follows goes to pytest")
    setup = add_verb("setup", "only make .venv complete")
    setup.add_argument("--llama", action="store_true", help="also compile llama.cpp (5 to 12 minutes)")
    setup.add_argument("--test", action="store_true", help="also what the tests need")
    setup.add_argument("--bench", action="store_true", help="also what the benchmarks need")
    return parser


def read_arguments(argv: list) -> argparse.Namespace:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.verb != "test":
        parser.error(f"unknown: {' '.join(rest)}. See launch.py --help")
    arguments.pytest = rest
    return arguments


def main(argv: list) -> int:
    """Run by any Python: check, complete .venv, enter it. Run by .venv's: do what was asked."""
    try:
        check_python()
        arguments = read_arguments(argv)
        if is_inside() and arguments.verb != "setup":
            return inside(arguments)
        prepare(arguments)
        return say_ready() if arguments.verb == "setup" else enter(argv)
    except CannotStart as reason:
        print(f"\n{reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where this one ended.", file=sys.stderr)
        return 130


def say_ready() -> int:
    print("Everything is installed. Open CLM with: python3 launch.py")
    return 0


def clm() -> int:
    """The installed command `clm`: its Python has everything already, so nothing is checked or installed."""
    os.environ.update(make_settings(dict(os.environ)))
    return inside(read_arguments(sys.argv[1:]))


# ---- inside .venv ---------------------------------------------------------------------------------------------------


def inside(arguments: argparse.Namespace) -> int:
    """Do what was asked; everything is installed here. Returns the process's exit code."""
    verbs = {"open": _open, "demo": _demo, "learn": _learn, "test": _test, "setup": _setup}
    return verbs[arguments.verb](arguments) or 0


def _open(arguments: argparse.Namespace) -> int:
    return run_app(arguments, arguments.home, arguments.browser)


def _demo(arguments: argparse.Namespace) -> int:
    from ui import story

    home = (arguments.home or _fresh_demo_home()).expanduser().resolve()
    chosen = vars(arguments)

    def show(address: str, console) -> None:
        console.print(f"Workspace {home}, page {address} (you can watch there).")
        story.demo(
            story.Door(address), home, arguments.data and arguments.data.resolve(), arguments.tasks, chosen, console
        )
        if not arguments.exit:
            console.rule()
            console.print(f"The page stays open on this workspace: {address}   (Ctrl-C ends it)")

    return run_app(arguments, home, arguments.browser and not arguments.exit, show, ends=arguments.exit)


def _fresh_demo_home() -> Path:
    """Return a demo folder that no demo has used yet, so that nothing of an earlier one is touched."""
    from clm_app.settings import default_home

    number = 1
    while (home := default_home() / f"demo-{number}").exists():
        number += 1
    return home


def _learn(arguments: argparse.Namespace) -> int:
    """Learn over the app that is open on this workspace, or over one that is opened for as long as it takes."""
    from rich.console import Console

    from clm_app.data.streams import stream_from
    from clm_app.settings import Settings
    from ui import story

    home = (arguments.home or Settings().home).expanduser().resolve()

    def show(address: str, console) -> None:
        stream = [s for path in arguments.data for s in stream_from(path.resolve(), arguments.tasks, home / "cache")]
        story.learn(story.Door(address), story.wish_for(stream, vars(arguments)), console)

    if address := open_address(home):
        with said_plainly(Console(), []) as failures:
            show(address, Console())
        return len(failures)
    return run_app(arguments, home, False, show, ends=True)


def open_address(home: Path) -> str | None:
    """Return the address of the app that is open on this workspace, or None."""
    import httpx

    try:
        address = json.loads((home / "app.json").read_text(encoding="utf-8"))["address"]
        found = httpx.get(f"{address}/api/health", timeout=5).json()["home"]
    except (OSError, ValueError, KeyError, httpx.HTTPError):
        return None
    return address if Path(found) == home.resolve() else None


def run_app(arguments: argparse.Namespace, home: Path | None, browser: bool, story=None, ends: bool = False) -> int:
    """Open the workspace, the port and the clock, and serve until Ctrl-C, or until the story is told if it `ends`.

    story: told in a thread of its own with the app's address; what it refuses is printed and makes the exit code 1.
    """
    import _thread

    from rich.console import Console

    from clm_app.serving.router import Router
    from clm_app.settings import Settings
    from clm_app.workspace import Workspace
    from jobs.clock import Clock
    from jobs.supervisor import spawn
    from ui.house import House
    from ui.server import serve

    console, failures = Console(), []
    with said_plainly(console, failures):
        workspace = Workspace(Settings(**({"home": home} if home else {})))
        router = Router(workspace, spawn)
        clock = Clock(workspace, spawn, on_deploy=lambda: threading.Thread(target=router.switch, daemon=True).start())

        def opened(address: str) -> None:
            (workspace.home / "app.json").write_text(json.dumps({"address": address, "pid": os.getpid()}))
            console.print(f"CLM is open at {address}")
            clock.start()
            if story:
                threading.Thread(target=told, args=[address], daemon=True).start()

        def told(address: str) -> None:
            with said_plainly(console, failures):
                story(address, console)
            if ends or failures:
                _thread.interrupt_main()

        def closed() -> None:
            (workspace.home / "app.json").unlink(missing_ok=True)
            clock.stop()
            router.close()
            workspace.close()

        port = Settings().port if arguments.port is None else arguments.port
        serve(House(workspace, router), port=port, open_browser=browser, on_stop=closed, on_open=opened)
    return min(1, len(failures))


@contextlib.contextmanager
def said_plainly(console, failures: list) -> Iterator[list]:
    """Print a refusal as one sentence and note it in `failures`; anything unforeseen keeps its traceback."""
    from clm_app.errors import ClmError, plain
    from store.db import HomeIsTaken

    try:
        yield failures
    except (ClmError, HomeIsTaken, OSError) as error:
        failures.append(error)
        console.print(str(error) if isinstance(error, HomeIsTaken) else plain(error), style="red", markup=False)
    except Exception as error:
        failures.append(error)
        console.print_exception()


def _test(arguments: argparse.Namespace) -> int:
    """Run what was named, else everything: file by file, on as many cores as it pays, one thread each."""
    if arguments.pytest:
        return subprocess.call([sys.executable, "-m", "pytest", *arguments.pytest], cwd=HERE.root)
    spread = ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1)), "--dist", "loadfile"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.call([sys.executable, "-m", "pytest", *spread], cwd=HERE.root, env=environment)


def _setup(arguments: argparse.Namespace) -> int:
    print("Only launch.py can add parts, from its own folder: python3 launch.py setup --help", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
