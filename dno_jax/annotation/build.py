"""The annotator and the client that a configuration asks for."""

from __future__ import annotations

import os

from dno_jax.annotation.client import JudgeClient
from dno_jax.annotation.embedded import GivenAnnotator, GoldAnnotator, OracleAnnotator, TableAnnotator
from dno_jax.annotation.endpoint_annotator import EndpointAnnotator
from dno_jax.annotation.judges.functions import build_function
from dno_jax.annotation.ledger.budget import Budget
from dno_jax.annotation.ledger.store import VerdictStore
from dno_jax.annotation.pool import Annotator
from dno_jax.annotation.python_function import PythonAnnotator
from dno_jax.annotation.transport.client import EndpointClient
from dno_jax.config import AnnotationSection, ChatSection
from dno_jax.errors import DnoError


def build_annotator(config: AnnotationSection, *, store_path: str | os.PathLike[str], seed: int) -> Annotator:
    """Build the annotator a configuration asks for; whatever is wrong shows here, before sampling is paid for.

    Args:
        store_path: the run's own file of verdicts, in its directory; made if absent, touched only where verdicts are
            paid for. `annotation.store` stands before it.
        seed: decides the order in which a list-wise judge sees the candidates, and a table's draws.

    Raises:
        DnoError: an unknown criterion, a table that is none, a function that cannot be imported, a missing key, an
            unreadable rubric, a store that cannot be opened, a bad URL; a kind that is no annotator of the host's.
    """
    match config.kind:
        case "oracle":
            return OracleAnnotator(config.oracle)
        case "table" if config.table is not None:
            return TableAnnotator(config.table, seed=seed)
        case "python" if config.python is not None:
            return PythonAnnotator(config.python)
        case "gold":
            return GoldAnnotator()
        case "given":
            return GivenAnnotator()
        case "openai" | "ensemble":
            function = build_function(config, seed=seed)
            return EndpointAnnotator(function, open_client(config, store_path=store_path))
        case kind:
            raise DnoError(f"annotation.kind={kind}: judged on the devices, not by an annotator of the host's")


def open_client(section: AnnotationSection, *, store_path: str | os.PathLike[str]) -> JudgeClient:
    """Return the client of all that a configuration asks by chat; nothing is sent yet.

    Args:
        store_path: the run's own file of verdicts, in its directory; `annotation.store` stands before it.

    Raises:
        DnoError: a missing key, an unusable URL, a store that cannot be opened.
    """
    clients: dict[ChatSection, EndpointClient] = {}
    for place, chat in _places(section).items():
        who = "teacher" if chat is section.teacher else "judge"
        clients[chat] = EndpointClient(chat, who=f"the {who} {chat.model!r}", place=place)
    own = os.fspath(store_path)
    store = VerdictStore(section.store or own)
    try:
        return JudgeClient(clients, store=store, budget=Budget(section, store=store, run=run_name(own, store.path)))
    except BaseException:
        store.close()
        raise


def run_name(own_path: str, path: str) -> str:
    """Return the name of a run in a store: its directory seen from the store's, so that both may move together.

    Args:
        own_path: of the store that the run would have for itself.
        path: of the store that it has.
    """
    folder = os.path.dirname(own_path)
    return (
        folder
        if "://" in folder
        else os.path.relpath(os.path.realpath(folder), os.path.dirname(os.path.realpath(path)))
    )


def _places(section: AnnotationSection) -> dict[str, ChatSection]:
    """Whom a configuration asks, by the place where messages say that they are configured."""
    places: dict[str, ChatSection] = {}
    if section.kind == "openai":
        places["annotation.openai"] = section.openai
    if section.kind == "ensemble":
        places |= {f"annotation.ensemble.{number}": judge for number, judge in enumerate(section.ensemble)}
    if section.teacher is not None:
        places["annotation.teacher"] = section.teacher
    return places
