"""The state of a training on disk: the last epoch's and the best one's, each there whole or not at all."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pipeline.errors import StoreError, Temporary, first_line

LAST, BEST = "last.ckpt", "best.ckpt"


class OneStep(TorchCheckpointIO):
    """A checkpoint is there whole or not at all. Lightning moves it from the temporary folder, which may be another disk. `kept`
    is called with the name of each that is there."""

    def __init__(self, kept: Callable[[str], None]) -> None:
        self._kept = kept

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ARG002
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        replace(Path(path), buffer.getbuffer())  # getvalue would copy it
        self._kept(Path(path).name)


class Keep(ModelCheckpoint):
    """Goes on where its files are now: Lightning forgets the best score when the folder has moved, and the next epoch, however
    bad, would be the best one."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = Path(self.dirpath or "")

        def here(path: str) -> str:
            return str(folder / Path(path).name) if path else ""

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {"dirpath": self.dirpath, **{name: here(state_dict[name]) for name in paths}}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | moved | {"best_k_models": best})


def make_folder(folder: Path) -> None:
    """For checkpoints; before the training, for whoever cannot write there wants to know now. What a kill has left half written
    is removed: some 140 MB each time. Not what another run of this job is writing, in whatever container. Raises StoreError."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*.part"):
            # Where a disk knows no locks, or does not let us at it, it stays.
            with suppress(OSError), part.open("r+b") as file:
                flock(file, LOCK_EX | LOCK_NB)
                part.unlink()


def open_part(path: Path) -> tuple[Path, BinaryIO]:
    """A file to write what is to be at `path` whole or not at all, to be renamed before it is closed. While it is open it is
    locked, which tells `make_folder` that somebody lives, where a process id says nothing: two containers may have the same."""
    part = path.with_suffix(f".{secrets.token_hex(8)}.part")
    file = part.open("wb")
    with suppress(OSError):
        flock(file, LOCK_EX)
    if part.exists():
        return part, file
    file.close()  # taken for left over before it was locked
    return open_part(path)


def replace(path: Path, content: bytes | memoryview) -> None:
    """Write a file in one step. Raises StoreError when that cannot be."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part, file = open_part(path)
        try:
            with file:
                file.write(content)
                file.flush()
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)  # on a full disk it would take the last of it


def content_of(path: Path) -> bytes:
    """A checkpoint as it lies there. Raises Temporary when it is gone, or when the machine does not let it be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        do = "Run again: either another run of this job has finished and its model is there, or the training starts anew"
        raise Temporary(f"{path}: somebody has removed it", do=do) from error
    except (OSError, MemoryError) as error:  # it may be sound, so nobody is told to remove it
        do = "Check the rights, the disk and the memory; the same command goes on from it"
        raise Temporary(f"{path}: {first_line(error)}", do=do) from error


def read(path: Path) -> dict[str, Any]:
    """A checkpoint, its tensors on the CPU. Raises StoreError when it is damaged, and what `content_of` raises."""
    return parsed(content_of(path), str(path))


def parsed(content: bytes, where: str) -> dict[str, Any]:
    """A checkpoint, its tensors on the CPU. Raises StoreError when it is damaged."""
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle trips the unpickler up in any way
        got, folder = f"{where}: cannot be read ({str(error).partition('. ')[0]})", where.rpartition("/")[0]
        raise StoreError(got, need="a checkpoint as it was written", do=f"Remove {folder} and begin anew") from error
    return state


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """The operating system's errors as StoreError: there is no place for what a training leaves there."""
    try:
        yield
    except OSError as error:
        do = "Give another output.uri, change the rights or free some space; the same command goes on from the last epoch"
        raise StoreError(f"{path}: {error.strerror}", need="a place for checkpoints", do=do) from error
