# Short names for what is done often; `just` alone lists them.

python := if os_family() == "windows" { ".venv/Scripts/python.exe" } else { ".venv/bin/python" }
start := if os_family() == "windows" { "py launch.py" } else { "python3 launch.py" }

_list:
    @just --list --unsorted

# open the app
run *flags:
    {{start}} {{flags}}

# learn a few tasks one after another and show what was kept
demo *flags:
    {{start}} demo {{flags}}

# every test, the browser's too
test *flags:
    {{start}} test {{flags}}

# style and the direction of imports
lint:
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .
    {{python}} -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

# what the linter can mend by itself
fix:
    {{python}} -m ruff check --fix .
    {{python}} -m ruff format .

# the pages that a machine writes
docs:
    {{python}} docs/make.py

# tables: ours beside a peer, same work, one run
bench *flags:
    {{start}} setup --bench
    {{python}} -m benchmarks {{flags}}
