"""Plans by compilation: the programs are those that the stages run, and what they send is read in their text."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dno_jax.config import MeshSection, RunConfig, parse_config
from dno_jax.parallel.mesh import make_mesh
from dno_jax.plan import compiled
from dno_jax.plan.compiled import fingerprint_of
from dno_jax.plan.hlo import calls, collectives, copies
from dno_jax.plan.run import Asked, plan_run
from dno_jax.runtime import scoring
from dno_jax.sampling import engine
from dno_jax.stages import train as train_stage
from tests.configured import deep_merge
from tests.running import run_iteration
from tests.small import WORDS, small_tree

PROMPT, RESPONSE = 8, 12


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A run whose texts are all as long as they may be: what its stages compile is what a plan assumes."""
    folder = tmp_path_factory.mktemp("offline")
    tree = small_tree(folder)
    rows, held_out = [], []
    for index in range(36):
        words = [WORDS[(index * 7 + at) % len(WORDS)] for at in range(PROMPT - 1)]  # <s> comes before them
        messages = [{"role": "user", "content": " ".join(words)}]
        if index < 32:
            given = [" ".join(WORDS[(index + at * step) % len(WORDS)] for at in range(RESPONSE - 1)) for step in (1, 5)]
            candidates = [{"text": text, "score": float(score)} for score, text in enumerate(given)]
            rows.append({"prompt_id": f"p{index}", "messages": messages, "candidates": candidates})
        else:
            held_out.append({"prompt_id": f"h{index}", "messages": messages})
    for name, found in (("prompts", rows), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n")
    return deep_merge(
        tree,
        {
            "iterations": 1,
            "mesh": {"data": 1, "fsdp": 4, "tensor": 2},
            "prompts": {"max_length": PROMPT},
            "sampling": {"source": "data", "max_new_tokens": RESPONSE},
            "annotation": {"kind": "given"},
            "evaluation": {"annotation": {"kind": "oracle"}},
            "pairing": {"reward": "score", "rule": "best_worst", "margin": 0.5, "positive_floor": 0.0},
        },
    )


LORA = {"adapter": {"rank": 2}, "training": {"packing": "off"}, "sampling": {"mesh": {"data": -1}}}


@pytest.mark.parametrize("changes", [{}, pytest.param(LORA, marks=pytest.mark.soak)])
def test_a_plan_compiles_what_the_stages_then_run(offline, changes, tmp_path, monkeypatch):
    config = parse_config(RunConfig, deep_merge(offline, {"run_dir": str(tmp_path / "run"), **changes}), place="test")
    planned = plan_run(config, asked=Asked(topology="cpu:8", memory=2**34)).programs
    assert set(planned) == {"train", "score", "prefill", "decode"}
    ran: dict[str, dict] = {}
    for module, name, short in (
        (train_stage, "train_step", "train"),
        (scoring, "score_step", "score"),
        (engine, "fill", "prefill"),
        (engine, "decode", "decode"),
    ):
        function = getattr(module, name)

        def recorded(*arguments, own=function, short=short, **options):
            lowered = own.lower(*arguments, **options)
            ran.setdefault(short, {})[fingerprint_of(lowered)] = lowered
            return own(*arguments, **options)

        monkeypatch.setattr(module, name, recorded)
    run_iteration_from_the_start(config)
    for name, plan in planned.items():
        assert plan.figures.fingerprint in ran[name], name
        memory = ran[name][plan.figures.fingerprint].compile().memory_analysis()
        parts = dict(plan.figures.parts)
        assert abs(parts.pop("padded, or not read")) < 512  # numbers of pairs that this loss does not read are left out
        assert sum(plan.figures.parts.values()) == memory.argument_size_in_bytes
        for part in ("parameters", "moments"):
            if part in parts and part in plan.closed:
                assert parts[part] == plan.closed[part]


def run_iteration_from_the_start(config):
    from tests.running import prepare

    prepare(config)
    run_iteration(config, 0)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshSection(data=1, fsdp=8))


def compiled_text(mesh, function):
    array = jax.ShapeDtypeStruct((8, 1024), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    return jax.jit(function).lower(array).compile().as_text()


def test_what_a_loop_sends_counts_as_often_as_it_runs(mesh):
    whole = NamedSharding(mesh, PartitionSpec())

    def once(x):
        return jax.lax.with_sharding_constraint(x, whole) * 2

    def often(x):
        def body(total, _):
            return total + jnp.sum(jax.lax.with_sharding_constraint(jnp.sin(x + total), whole)), None

        return jax.lax.scan(body, jnp.float32(0), None, length=7)[0]

    (found,) = collectives(compiled_text(mesh, once))
    assert (found.kind, found.runs, found.bytes, found.shape) == ("all-gather", 1, 4 * 8 * 1024, "f32[8,1024]")
    looped = {one.kind: one for one in collectives(compiled_text(mesh, often))}
    assert sum(one.runs for one in looped.values() if one.largest > 8) in (0, 7, 14)
    assert sum(one.looped for one in looped.values()) >= 7


TEXT = """
HloModule jit_f

%body (p: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %g = bf16[4,128]{1,0} all-gather(bf16[1,128] %x), dimensions={0}
  %c = bf16[4,128]{0,1} copy(bf16[4,128]{1,0} %g)
  %m = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%h)
  %n = (bf16[9,128]{1,0:T(8,128)(2,1)}, bf16[9,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%m)
  ROOT %t = (s32[], bf16[4,128]) tuple(%i, %c)
}

%counted (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %r = f32[64]{0} all-to-all(f32[64] %p), dimensions={0}
}

%bounded (p: (s32[], f32[64])) -> pred[] {
  %n = s32[]{:T(128)} constant(32)
  ROOT %c = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%found (p: (s32[], f32[64])) -> pred[] {
  %n = s32[]{:T(128)} constant(32)
  %c = pred[] compare(%i, %n), direction=LT
  ROOT %a = pred[] and(%c, %waiting)
}

%small (p: f32[2]) -> f32[2] {
  ROOT %r = f32[2]{0} all-reduce(f32[2] %p), to_apply=%add
}

%large (p: f32[2]) -> f32[2] {
  %r = f32[64]{0} all-reduce(f32[64] %p), to_apply=%add
  ROOT %r2 = f32[2]{0} slice(%r)
}

ENTRY %main (a: bf16[4,128]) -> bf16[4,128] {
  %w = (s32[], bf16[4,128]) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %k = f32[2] conditional(s32[] %i, f32[2] %a, f32[2] %b), branch_computations={%small, %large}
  %w2 = (s32[], f32[64]) while(%init), condition=%bounded, body=%counted
  %w3 = (s32[], f32[64]) while(%init), condition=%found, body=%counted
  %s = (f32[8]{0}, f32[64]{0}) all-gather-start(f32[8] %q), dimensions={0}
  %c = bf16[4,128]{0,1} copy(bf16[4,128]{1,0} %g)
}
"""


def test_the_text_of_a_program_is_read_with_its_loops_and_dearest_branches():
    gathered, reduced, exchanged = collectives(TEXT)
    assert (exchanged.kind, exchanged.runs, exchanged.looped) == ("all-to-all", 32 + 1, 33)
    assert (gathered.kind, gathered.runs, gathered.looped) == ("all-gather", 6, 5)
    assert gathered.bytes == 5 * 4 * 128 * 2 + 64 * 4
    assert gathered.shape == "bf16[4,128]"
    assert (reduced.kind, reduced.runs, reduced.bytes) == ("all-reduce", 1, 64 * 4)
    assert copies(TEXT, at_least=1024) == ["bf16[4,128]", "bf16[9,128]"]  # what goes into vector memory is read
    assert copies(TEXT, at_least=2305) == []


SPREAD = """
%first (p: bf16[1,128]) -> bf16[4,128] {
  %g = bf16[4,128]{1,0} all-gather(%p), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
}

%second (p: bf16[1,128]) -> bf16[4,128] {
  %g2 = bf16[4,128]{1,0:S(1)} all-gather(%p), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
}

%body (p: (s32[], bf16[1,128])) -> (s32[], bf16[1,128]) {
  %a = bf16[4,128]{1,0} fusion(%x), kind=kOutput, calls=%first
  %b = bf16[4,128]{1,0} fusion(%a), kind=kOutput, calls=%second
  %o = bf16[4,128]{1,0} all-gather(%y), channel_id=8, dimensions={0}, frontend_attributes={chain_id="1"}
}

ENTRY %main (a: bf16[1,128]) -> bf16[1,128] {
  %w = (s32[], bf16[1,128]) while(%i), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_an_operation_that_goes_on_through_several_fusions_counts_once():
    """As on v5e: eleven gathers a layer stand in 47 places of the text."""
    (found,) = collectives(SPREAD)
    assert (found.runs, found.bytes) == (2 * 3, 2 * 3 * 4 * 128 * 2)
    assert [(one.runs, one.bytes) for one in calls(SPREAD)] == [(3, 1024)] * 2


def test_a_second_plan_compiles_nothing(offline, tmp_path, monkeypatch):
    config = parse_config(RunConfig, offline, place="test")
    asked = Asked(topology="cpu:8", memory=2**34, cache=tmp_path)
    first = plan_run(config, asked=asked).programs
    monkeypatch.setattr(compiled, "_measured", None)
    again = plan_run(config, asked=asked).programs
    assert {name: one.figures for name, one in again.items()} == {name: one.figures for name, one in first.items()}
