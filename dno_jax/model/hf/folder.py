"""What a folder holds that should hold a checkpoint, where it holds something else."""

from __future__ import annotations

from pathlib import Path

from dno_jax.errors import DnoError

_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(file: Path) -> None:
    """Raise DnoError if a file is only Git LFS's note of where its content lies."""
    try:
        with file.open("rb") as opened:
            is_pointer = opened.read(len(_POINTER)) == _POINTER
    except OSError:
        return  # whoever reads it says why it cannot be read
    if is_pointer:
        raise DnoError(
            f"{file}: a Git LFS pointer, not the file itself: the repository was cloned without its large files. Run "
            f"`git lfs install` and `git lfs pull` in {file.parent}, or download the checkpoint with `hf download`"
        )
