"""Folders on disk: replaced whole or not at all, and read with errors that name the file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from slimdiff.errors import SlimdiffError


@contextlib.contextmanager
def replacing(out: str | Path, marker: str) -> Iterator[Path]:
    """A new folder that takes the place of `out` when the block ends without an exception.

    Until then `out` stays as it is. A process that is killed leaves `out` as it was or, between two
    renames, none; the old and the new folder are then both whole beside it.

    Raises:
        SlimdiffError: `out` is neither new, nor empty, nor a folder of diffusers or transformers,
            which holds a JSON file `marker`.
    """
    target = Path(out).expanduser().resolve()
    _refuse_foreign(target, marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    new, old = (target.parent / f".{target.name}.{token}.{end}" for end in ("new", "old"))
    new.mkdir()
    try:
        yield new
        _flush(new)
        _open_modes(new)
        _swap(target, new, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _swap(target: Path, new: Path, old: Path) -> None:
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise


def _refuse_foreign(target: Path, marker: str) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise SlimdiffError(f"{target}: is a file; name a folder to save to")
    if not any(target.iterdir()):
        return
    if (target / ".git").exists():
        raise SlimdiffError(
            f"{target}: is a git repository, which is not replaced; save to a new folder and copy "
            f"the files"
        )
    try:
        written = json.loads((target / marker).read_text(encoding="utf-8"))
        ours = "_diffusers_version" in written or "transformers_version" in written
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise SlimdiffError(
            f"{target}: is not empty, and has no {marker} of diffusers that would make it safe to "
            f"replace; name a new folder"
        )


def _flush(folder: Path) -> None:
    """Have every file on the disk before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())


def _open_modes(folder: Path) -> None:
    """Let whoever may read a folder's JSON read its weights, which are written private."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(folder.stat().st_mode & 0o666)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        SlimdiffError: missing, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SlimdiffError(f"{path}: no such file; copy or save the folder again") from error
    except (OSError, ValueError) as error:
        raise SlimdiffError(f"{path}: not readable as JSON ({error}); save it again") from error
    if not isinstance(data, dict):
        raise SlimdiffError(f"{path}: holds a {type(data).__name__}, expected a JSON object")
    return data


@contextlib.contextmanager
def reading(where: str | Path) -> Iterator[None]:
    """Turn what goes wrong while diffusers reads `where` into one kind of error.

    Raises:
        SlimdiffError: says where and why.
    """
    from safetensors import SafetensorError

    causes = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
    try:
        yield
    except (SlimdiffError, torch.OutOfMemoryError):
        raise
    except (*causes, SafetensorError) as error:
        # What diffusers advises would load random weights, or is no option here.
        advice = r"\s*(?:If you want to instead|You may consider|Pass `trust_remote_code)"
        why = re.split(advice, str(error))[0].strip()
        raise SlimdiffError(f"{where}: cannot be loaded ({why or type(error).__name__})") from error
