"""`import palimpsest`, `--help` and `list` stay light: what they load is checked, never a time."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "scipy", "pandas")

PROBE = """
import sys
{code}
loaded = [name for name in {heavy!r} if name in sys.modules]
sys.stderr.write("loaded:" + ",".join(loaded))
"""

RUN_CLI = """
sys.argv = ["palimpsest", *{arguments!r}]
from palimpsest.cli import main
try:
    code = main()
except SystemExit as stop:
    code = stop.code
if code not in (None, 0):
    sys.stderr.write("exit code " + str(code))
    sys.exit(1)
"""


def _loaded_by(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(code=code, heavy=HEAVY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.rpartition("loaded:")[2].strip()


def test_import_palimpsest_loads_nothing_heavy() -> None:
    assert _loaded_by("import palimpsest") == ""


@pytest.mark.parametrize("arguments", [["--help"], ["list", "methods"]])
def test_command_line_loads_nothing_heavy(arguments: list[str]) -> None:
    if importlib.util.find_spec("palimpsest.cli") is None:
        pytest.skip("palimpsest.cli is not there yet")
    assert _loaded_by(RUN_CLI.format(arguments=arguments)) == ""
