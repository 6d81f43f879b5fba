"""What tests of checkpoints share: comparing, editing, and what transformers makes of them."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.model.conftest import write_json


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def edit_config(path, **changes):
    tree = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        if value is ...:
            tree.pop(key, None)
        else:
            tree[key] = value
    write_json(path / "config.json", tree)


def edit_tensors(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def torch_logits(path, token):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(np.asarray(token))).logits.numpy()
