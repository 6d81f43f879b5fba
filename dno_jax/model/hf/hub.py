"""Checkpoints on the Hugging Face Hub: `owner/name` or `owner/name@revision` in place of a folder, and back to it.

huggingface_hub does the work, by its own variables (HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE): what is fetched
lies in its cache, and what lies there whole is not asked for again. A token is never written, logged or shown.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dno_jax.config.base import hub_id
from dno_jax.errors import DnoError
from dno_jax.model.hf.card import LICENCE_FILES
from dno_jax.model.hf.config_json import PROCESSOR_FILES, TOKENIZER_FILES
from dno_jax.model.hf.files import INDEX_FILE, SINGLE_FILE, weight_files

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "README.md",
    INDEX_FILE,
    *PROCESSOR_FILES,
    *LICENCE_FILES,
    *TOKENIZER_FILES,
)
_MAX_WORDS = 400  # characters of what a server says
_SIGN_IN = "sign in (`hf auth login`, or a token in HF_TOKEN)"


def folder(path: str | Path, *, weights: bool = False) -> Path:
    """Return the folder of a checkpoint: the path itself, or the Hub's snapshot, fetched as far as it lacks.

    Args:
        weights: whether the tensors are wanted; else only the small files come.

    Raises:
        DnoError: the Hub does not give it, or cannot be reached and the cache has not all of it.
    """
    found = hub_id(str(path))
    if found is None:
        return Path(path)
    place = os.environ.get("HF_ENDPOINT"), os.environ.get("HF_HOME")
    return _snapshot(*found, weights=weights, place=place)


def commit_of(path: str) -> str:
    """Return the commit that an id on the Hub means today, or meant when the cache last saw it.

    Raises:
        DnoError: as `folder`.
    """
    return folder(path).name


@functools.cache
def _snapshot(repo: str, revision: str | None, *, weights: bool, place: tuple[str | None, ...]) -> Path:
    del place  # a part of the key: another Hub, or another cache
    patterns: list[str] = [*_SMALL_FILES]
    if weights:
        small = folder(repo if revision is None else f"{repo}@{revision}")
        # The very commit that the small files are of, whatever a branch is moved to meanwhile.
        revision = small.name
        patterns += [glob.escape(file.name) for file in weight_files(small)] or [SINGLE_FILE]
    from huggingface_hub import snapshot_download

    with _explained(repo, revision):
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=patterns, endpoint=os.environ.get("HF_ENDPOINT"))
        )


def create(repo: str, *, private: bool = True) -> None:
    """Make a repository for a checkpoint, unless it is there: before the work that ends in it.

    Raises:
        DnoError: the Hub refuses, or cannot be reached.
    """
    found = hub_id(repo, folder_first=False)
    if found is None or found[1] is not None:
        raise DnoError(f"--push {repo!r}: expected the id of a repository, owner/name")
    with _explained(repo, None, pushing=True):
        _api().create_repo(repo, private=private, exist_ok=True)


def push(path: str | Path, repo: str) -> str:
    """Upload an export into a repository, in one commit, in place of the weights there; return the commit.

    Raises:
        DnoError: as `create`. The export stays where it is.
    """
    from huggingface_hub.errors import HfHubHTTPError

    files, there = {str(file.relative_to(path)) for file in Path(path).rglob("*")}, []
    with _explained(repo, None, pushing=True):
        with suppress(HfHubHTTPError):  # a new repository may have nothing to list
            there = _api().list_repo_files(repo)
        stale = [name for name in there if name.endswith((".safetensors", INDEX_FILE)) and name not in files]
        made = _api().upload_folder(
            repo_id=repo,
            folder_path=path,
            commit_message="Upload a checkpoint exported by dno_jax",
            delete_patterns=[glob.escape(name) for name in stale] or None,
        )
    return str(made.oid)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


@contextmanager
def _explained(repo: str, revision: str | None, *, pushing: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises into a DnoError with the Hub's words and what can be done."""
    from huggingface_hub import errors

    name = repo if revision is None else f"{repo}@{revision}"
    try:
        yield
    except errors.GatedRepoError as error:
        why = f"the repository is gated: ask for access on its page, and {_SIGN_IN}"
        raise DnoError(f"{name}: {why}. {_said(error)}") from None
    except errors.RevisionNotFoundError as error:
        raise DnoError(
            f"{name}: the repository has no revision {revision!r}; give a branch, tag or commit of it. {_said(error)}"
        ) from None
    except errors.RepositoryNotFoundError as error:
        local = "" if pushing else "no folder of that name is here, and "
        raise DnoError(
            f"{name}: {local}the Hub shows no repository of that name to you; check the name and, if it is private, "
            f"{_SIGN_IN}. {_said(error)}"
        ) from None
    except errors.HFValidationError as error:
        raise DnoError(f"{name}: no id of a repository. {_said(error)}") from None
    except Exception as error:
        raise _unreached(error, name, pushing=pushing) from None


def _unreached(error: Exception, name: str, *, pushing: bool) -> Exception:
    """What to raise for an answer that is an error, for no answer, and for a disk that takes none; or the defect."""
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    if isinstance(error, errors.HfHubHTTPError) and response is not None:
        status = response.status_code
        what = f"{_SIGN_IN} with the right to do this" if status in (401, 403) else "try again later"
        return DnoError(f"{name}: the Hub refuses (status {status}); {what}. {_said(error)}")
    unanswered = isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled)
    if unanswered or type(error).__module__.startswith("httpx"):  # by another name in every version
        kept = "nothing was uploaded" if pushing else "it is not whole in the cache"
        return DnoError(
            f"{name}: the Hub cannot be reached, and {kept}; connect this machine, unset HF_HUB_OFFLINE, or give a "
            f"local folder. {_said(error)}"
        )
    if isinstance(error, OSError):
        return DnoError(f"{name}: cannot be kept in the cache ({_plain(str(error.strerror or error))})")
    return error


def _said(error: Exception) -> str:
    """What the Hub or its client said, in one line that a terminal can show, without any token."""
    words = _plain(str(getattr(error, "server_message", None) or error))
    return f"It says: {words}" if words else ""


def _plain(text: str) -> str:
    from huggingface_hub import get_token

    if (token := get_token()) is not None:
        text = text.replace(token, "[token]")
    text = re.sub(r"hf_\w{6,}", "[token]", text)
    text = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    text = re.sub(" +", " ", text).strip()
    return text if len(text) <= _MAX_WORDS else text[: _MAX_WORDS - 3] + "..."
