"""Programs started by tests: this checkout's code, whatever is installed, and never the network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PEFTZOO = (sys.executable, "-m", "peftzoo")


def environment(**variables):
    """Return the environment of a program; a variable given as None is taken out of it."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    wanted = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | variables
    return {name: value for name, value in wanted.items() if value is not None}


def start(*command, **variables):
    """Run a command in the working directory; return what it said and how it ended."""
    pipe = subprocess.PIPE
    program = subprocess.Popen([*map(str, command)], env=environment(**variables), stdout=pipe, stderr=pipe, text=True)
    try:
        said, complained = program.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        program.terminate()  # not kill: a launcher that is asked to end takes its processes with it
        program.communicate()
        raise
    return subprocess.CompletedProcess(program.args, program.returncode, said, complained)
