"""A C source beside this file as a library: compiled once for this processor, kept in the user's cache folder.

What it is called there is a hash of the texts, the compiler and the processor, so nothing stale is ever loaded. It is
written under another name first and then renamed. Where the folder cannot be written, a temporary one is used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fnlm.machine import cpu_flags

COMPILERS = ("cc", "gcc", "clang")
# No result depends on errno or a trap, and without them sqrt and selections become vector instructions.
OPTIONS = ("-std=gnu11", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
LINKING = ("-fPIC", "-shared", "-pthread")
PATIENCE = 120  # seconds for the compiler


class Status(NamedTuple):
    """The library where there is one, and what `fnlm doctor` says of it: where it lies, or why there is none."""

    library: ctypes.CDLL | None
    says: str


@cache
def library(name: str) -> Status:
    """The library of NAME.c in this process. Raises nothing: who wants it can do without."""
    if sys.platform == "win32":
        return Status(None, "not on Windows")
    compiler = next((found for c in COMPILERS if (found := shutil.which(c))), None)
    if compiler is None:
        return Status(None, f"no C compiler ({', '.join(COMPILERS)})")
    try:
        path = built(name, compiler)
        return Status(_loaded(path), f"{path} by {compiler}")
    except subprocess.CalledProcessError as error:
        return Status(None, f"{compiler} failed: {_complaint(error.stderr)}")
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return Status(None, f"{compiler}: {error}")


def built(name: str, compiler: str, folder: Path | None = None, options: Sequence[str] = ()) -> Path:
    """The library's path below `folder` (the user's cache), compiled if it is not there.

    CalledProcessError where the compiler fails, with its words; OSError where nothing can be written at all.
    """
    source = Path(__file__).with_name(f"{name}.c")
    about = " ".join([_version(compiler), *OPTIONS, *LINKING, *options, platform.machine(), *sorted(cpu_flags())])
    digest = hashlib.sha256(b"\0".join([about.encode(), *_texts(source)])).hexdigest()
    file = f"{name}-{digest[:16]}.so"
    try:
        return _compiled(compiler, source, (folder or cache_folder()) / file, options)
    except (OSError, RuntimeError):  # read-only, full, or no home at all
        if folder is not None:
            raise
    return _compiled(compiler, source, _temporary() / file, options)


def cache_folder() -> Path:
    """Where libraries are kept: ~/.cache/fnlm, or as XDG_CACHE_HOME says."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "fnlm"


def _temporary() -> Path:
    """A folder of this user's among the temporary ones, which nobody else can have filled."""
    folder = Path(tempfile.gettempdir()) / f"fnlm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    safe = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077
    return folder if safe else Path(tempfile.mkdtemp(prefix="fnlm-"))


def _texts(source: Path) -> Iterator[bytes]:
    """What the compiler will read of ours: the source, and what it includes from beside it."""
    text = source.read_bytes()
    yield text
    for name in re.findall(rb'^#include "(.+)"', text, re.MULTILINE):
        yield from _texts(source.with_name(name.decode()))


@cache
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=PATIENCE, text=True)
    return done.stdout


def _compiled(compiler: str, source: Path, to: Path, options: Sequence[str]) -> Path:
    if to.is_file():
        return to
    to.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(suffix=".so", dir=to.parent)
    os.close(handle)
    try:
        for tuned in (["-march=native"], ["-mcpu=native"], []):  # not every compiler knows the first on every processor
            command = [compiler, *OPTIONS, *LINKING, *tuned, *options, str(source), "-o", draft, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            if done.returncode == 0:
                break
        done.check_returncode()
        os.chmod(draft, 0o644)
        os.replace(draft, to)
    finally:
        Path(draft).unlink(missing_ok=True)
    return to


def _loaded(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.fnlm_team.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    loaded.fnlm_team.restype = None
    loaded.fnlm_team(*_openmp())
    return loaded


@cache
def _openmp() -> tuple[int | None, int | None]:
    """The two functions of torch's OpenMP that start a team and count it; None twice where it has no such."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            openmp = ctypes.CDLL(str(path))
            names = (openmp.GOMP_parallel, openmp.omp_get_num_threads)
        except (OSError, AttributeError):
            continue
        start, count = (ctypes.cast(f, ctypes.c_void_p).value for f in names)
        return start, count
    return None, None


def _complaint(text: object) -> str:
    lines = (text if isinstance(text, str) else "").splitlines()
    return next(iter([*(line for line in lines if "error" in line), *lines]), "without a word").strip()
