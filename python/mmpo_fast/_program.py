"""Finds the program, makes its command line, and turns its failures into exceptions."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MmpoFastError(Exception):
    """The program ended with an error.

    `str(error)` is its message with its advice; `exit_code` tells the kind (2 an option, 3 data, 4 a model, 5 the operating
    system, 6 the device, 7 a number that cannot be trained on, 8 a damaged file, 9 another rank, 70 a bug); `log` is all that it wrote to standard error.
    """

    def __init__(self, message: str, exit_code: int, log: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.log = log


def find_program() -> str:
    """The path of `mmpo-fast`: `MMPO_FAST_PROGRAM` if it is set, the one that was installed with this package, or the first
    in `PATH`."""
    if given := os.environ.get("MMPO_FAST_PROGRAM"):
        return given
    name = "mmpo-fast" + (sysconfig.get_config_var("EXE") or "")
    folders = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    if user := sysconfig.get_preferred_scheme("user"):
        folders.append(sysconfig.get_path("scripts", scheme=user))
    for folder in folders:
        path = Path(folder) / name
        if path.is_file():
            return str(path)
    if found := shutil.which(name):
        return found
    raise FileNotFoundError(f"no program {name} in {', '.join(folders)} nor in PATH: reinstall mmpo-fast")


def command_line(command: str, options: Mapping[str, Any]) -> list[str]:
    """The words of a command with these options. `None` leaves an option out."""
    words = [find_program(), command]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or (value is False and name in SWITCHES):
            continue
        if value is True:
            words.append(flag)
        elif value is False:
            words.append(f"{flag}=false")
        else:
            words.append(f"{flag}={os.fspath(value) if isinstance(value, os.PathLike) else value}")
    return words


# Flags that take no value: leaving them out is the only way to say no.
SWITCHES = frozenset({"resume", "raw", "quiet", "verbose", "json"})


def environment() -> dict[str, str]:
    """The program's environment: its messages come without colours, which are not for a terminal here."""
    return os.environ | {"NO_COLOR": "1"}


def failure(exit_code: int, log: str) -> MmpoFastError:
    """The exception of a program that ended with this code, after writing this to standard error."""
    start = log.rfind("  \N{MULTIPLICATION SIGN} ")
    lines = log[start:].splitlines() if start >= 0 else log.splitlines()[-5:]
    message = "\n".join(line.strip() for line in lines if line.strip()).removeprefix("\N{MULTIPLICATION SIGN} ")
    return MmpoFastError(message or f"mmpo-fast ended with {exit_code}", exit_code, log)
