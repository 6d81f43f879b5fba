"""Checkpoint files to arrays: every value in its place, nothing read twice, and no file that is believed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.hf import importer
from tests.model.checkpoints import edit_tensors, same
from tests.model.conftest import hf_config, random_params, write_json

ROOT = Path(__file__).parents[2]


def split_in_two(path, tensors):
    """Write tensors as two shards with an index; return the shards' names."""
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {name: shards[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in shards:
        save_file({n: a for n, a in tensors.items() if weight_map[n] == shard}, path / shard)
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return shards


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_source_dtypes_and_shards(tmp_path, config, params, checkpoint, dtype):
    """An index with two shards, as large checkpoints come; narrow floats widen exactly."""
    tensors = {name: a.astype(dtype) for name, a in load_file(checkpoint / "model.safetensors").items()}
    (checkpoint / "model.safetensors").unlink()
    shards = split_in_two(checkpoint, tensors)
    _, loaded = hf.load(checkpoint)
    same(loaded, jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), params))
    (checkpoint / shards[1]).unlink()
    with pytest.raises(DnoError, match=r"model-00002-of-00002\.safetensors: no such file"):
        hf.load(checkpoint)


@pytest.mark.parametrize("wanted", [np.float32, ml_dtypes.bfloat16])
def test_every_bit_pattern_of_a_narrow_float_survives(config, checkpoint, wanted):
    """Subnormal numbers and both zeros too, on devices that flush subnormals when they compute."""
    name = "model.layers.1.mlp.up_proj.weight"
    size = config.intermediate_size * config.hidden_size
    bits = np.arange(0, 1 << 16, 65536 // size, dtype=np.uint16)[:size]
    bits = np.where((bits & 0x7FFF) >= 0x7F80, 0x8001, bits).astype(np.uint16)  # no infinity and no NaN
    value = bits.view(ml_dtypes.bfloat16).reshape(config.intermediate_size, config.hidden_size)
    edit_tensors(checkpoint, lambda t: t.update({name: value}))
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda _: place, hf.load(checkpoint)[1])
    for placed in (None, shardings):
        _, params = hf.load(checkpoint, shardings=placed, dtype=wanted)
        expected = value.astype(wanted)
        assert {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)} == {np.dtype(wanted)}
        found = np.ascontiguousarray(np.asarray(params["layers"]["up"])[1].T)
        np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("piece", [importer._PIECE, 700], ids=["whole", "pieces"])
def test_sharded_load_gives_every_device_its_slice(config, checkpoint, monkeypatch, piece):
    """Every axis of every parameter is split in turn, head_dim included, in one piece and in many."""
    monkeypatch.setattr(importer, "_PIECE", piece)
    _, whole = hf.load(checkpoint)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    for axis in range(4):

        def sharding(leaf, axis=axis):
            split = axis < leaf.ndim and leaf.shape[axis] % 2 == 0
            parts = ["x" if split and i == axis else None for i in range(leaf.ndim)]
            return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*parts))

        shardings = jax.tree.map(sharding, whole)
        _, placed = hf.load(checkpoint, shardings=shardings)
        assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s, placed, shardings))
        same(jax.tree.map(np.asarray, placed), whole)


def test_what_devices_share_is_read_once(checkpoint, params):
    shardings = jax.tree.map(
        lambda _: jax.sharding.NamedSharding(
            jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec()
        ),
        params,
    )
    size = sum(a.nbytes for a in load_file(checkpoint / "model.safetensors").values())
    for placed in (None, shardings):
        calls = []
        hf.load(checkpoint, shardings=placed, progress=lambda *call: calls.append(call))  # noqa: B023
        assert sum(count for count, _ in calls) == size
        assert {total for _, total in calls} == {size}


def test_missing_files_are_named(tmp_path, checkpoint):
    with pytest.raises(DnoError, match="nowhere: no such directory"):
        hf.load(tmp_path / "nowhere")
    (checkpoint / "model.safetensors").rename(tmp_path / "model")
    with pytest.raises(DnoError, match="only safetensors"):
        hf.load(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(DnoError, match=r"config\.json: not valid JSON"):
        hf.load(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(DnoError, match=r"config\.json: no such file"):
        hf.read_config(checkpoint)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_files_are_refused(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DnoError, match="truncated or corrupt"):
        hf.load(checkpoint)


def test_wrong_tensors_are_named(checkpoint):
    original = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"

    def reset(tensors):
        tensors.clear()
        tensors.update(original)

    def transposed(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name].T)

    def integers(tensors):
        tensors[name] = tensors[name].astype(np.int32)

    cases = [
        (lambda t: t.pop(name), f"tensor {name} is missing"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[name]}), "unexpected tensor model.layers.3"),
        (transposed, rf"{name} has shape \(36, 16\)"),
        (integers, f"{name} has dtype I32"),
    ]
    for edit, words in cases:
        edit_tensors(checkpoint, edit)
        with pytest.raises(DnoError, match=words):
            hf.load(checkpoint)
        edit_tensors(checkpoint, reset)
    edit_tensors(checkpoint, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, "f4")}))
    hf.load(checkpoint)  # an old checkpoint's buffer


def test_all_that_is_wrong_is_named_at_once(checkpoint):
    def spoil(tensors):
        for layer in range(3):
            del tensors[f"model.layers.{layer}.mlp.up_proj.bias"]
        tensors["model.visual.proj"] = np.zeros(3, np.float32)
        tensors["model.layers.3.mlp.up_proj.bias"] = np.zeros(56, np.float32)
        tensors["model.norm.weight"] = np.zeros(35, np.float32)
        tensors["lm_head.weight"] = np.zeros((97, 36), np.int8)

    edit_tensors(checkpoint, spoil)
    with pytest.raises(DnoError) as caught:
        hf.load(checkpoint)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(";")[0].strip() for line in lines[:3]] == [
        f"tensor model.layers.{layer}.mlp.up_proj.bias is missing" for layer in range(3)
    ]
    assert ["unexpected tensor model." in line for line in lines] == [False] * 3 + [True] * 2 + [False] * 2
    assert "lm_head.weight has dtype I8" in lines[5]
    assert "model.norm.weight has shape (35,); config.json says (36,)" in lines[6]


def test_a_second_copy_of_a_tied_head_must_be_the_same(tmp_path, config):
    config = dataclasses.replace(config, tie_word_embeddings=True)
    source = tmp_path / "source"
    source.mkdir()
    write_json(source / "config.json", hf_config(config))
    path = tmp_path / "tied"
    hf.save(path, config, random_params(config), source=source)
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    hf.load(path)
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(DnoError, match=r"lm_head\.weight differs"):
        hf.load(path)


NORM = "model.norm.weight"


def hostile(header, *, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(**changes):
    return {NORM: {"dtype": "F32", "shape": [36], "data_offsets": [0, 144], **changes}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (hostile(b"{}", length=2**64 - 1), "header too large"),
        (hostile(b"{}", length=1 << 40), "header too large"),
        (hostile(b"{}", length=200), "header"),
        (hostile(b"not json"), "invalid JSON in header"),
        (hostile(b"\xff\xfe"), "invalid UTF-8 in header"),
        (hostile(b"[" * 100_000), "invalid JSON in header"),
        (hostile(b"[1, 2]"), "invalid JSON in header"),
        (hostile(b'{"a": ' + b"9" * 5000 + b"}"), "number out of range"),
        (hostile(json.dumps(entry())[:-1].encode() + b"," + json.dumps(entry())[1:].encode()), "incomplete metadata"),
        (hostile({NORM: 7}), "expected struct TensorInfo"),
        (hostile(entry(shape=[-36]), data=bytes(144)), "integer `-36`"),
        (hostile(entry(shape=[True] * 36), data=bytes(144)), "boolean `true`"),
        (hostile(entry(shape=[36.0]), data=bytes(144)), "floating point `36.0`"),
        (hostile(entry(shape=[10**400, 10**400]), data=bytes(144)), "number out of range"),
        (hostile(entry(shape=[2**62, 2**62]), data=bytes(144)), "overflow"),
        (hostile(entry(shape=[37]), data=bytes(144)), "invalid shape, data type, or offset"),
        (hostile(entry(dtype="F" * 5000), data=bytes(144)), "unknown variant"),
        (hostile(entry(data_offsets=[144, 0]), data=bytes(144)), f"invalid offset for tensor `{NORM}`"),
        (hostile(entry(data_offsets=[0]), data=bytes(144)), "expected a tuple of size 2"),
        (hostile(entry(data_offsets=[0, -1]), data=bytes(144)), "integer `-1`"),
        (hostile(entry(data_offsets=[8, 152]), data=bytes(152)), f"invalid offset for tensor `{NORM}`"),
        (hostile(entry(), data=bytes(100)), "file not fully covered"),
        (hostile(entry(), data=bytes(200)), "file not fully covered"),
        (
            hostile({**entry(), "other": entry(data_offsets=[100, 244])[NORM]}, data=bytes(244)),
            "invalid offset for tensor `other`",
        ),
    ],
    ids=range(24),
)
def test_hostile_headers_are_refused(checkpoint, content, words):
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(DnoError, match=words) as caught:
        hf.load(checkpoint)
    assert "model.safetensors: truncated or corrupt" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (None, "no weight_map"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ({NORM: "../outside.safetensors"}, r"'\.\./outside\.safetensors' of tensor model\.norm\.weight is not a file"),
        ({NORM: "/etc/passwd"}, "is not a file name"),
        ({NORM: ".."}, "is not a file name"),
        ({NORM: ""}, "is not a file name"),
        ({NORM: 7}, "shard 7 of tensor"),
        ({NORM: ["x"]}, "is not a file name"),
        ({NORM: "folder"}, "folder: not a regular file"),
        ({NORM: "absent.safetensors"}, r"absent\.safetensors: no such file"),
        ({"model.embed_tokens.weight": "1"}, r"model\.embed_tokens\.weight \(the index says 1, it is in 2"),
        ({"model.none": "1"}, r"model\.none \(the index says 1, it is in none"),
        ({NORM: ...}, r"model\.norm\.weight \(the index says nothing, it is in 1"),
    ],
    ids=range(14),
)
def test_hostile_indices_are_refused(tmp_path, checkpoint, weight_map, words):
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (checkpoint / "folder").mkdir()
    places = {name: "2" if "embed" in name or "head" in name else "1" for name in tensors}
    for shard in "12":
        save_file({n: a for n, a in tensors.items() if places[n] == shard}, checkpoint / shard)
    if isinstance(weight_map, dict) and weight_map:
        weight_map = {n: s for n, s in {**places, **weight_map}.items() if s is not ...}
    write_json(checkpoint / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(DnoError, match=words):
        hf.load(checkpoint)


def test_an_index_nested_without_end_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(DnoError, match=r"index\.json: not valid JSON"):
        hf.load(checkpoint)


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_large_checkpoint_passes_through_little_memory(tmp_path):
    """1.7 GB in five files: a process holds its final arrays and less than two tensors more, and reads its share."""
    code = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import load
path = Path({str(tmp_path)!r}, "checkpoint")
largest = load.write_checkpoint(path, layers=16, hidden=2048, vocab=32000)
print(json.dumps(list(load.measure(path, largest=largest, modes=(("dno_jax", 1), ("dno_jax", 2), ("export", 1))))))
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = json.loads(done.stdout.splitlines()[-1])
    assert lines[0]["file_gb"] > 1.5
    assert len(lines) == 4
    for line in lines[:3]:
        assert line["over_final_mb"] < 2 * line["largest_tensor_mb"], line
        # The norms, 0.01 % of the bytes, lie whole on each device.
        share = 1 / int(line["process"].split()[-1])
        assert line["read_share"] == pytest.approx(share, rel=1e-3), line
    # Export: a float32 copy from the device, two in the file's dtype (half of that), and what compilation took.
    assert lines[3]["over_before_mb"] < 5 * lines[3]["largest_tensor_mb"], lines[3]
