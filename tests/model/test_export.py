"""Arrays to checkpoint files: what transformers reads, in shards, proved before it gets its name."""

from __future__ import annotations

import dataclasses
import filecmp
import itertools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.model.hf import exporter
from dno_jax.model.hf.card import code
from dno_jax.model.hf.writer import ShardFile
from dno_jax.model.params import abstract_params
from tests.model.checkpoints import edit_tensors, same, torch_logits
from tests.model.conftest import hf_config, random_params, write_json

ROOT = Path(__file__).parents[2]


def shape_tree(tree):
    return jax.tree.map(lambda a: (a.shape, np.dtype(a.dtype)), tree)


def test_round_trip_is_bit_equal_and_deterministic(tmp_path, config, params, checkpoint):
    loaded_config, loaded = hf.load(checkpoint)
    assert loaded_config == config
    same(loaded, params)
    assert shape_tree(loaded) == shape_tree(abstract_params(config))
    hf.save(tmp_path / "again", config, jax.tree.map(jnp.asarray, loaded), source=checkpoint)
    names = sorted(p.name for p in checkpoint.iterdir())
    expected = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"]
    assert names == expected
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == names
    # The card names another base.
    assert filecmp.cmpfiles(checkpoint, tmp_path / "again", names[1:], shallow=False)[0] == names[1:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "checkpoint", "source"]  # no temporary left
    assert hf.read_end_token_ids(checkpoint) == (2, 5)
    (checkpoint / "generation_config.json").unlink()
    assert hf.read_end_token_ids(checkpoint) == (2,)


def test_bfloat16_file_names_its_dtype(tmp_path, config, params, checkpoint):
    hf.save(tmp_path / "half", config, params, source=checkpoint, dtype=ml_dtypes.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    _, loaded = hf.load(tmp_path / "half")
    same(loaded, jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32), params))


def test_a_runs_longest_text_is_no_contradiction_of_the_source(tmp_path, config, params, checkpoint):
    tree = json.loads((checkpoint / "config.json").read_text())
    tree["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": config.rope_theta}
    write_json(checkpoint / "config.json", tree)
    stretched = hf.read_config(checkpoint, rope_length=100)
    assert stretched.rope_length == 100
    hf.save(tmp_path / "out", stretched, params, source=checkpoint)
    same(hf.load(tmp_path / "out")[1], params)


def test_save_refuses_what_is_wrong(tmp_path, config, params, checkpoint):
    with pytest.raises(DnoError, match="exists already"):
        hf.save(checkpoint, config, params, source=checkpoint)
    before = (checkpoint / "model.safetensors").read_bytes()
    moved = {**params, "final_norm": params["final_norm"] + 1}
    hf.save(checkpoint, config, moved, source=checkpoint, overwrite=True)
    assert (checkpoint / "model.safetensors").read_bytes() != before
    with pytest.raises(DnoError, match="neither empty nor an exported checkpoint"):
        hf.save(tmp_path, config, moved, source=checkpoint, overwrite=True)
    with pytest.raises(DnoError, match=r"config.json/x: the checkpoint cannot be written \(.*Not a directory"):
        hf.save(checkpoint / "config.json" / "x", config, params, source=checkpoint)
    target = tmp_path / "target"
    cases = [
        (dataclasses.replace(config, rms_norm_eps=1e-6), params, "rms_norm_eps is 1e-05"),
        (config, {k: v for k, v in params.items() if k != "head"}, "parameter head is missing"),
        (config, {**params, "extra": params["head"]}, "parameter extra is unexpected"),
        (config, {**params, "head": params["head"].T}, "parameter head has shape"),
        (config, {**params, "head": params["head"] * np.float32("nan")}, "Nothing was put in place"),
    ]
    for c, p, words in cases:
        with pytest.raises(DnoError, match=words):
            hf.save(target, c, p, source=checkpoint)
    with pytest.raises(DnoError, match="float16"):
        hf.save(target, config, params, source=checkpoint, dtype=np.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "source"]


def tensors_of(path):
    """Every tensor of a checkpoint by the library's own reader, and the file it is in."""
    files = sorted(path.glob("*.safetensors"))
    return {n: (a, f.name) for f in files for n, a in load_file(f).items()}


def bit_equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("head", ["untied", "tied", "tied and written"])
def test_an_unmodified_model_comes_out_as_it_went_in(tmp_path, config, head):
    """Names, shapes, dtypes and bytes of a source of several dtypes, and its file if it is one."""
    config = dataclasses.replace(config, tie_word_embeddings=head != "untied")
    source = tmp_path / "source"
    source.mkdir()
    write_json(source / "config.json", hf_config(config, dtype="bfloat16"))
    hf.save(tmp_path / "first", config, random_params(config), source=source)

    def mix(tensors):
        for name in tensors:
            if "norm" in name:
                tensors[name] = tensors[name].astype(np.float32)
            if "down_proj.bias" in name:
                tensors[name] = tensors[name].astype(np.float16)
        if head == "tied and written":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(tmp_path / "first", mix)
    _, params = hf.load(tmp_path / "first")
    hf.save(tmp_path / "second", config, params, source=tmp_path / "first")
    first, second = tensors_of(tmp_path / "first"), tensors_of(tmp_path / "second")
    assert {a.dtype.name for a, _ in first.values()} == {"float32", "bfloat16", "float16"}
    assert first.keys() == second.keys()
    assert all(bit_equal(first[name][0], second[name][0]) for name in first)
    assert filecmp.cmp(tmp_path / "first" / "config.json", tmp_path / "second" / "config.json", shallow=False)
    # The library wrote the first file, byte for byte.
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


def test_shards_have_an_index_and_keep_their_size(tmp_path, config, params, checkpoint):
    one = {name: a for name, (a, _) in tensors_of(checkpoint).items()}
    limit = 50_000
    hf.save(tmp_path / "out", config, params, source=checkpoint, max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    many = tensors_of(tmp_path / "out")
    assert index["weight_map"] == {name: file for name, (_, file) in many.items()}
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in one.values())
    assert many.keys() == one.keys()
    assert all(bit_equal(many[name][0], one[name]) for name in one)
    shards = sorted({file for _, file in many.values()})
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    sizes = [sum(a.nbytes for a, f in many.values() if f == shard) for shard in shards]
    assert len(shards) > 3
    assert max(sizes) <= limit
    assert min(a + b for a, b in itertools.pairwise(sizes)) > limit  # none could have been joined
    same(hf.load(tmp_path / "out")[1], params)
    token = np.random.default_rng(1).integers(config.vocab_size, size=(1, 20))
    np.testing.assert_array_equal(torch_logits(tmp_path / "out", token), torch_logits(checkpoint, token))
    hf.save(tmp_path / "each", config, params, source=checkpoint, max_shard_bytes=1)  # every tensor by itself
    assert len(list((tmp_path / "each").glob("*.safetensors"))) == len(one)
    with pytest.raises(DnoError, match="max_shard_bytes is 0"):
        hf.save(tmp_path / "none", config, params, source=checkpoint, max_shard_bytes=0)


def test_sharded_arrays_are_taken_layer_by_layer_by_one_program(tmp_path, config, params, checkpoint):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        axis = next((i for i in range(leaf.ndim) if leaf.shape[i] % 2 == 0), None)
        spec = [None if i != axis else "x" for i in range(leaf.ndim)]
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))

    exporter._take.clear_cache()
    placed = jax.tree.map(place, params)
    hf.save(tmp_path / "out", config, placed, source=checkpoint)
    assert exporter._take._cache_size() == len({(leaf.shape, leaf.sharding) for leaf in jax.tree.leaves(placed)})
    assert filecmp.cmp(tmp_path / "out" / "model.safetensors", checkpoint / "model.safetensors", shallow=False)


def test_a_writer_that_errs_puts_nothing_in_place(tmp_path, config, params, checkpoint, monkeypatch):
    """The check after writing is what stands between a wrong table and a published checkpoint."""
    write = exporter._write_tensors

    def swap(file, *args, **kwargs):
        write(file, *args, **kwargs)
        file = file / "model.safetensors"
        tensors = load_file(file)
        names = ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight")
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
        save_file(tensors, file)

    monkeypatch.setattr(exporter, "_write_tensors", swap)
    with pytest.raises(DnoError, match="layers/k"):
        hf.save(tmp_path / "target", config, params, source=checkpoint)
    assert not (tmp_path / "target").exists()


def test_a_full_disk_leaves_nothing(tmp_path, config, params, checkpoint, monkeypatch):
    def append(self, tensor, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardFile, "append", append)
    with pytest.raises(OSError, match="No space left"):
        hf.save(tmp_path / "target", config, params, source=checkpoint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "source"]


def test_what_a_killed_export_left_is_cleared_away(tmp_path, config, params, checkpoint):
    """Killed while writing, and killed between the two renames of an overwriting export."""
    partial = tmp_path / ".target.partial"
    partial.mkdir()
    (partial / "model-00001-of-00009.safetensors").write_text("half")
    hf.save(tmp_path / "target", config, params, source=checkpoint)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["checkpoint", "source", "target"]
    before = (tmp_path / "target" / "model.safetensors").read_bytes()
    (tmp_path / "target").rename(tmp_path / ".target.old")
    with pytest.raises(DnoError, match="exists already"):
        hf.save(tmp_path / "target", config, params, source=checkpoint)
    assert (tmp_path / "target" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == names


FACTS = hf.ExportFacts(
    method="Direct Nash Optimization",
    loss="dno",
    scheme="last",
    policy=2,
    iterations=2,
    annotator="gpt-4.1-mini, rubric listwise_6point",
    num_pairs=12345,
    win_rates=(hf.HeldOutRate("policy 0", rate=0.625, low=0.5, high=0.75, comparisons=40, prompts=20),),
)


def front_matter(text):
    """As the Hub finds it."""
    found = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    return yaml.safe_load(found[1]), found[2]


def card_of(base, **changes):
    from dno_jax.model.hf.card import model_card

    return front_matter(model_card(base, facts=dataclasses.replace(FACTS, **changes)))


def test_the_card_states_the_runs_own_facts(tmp_path):
    base = tmp_path / "models--acme--tiny" / "snapshots" / "0"
    base.mkdir(parents=True)
    head, body = card_of(base)
    assert head["base_model"] == "acme/tiny"
    assert "license" not in head
    assert "| licence | see the base model |" in body
    for words in ("| training pairs | 12,345 |", "| iterations | 2 |", "`gpt-4.1-mini, rubric listwise_6point`"):
        assert words in body
    assert "| `policy 0` | 62.5 % | 50.0 to 75.0 % | 40 | 20 |" in body
    assert "arXiv:2404.03715" in body
    assert str(tmp_path) not in body  # where things lay on this machine is nobody's business


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("README.md", "---\nlicense: mit\n---\n# Hello", {"license": "mit"}),
        (
            "README.md",
            "---\r\nlicense: other\r\nlicense_name: gemma\r\nlicense_link: https://x.y\r\n---\r\n",
            {"license": "other", "license_name": "gemma", "license_link": "https://x.y"},
        ),
        ("README.md", "---\nlicense: [not, a, name]\n---\n", {}),
        ("README.md", "---\n{ broken\n---\n", {}),
        ("README.md", "---\nlicense: &a [*a]\n---\n", {}),
        ("README.md", "---\n" + "[" * 5000 + "\n---\n", {}),
        ("README.md", "no front matter\n---\nlicense: mit\n---\n", {}),
        ("LICENSE", "\n   Apache License\n   Version 2.0, January 2004\n", {"license": "apache-2.0"}),
        ("LICENSE", "My own terms", {"license": "other", "license_link": "LICENSE"}),
    ],
)
def test_the_licence_is_what_the_base_says(tmp_path, name, text, expected):
    (tmp_path / name).write_bytes(text.encode())
    head, body = card_of(tmp_path)
    assert {key: value for key, value in head.items() if key.startswith("license")} == expected
    assert ("see the base model" in body) == (not expected)


HOSTILE = [
    "x\n---\nlicense: mit\n---\n# Owned",
    "a | b | c",
    "`break` ``out`` <script>alert(1)</script>",
    "[click](javascript:alert(1)) ![i](http://x)",
    "\u202egnp.exe\u0000\u2028next",
    "{{ config }} {% raw %}",
    "",
    "`",
    "x" * 5000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_names_are_data_in_the_card(tmp_path, text):
    """A CommonMark parser sees the same document whatever a name holds: the name is one code span's text."""
    reference, _ = card_of(tmp_path)
    head, body = card_of(
        tmp_path, annotator=text or "x", win_rates=(dataclasses.replace(FACTS.win_rates[0], opponent=text),)
    )
    assert head == reference
    lines = [line for line in body.splitlines() if code(text) in line]
    assert 1 <= len(lines) <= 2
    _, plain = card_of(tmp_path)
    assert len(body.splitlines()) == len(plain.splitlines())
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")

    def shape(text):
        return [(t.type, [c.type for c in t.children or []]) for t in markdown.parse(text)]

    assert shape(body) == shape(plain)


def test_a_hostile_base_stays_data(tmp_path):
    base = tmp_path / "x: [y]\n# z `|"
    base.mkdir()
    (base / "README.md").write_text('---\nlicense: "mit\\n---\\n# Owned | `"\n---\n')
    head, body = card_of(base)
    assert head["license"] == "mit --- # Owned | `"
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        "# Model card",
        "## Win rates on held-out prompts",
        "## Citation",
    ]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_import_and_export(tmp_path, config, params, checkpoint):
    """Each reads about half, both bring the tensors together, one writes; an error of one ends both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.model.two_processes", address, str(checkpoint), str(tmp_path / "out")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [*command, str(i)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    found = [json.loads(out.splitlines()[-1]) for out, _ in said]
    size = sum(a.nbytes for a in load_file(checkpoint / "model.safetensors").values())
    for line in found:
        # Norms, and biases of the hidden size, are whole on both: 3 % of so small a model.
        assert 0.5 <= line["read"] / size < 0.55
        assert line["read"] == line["total"]
        assert line["shards_equal"]
        assert line["exported"]
    assert "exists already" in found[0]["refused"]
    assert "process 0 gave up" in found[1]["refused"]
    assert filecmp.cmp(tmp_path / "out" / "model.safetensors", checkpoint / "model.safetensors", shallow=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "out", "source"]
