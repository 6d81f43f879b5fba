"""Preference datasets on disk and in memory."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dno_jax.data.pair_table import PairRows, PairTable
from dno_jax.data.pairs import NEW, REPLAYED, SCHEMA, PairFile, Spool, pair_table, write_pairs
from dno_jax.errors import DnoError
from dno_jax.records import Message, Pair, Prompt, ReferenceScore, Rollout
from dno_jax.run_dir import RunDir
from tests.pairs import read_pairs, read_rows


def rollout(name, prompt="p", *, ids=(5, 6, 2), policy: int | None = 0, before=(1, 4)):
    return Rollout(
        rollout_id=name, prompt_id=prompt, sample=0, source="policy" if policy is not None else "gold", policy=policy,
        text=f"text {name}", token_ids=ids, prompt_token_ids=before, logprob=-1.5 if policy is not None else None,
        finish="stop",
    )  # fmt: skip


def pair(chosen, rejected, *, prompt="p", name=None, iteration=0):
    return Pair(
        pair_id=name or f"{chosen}>{rejected}", prompt_id=prompt, chosen_id=chosen, rejected_id=rejected,
        chosen_reward=0.75, rejected_reward=0.25, target=0.9, weight=2.0, kind="student>student", iteration=iteration,
    )  # fmt: skip


def prompt(name="p", prefix=""):
    messages = (Message(role="system", content="Be brief."), Message(role="user", content=f"{name}?"))
    return Prompt(prompt_id=name, messages=messages, assistant_prefix=prefix)


def random_pairs(count, *, seed=0, ids=(1, 40)):
    """Pairs of random ids, every one of a prompt of its own, with their table."""
    rng = np.random.default_rng(seed)
    pairs, rollouts, prompts = [], {}, {}
    for index in rng.permutation(count).tolist():
        name, before = f"q{index:05d}", rng.integers(0, 90, rng.integers(*ids))
        for sample in "ab":
            row = rollout(f"{name}/{sample}", name, ids=rng.integers(0, 90, rng.integers(*ids)), before=before)
            rollouts[row.rollout_id] = row
        prompts[name] = prompt(name)
        pairs.append(pair(f"{name}/a", f"{name}/b", prompt=name))
    return pairs, rollouts, prompts


@pytest.fixture
def stage(tmp_path):
    return RunDir(tmp_path).stage("pair", 0)


def written(stage, new, replayed=()):
    write_pairs(stage.path / f"{NEW}.parquet", new)
    write_pairs(stage.path / f"{REPLAYED}.parquet", replayed)
    return stage


def test_a_row_holds_the_chat_as_messages_as_text_and_as_the_ids_that_were_sampled(stage):
    rollouts = {"a": rollout("a", ids=(5, 6, 2)), "b": rollout("b", ids=(7,), policy=None)}
    made = pair("a", "b")
    written(stage, [pair_table([made], rollouts, {"p": prompt(prefix="Well, ")})])
    (row,) = read_rows(stage)
    assert row["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "p?"}]
    assert row["chosen"] == [{"role": "assistant", "content": "Well, text a"}]
    assert row["rejected"] == [{"role": "assistant", "content": "Well, text b"}]
    assert (row["chosen_text"], row["rejected_text"]) == ("text a", "text b")
    assert (row["prompt_tokens"], row["chosen_tokens"], row["rejected_tokens"]) == ([1, 4], [5, 6, 2], [7])
    assert (row["chosen_logprob"], row["rejected_logprob"]) == (-1.5, None)
    assert (row["chosen_finish"], row["rejected_finish"]) == ("stop", "stop")
    assert read_pairs(stage) == [made]
    assert pq.read_table(stage.path / "new.parquet").schema.equals(SCHEMA)


def test_what_another_iterations_sampler_recorded_is_not_the_pairs_own(stage):
    rollouts = {"a": rollout("a", policy=1), "b": rollout("b", policy=0)}
    row = pair_table([pair("a", "b", iteration=1)], rollouts, {"p": prompt()}).to_pylist()[0]
    assert (row["chosen_logprob"], row["rejected_logprob"]) == (-1.5, None)


def test_no_column_passes_for_tokenised():
    taken = ("input_ids", "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids", "labels", "images", "tools")
    assert not [name for name in SCHEMA.names if name in taken or name.endswith(("input_ids", "attention_mask"))]


def test_responses_to_different_ids_are_no_pair():
    rollouts = {"a": rollout("a"), "b": rollout("b", before=(1, 5))}
    with pytest.raises(DnoError, match="'a' and 'b' have different prompt_token_ids"):
        pair_table([pair("a", "b")], rollouts, {"p": prompt()})


def test_the_spool_sorts_by_prompt_and_keeps_the_order_within_one(tmp_path):
    names = [("q", "1"), ("q", "0"), ("s", "0")], [("p", "1"), ("p", "0")], [("r", "0")]
    with Spool(RunDir(tmp_path).stage("pair", 0).path) as spool:
        for shard in names:
            rollouts = {f"{p}{k}{side}": rollout(f"{p}{k}{side}", p) for p, k in shard for side in "ab"}
            pairs = [pair(f"{p}{k}a", f"{p}{k}b", prompt=p) for p, k in shard]
            spool.add(pair_table(pairs, rollouts, {p: prompt(p) for p, _ in shard}))
        assert len(spool) == 6
        found = [row["chosen_id"] for table in spool.by_prompt() for row in table.to_pylist()]
    assert found == ["p1a", "p0a", "q1a", "q0a", "r0a", "s0a"]
    assert list((tmp_path / "iterations" / "000" / "pairs").iterdir()) == []


def test_rows_are_taken_by_place_and_row_groups_are_small(stage):
    pairs, rollouts, prompts = random_pairs(3000, ids=(1, 4))
    tables = (pair_table(pairs[first : first + 7], rollouts, prompts) for first in range(0, 3000, 7))
    written(stage, tables)
    wanted = [0, 5, 1023, 1024, 2047, 2999]
    with PairFile(stage.path / "new.parquet") as file:
        assert len(file) == 3000
        assert [table["pair_id"].to_pylist() for table in file.read()] == [
            [row.pair_id for row in pairs[first : first + 1024]] for first in (0, 1024, 2048)
        ]
    with PairFile(stage.path / "new.parquet") as file:
        found = [name for table in file.take(np.asarray(wanted)) for name in table["pair_id"].to_pylist()]
        assert found == [pairs[place].pair_id for place in wanted]
        assert list(file.take(np.asarray([], int))) == []


def test_a_table_has_the_pairs_in_order_of_id_with_their_own_ids(stage):
    pairs, rollouts, prompts = random_pairs(50)
    table = pair_table(pairs, rollouts, prompts)
    written(stage, [table.slice(0, 30)], [table.slice(30)])
    loaded = PairTable.load(stage)
    ordered = sorted(pairs, key=lambda row: row.pair_id)
    assert loaded.pair_ids.to_pylist() == [row.pair_id for row in ordered]
    scores = [ReferenceScore(pair_id=row.pair_id, chosen_logprob=-i, rejected_logprob=-2 * i)
              for i, row in enumerate(ordered)]  # fmt: skip
    rows = PairRows(loaded, loaded.logprobs(reversed(scores)))
    assert len(rows) == 50
    for index, (row, made) in enumerate(zip(rows, ordered, strict=True)):
        chosen, rejected = rollouts[made.chosen_id], rollouts[made.rejected_id]
        for found, kept in zip(row.prompt_ids + row.response_ids, (chosen, rejected) * 2, strict=True):
            assert isinstance(found, np.ndarray)
            assert found.dtype == np.int32
            assert found.tolist() in (list(kept.prompt_token_ids), list(kept.token_ids))
        assert row.prompt_ids[0].tolist() == list(chosen.prompt_token_ids)
        assert [ids.tolist() for ids in row.response_ids] == [list(chosen.token_ids), list(rejected.token_ids)]
        assert loaded.lengths[index] == max(map(len, row.response_ids)) + len(row.prompt_ids[0])
        assert (row.previous_logprob, row.initial_logprob) == ((-index, -2 * index), (0.0, 0.0))
        assert (row.reward, row.target, row.weight) == ((0.75, 0.25), 0.9, 2.0)
    assert loaded.sampler_logprob.tolist() == [[-1.5, -1.5]] * 50
    iteration = int(loaded.iteration[0])
    of_policy, of_reference = (PairRows(loaded, **{name: iteration})[0] for name in ("sampled_from", "anchored_from"))
    assert (of_policy.own, of_policy.anchor) == (of_reference.anchor, of_reference.own) == ((1.0, 1.0), (0.0, 0.0))


def test_a_reference_score_is_never_made_up(stage):
    pairs, rollouts, prompts = random_pairs(3)
    loaded = PairTable.load(written(stage, [pair_table(pairs, rollouts, prompts)]))
    score = ReferenceScore(pair_id=pairs[1].pair_id, chosen_logprob=-1.0, rejected_logprob=-2.0)
    other = score.model_copy(update={"pair_id": "another"})
    logprob, there = loaded.placed([other, score])
    assert there.sum() == 1
    assert logprob[there].tolist() == [[-1.0, -2.0]]
    assert np.isnan(logprob[~there]).all()
    with pytest.raises(DnoError, match="has no reference score; remove the reference folder"):
        loaded.logprobs([score])
    with pytest.raises(DnoError, match="'q00000/a>q00000/b' has no reference score"):
        loaded.logprobs([])


def test_files_that_are_not_pairs_are_refused_by_name(stage):
    pairs, rollouts, prompts = random_pairs(3)
    table = pair_table(pairs, rollouts, prompts)
    written(stage, [table], [table.slice(2)])
    with pytest.raises(DnoError, match=f"pair '{pairs[2].pair_id}' is there twice"):
        PairTable.load(stage)
    pq.write_table(pa.table({"pair_id": ["a"]}), stage.path / "replayed.parquet")
    with pytest.raises(DnoError, match=r"replayed\.parquet: not the columns of this version's pairs"):
        PairTable.load(stage)
    (stage.path / "replayed.parquet").write_bytes(b"half of a file")
    with pytest.raises(DnoError, match=r"replayed\.parquet: cannot be read .* pair again"):
        PairTable.load(stage)
    (stage.path / "replayed.parquet").unlink()
    with pytest.raises(DnoError, match=r"replayed\.parquet: cannot be read"):
        PairTable.load(stage)


def test_an_error_on_the_way_leaves_no_file(stage):
    def tables():
        pairs, rollouts, prompts = random_pairs(3)
        yield pair_table(pairs, rollouts, prompts)
        raise DnoError("the rollouts are gone")

    with pytest.raises(DnoError, match="the rollouts are gone"):
        write_pairs(stage.path / "new.parquet", tables())
    assert list(stage.path.iterdir()) == []


def test_pairs_take_little_more_memory_than_their_ids(stage):
    pairs, rollouts, prompts = random_pairs(5000, ids=(50, 150))
    rows = (pair_table(pairs[first : first + 500], rollouts, prompts) for first in range(0, 5000, 500))
    written(stage, rows)
    ids = 4 * sum(
        len(rollouts[row.chosen_id].prompt_token_ids)
        + len(rollouts[row.chosen_id].token_ids)
        + len(rollouts[row.rejected_id].token_ids)
        for row in pairs
    )
    PairTable.load(stage)  # what imports take is no table's
    pool = pa.default_memory_pool()
    tracemalloc.start()
    loaded = PairTable.load(stage)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(tokens.nbytes for tokens in loaded.tokens) == ids
    assert held + loaded.pair_ids.nbytes < 1.2 * ids
    assert loaded.nbytes < 1.2 * ids
    assert peak < 1.3 * ids
    # Arrow holds a row group, and this one of a fifth of all pairs, beside the ids of the pairs.
    assert pool.bytes_allocated() < 0.3 * ids
