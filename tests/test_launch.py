"""What launch.py promises: it starts anywhere, resumes what was half installed, and says in one sentence what is wrong.

No network and no real pip here: a stand-in answers each command, and .venv is an empty file named python.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import launch

SOURCE = Path(launch.__file__)


class StandIn:
    """Answers commands in place of pip; `fails` maps a piece of a command to what pip says as it fails."""

    def __init__(self, fails=None):
        self.commands = []
        self.fails = fails or {}

    def __call__(self, command, on_line):
        said = " ".join(command)
        self.commands.append(said)
        if "-m venv" in said:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        for piece, text in self.fails.items():
            if piece in said:
                return launch.Finished(1, text)
        return launch.Finished(0, "fine")

    def did(self, piece):
        return any(piece in said for said in self.commands)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A fresh copy of the folder: a lock, a pyproject, no .venv; a machine without an NVIDIA card."""
    monkeypatch.setattr(launch, "sees_nvidia", lambda: False)
    (tmp_path / "constraints.txt").write_text("numpy==1.0\ntorch==2.13.0\nllama-cpp-python==0.3.36\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    return launch.Place(tmp_path, windows=False)


def install(place, run, wanted=launch.TO_OPEN, free_gb=100.0):
    return launch.install(place, wanted, run=run, free_gb=free_gb)


def refusal(place, **how):
    """Return the last lines a person sees when installing is refused: the sentence and the remedy."""
    with pytest.raises(launch.CannotStart) as caught:
        install(place, **how)
    return str(caught.value)


# ---- it starts anywhere


def test_only_the_standard_library_is_imported_at_the_top():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    tops = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {a.name for n in tops if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in tops if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_an_old_python_can_read_the_file_as_far_as_the_sentence():
    ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_an_old_python_is_told_what_it_is_and_how_to_get_a_newer_one():
    with pytest.raises(launch.CannotStart, match=r"This is Python 3\.10\.13; CLM needs 3\.11 .*apt install"):
        launch.check_python((3, 10, 13), "Linux")


def test_help_leaves_the_folder_untouched(tmp_path):
    copy = tmp_path / "launch.py"
    copy.write_bytes(SOURCE.read_bytes())
    asked = subprocess.run([sys.executable, "-I", str(copy), "--help"], capture_output=True, text=True, timeout=20)
    assert asked.returncode == 0 and "demo" in asked.stdout
    assert list(tmp_path.iterdir()) == [copy]


def test_a_windows_interpreter_lies_under_scripts():
    assert launch.Place(Path("clm"), windows=True).python == Path("clm/.venv/Scripts/python.exe")


# ---- it installs what is missing, once


def test_a_finished_environment_runs_no_command_at_all(place):
    assert install(place, StandIn()) == list(launch.TO_OPEN)
    again = StandIn()
    assert install(place, again) == [] and again.commands == []


def test_a_half_made_environment_resumes_at_the_missing_step(place):
    with pytest.raises(launch.CannotStart):
        install(place, StandIn(fails={"-e .": "broken off"}))
    assert install(place, StandIn()) == ["project"]


def test_a_changed_lock_takes_only_the_step_that_reads_it(place):
    install(place, StandIn())
    place.lock.write_text(place.lock.read_text().replace("numpy==1.0", "numpy==1.1"))
    assert install(place, StandIn()) == ["project"]


def test_a_new_torch_in_the_lock_installs_torch_again(place):
    install(place, StandIn())
    place.lock.write_text(place.lock.read_text().replace("torch==2.13.0", "torch==2.14.0"))
    again = StandIn()
    assert install(place, again) == ["torch", "project"] and again.did("torch==2.14.0+cpu")


def test_a_moved_folder_installs_the_project_again(place, tmp_path):
    install(place, StandIn())
    moved = launch.Place(tmp_path.rename(tmp_path.with_name("elsewhere")), windows=False)
    assert install(moved, StandIn()) == ["project"]


def test_an_environment_that_lost_its_python_is_made_anew(place):
    install(place, StandIn())
    place.python.unlink()
    again = StandIn()
    assert install(place, again) == list(launch.TO_OPEN) and again.did("-m venv")


def test_a_working_environment_made_by_hand_is_adopted(place):
    place.python.parent.mkdir(parents=True)
    place.python.touch()
    run = StandIn()
    install(place, run)
    assert not run.did("-m venv")


def test_a_torn_ledger_means_every_step_again_instead_of_a_crash(place):
    install(place, StandIn())
    place.ledger.write_text('{"torch": ')
    assert install(place, StandIn()) == list(launch.TO_OPEN)


def test_the_tests_need_one_step_more_and_llama_is_never_on_the_way_to_the_page(place):
    arguments = launch.read_arguments(["test", "-k", "one", "tests/test_launch.py"])
    assert launch.list_wanted(arguments) == (*launch.TO_OPEN, "test")
    assert arguments.pytest == ["-k", "one", "tests/test_launch.py"]
    assert "llama" not in launch.list_wanted(launch.read_arguments([]))
    assert "llama" in launch.list_wanted(launch.read_arguments(["setup", "--llama"]))


def test_a_second_click_waits_while_the_first_one_installs(place):
    with launch.hold_alone(place), open(place.root / ".clm-setup.lock") as second:
        assert not launch.try_lock(second.fileno())
    with open(place.root / ".clm-setup.lock") as second:
        assert launch.try_lock(second.fileno())


# ---- which PyTorch


def test_without_a_card_linux_gets_the_small_build_and_the_usual_index_is_the_last_resort(place):
    run = StandIn(fails={"torch==2.13.0+cpu": "Could not find a version"})
    install(place, run)
    torch = [said for said in run.commands if "torch==" in said]
    assert ["--no-index" in said for said in torch] == [True, False, False]
    assert launch.CPU_WHEELS in torch[1] and torch[2].endswith(" torch==2.13.0")


@pytest.mark.parametrize("gpu, system", [(True, "linux"), (False, "darwin"), (False, "win32")])
def test_elsewhere_the_usual_index_has_the_right_build(place, gpu, system):
    (command,) = launch.list_commands(place, "torch", gpu=gpu, system=system)
    assert command[-1] == "torch==2.13.0" and launch.CPU_WHEELS not in command


def test_a_folder_of_wheels_is_asked_before_the_network(place):
    place.wheels.mkdir()
    first, second = launch.list_commands(place, "project")
    assert "--no-index" in first and "--no-index" not in second
    assert str(place.wheels) in first


# ---- it says what is wrong, and what to do


def test_a_full_disk_is_refused_before_anything_is_written(place):
    text = refusal(place, run=StandIn(), free_gb=1.2)
    assert "1.2 GB free" in text and "needs 3 GB" in text and "move the folder" in text
    assert not place.venv.exists()


@pytest.mark.parametrize(
    "pip_says, sentence, remedy",
    [
        ("NewConnectionError: Temporary failure in name resolution", "cannot be reached", "put wheels into"),
        ("ERROR: Could not find a version that satisfies duckdb", "found no build", "Check the network"),
        ("OSError: [Errno 28] No space left on device", "disk became full", "Free space"),
        ("ssl: CERTIFICATE_VERIFY_FAILED", "does not trust", "PIP_CERT"),
        ("something nobody foresaw", "none that CLM knows", "Read the log"),
    ],
)
def test_what_pip_says_becomes_one_sentence_with_its_remedy(place, pip_says, sentence, remedy):
    text = refusal(place, run=StandIn(fails={"-e .": pip_says}))
    assert sentence in text and remedy in text
    assert pip_says in text and str(place.log) in text, "the last lines of pip and the whole log stay in sight"


def test_a_python_without_venv_names_the_missing_part(place):
    assert "python3-venv" in refusal(place, run=StandIn(fails={"-m venv": "ensurepip is not available"}))


def test_a_full_disk_does_not_lead_to_the_larger_build(place):
    run = StandIn(fails={"torch==": "No space left on device"})
    assert "disk became full" in refusal(place, run=run)
    assert len([said for said in run.commands if "torch==" in said]) == 1


# ---- what every process starts with


def test_nothing_leaves_the_machine_unless_the_person_says_so():
    assert launch.make_settings({"HF_HUB_OFFLINE": "0"})["HF_HUB_OFFLINE"] == "1"
    assert launch.make_settings({"CLM_ONLINE": "1"})["HF_HUB_OFFLINE"] == "0"


def test_a_shells_own_tuning_is_kept():
    assert launch.make_settings({"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"] == "ACTIVE"
    assert launch.make_settings({})["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_verb_inherits_what_stood_before_it():
    arguments = launch.read_arguments(["--port", "8000", "demo", "--tasks", "3", "--no-browser"])
    assert (arguments.verb, arguments.port, arguments.tasks, arguments.browser) == ("demo", 8000, 3, False)
    assert arguments.naive and arguments.strategy is None
