"""ADAPTER.json, the note in the folder of a policy that is an adapter beside another policy's weights."""

from __future__ import annotations

import hashlib

from etils import epath

ADAPTER = "ADAPTER.json"


def adapter_note(policy: epath.Path) -> str | None:
    """What the note of a policy holds; None where the policy has weights of its own."""
    note = policy / ADAPTER
    return note.read_text() if note.exists() else None


def identity(digest: str, note: str | None) -> str:
    """The fingerprint of a policy, from that of its arrays and its note: it names both."""
    return digest if note is None else hashlib.sha256(f"{note}{digest}".encode()).hexdigest()
