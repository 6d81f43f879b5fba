"""The schemes that rate against samples of two policies, on pools written by hand: no device takes part."""

import itertools
from collections import Counter
from typing import get_args

import numpy as np
import pytest
from etils import epath

from dno_jax.config import PairingSection, RunConfig, parse_config
from dno_jax.data.pools import pools_of
from dno_jax.errors import DnoError
from dno_jax.preferences import TRANSFORMS
from dno_jax.records import Judgement, Message, Prompt, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime.scheme import update_of
from dno_jax.stages import sample
from dno_jax.stages.pair import new_pairs


def config_of(scheme, **sections):
    tree = {
        "run_dir": "run",
        "iterations": 4,
        "model": {"path": "m"},
        "prompts": {"path": "p.jsonl", "split": "shared"},
        "sampling": {"num_samples": 3},
        "pairing": {"rule": "all", "reward": "win_rate", "opponents": "policy", "replay": 0.0},
        "loss": {"target": "soft"},
        "outer": {"scheme": scheme},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return parse_config(RunConfig, tree, place="test")


def rollout(text, t, number, *, source="policy", sample=None):
    return Rollout(
        rollout_id=f"{t:03d}/q/{'gold' if source == 'gold' else number}",
        prompt_id="q",
        sample=-1 if source == "gold" else number if sample is None else sample,
        source=source,
        policy=None if source == "gold" else t,
        text=text,
        token_ids=tuple(range(3, 4 + len(text))),
        prompt_token_ids=(1,),
        logprob=None if source == "gold" else -1.0 - number - t,
        finish="stop",
    )


def rows_of(now, before=(), gold=None):
    rows = [rollout(text, 1, i) for i, text in enumerate(now)]
    rows += [rollout(text, 0, i, source="previous", sample=3 + i) for i, text in enumerate(before)]
    return rows + ([rollout(gold, 1, 0, source="gold")] if gold else [])


def judged(rows, wins):
    """The verdict on what a judge is shown of these rows."""
    prompt = Prompt(prompt_id="q", messages=(Message(role="user", content="?"),))
    (pool,) = pools_of(rows, {"q": prompt}, dropped=Counter())
    texts = [candidate.text for candidate in pool.candidates]
    matrix = tuple(tuple(wins(a, b) for b in texts) for a in texts)
    return Judgement(prompt_id="q", candidate_ids=pool.candidate_ids, judge="hand", state="ok", wins=matrix)


def random_preference(seed=0):
    """P(a > b) of any two texts, drawn once."""
    known, rng = {}, np.random.default_rng(seed)

    def wins(a, b):
        if a == b:
            return 0.5
        first, second = min(a, b), max(a, b)
        drawn = known.setdefault((first, second), float(rng.choice([0.0, 0.25, 0.5, 0.75, 1.0])))
        return drawn if a == first else 1.0 - drawn

    return wins


def sigmoid(value):
    return 1 / (1 + np.exp(-value))


def mean(values):
    return float(np.mean(list(values)))


@pytest.mark.parametrize("seed", range(5))
def test_an_optimistic_target_is_of_both_policies(seed):
    wins = random_preference(seed)
    now, before, gold = ["a", "b", "b"], ["b", "c", "d"], "g"  # "b" is a sample of both
    rows = rows_of(now, before, gold)
    made = new_pairs([judged(rows, wins)], rows, config_of("optimistic"), iteration=1)
    reward = {}
    for text in ("a", "b", "g"):
        others = list(now)
        if text in others:
            others.remove(text)  # itself left out, of its own policy's samples
        now_rate, before_rate = mean(wins(text, o) for o in others), mean(wins(text, o) for o in before)
        reward[text] = 2 * now_rate - before_rate
    found = {frozenset((p.chosen_id, p.rejected_id)): p for p in made.pairs}
    ids = {"a": "001/q/0", "b": "001/q/1", "g": "001/q/gold"}
    assert found.keys() == {frozenset((ids[a], ids[b])) for a, b in itertools.combinations(ids, 2)}
    name = {value: key for key, value in ids.items()}
    for pair in made.pairs:
        better, worse = reward[name[pair.chosen_id]], reward[name[pair.rejected_id]]
        assert better >= worse - 1e-9
        assert pair.target == pytest.approx(sigmoid(better - worse))
        assert (pair.chosen_reward, pair.rejected_reward) == pytest.approx((better, worse), abs=1e-6)
        assert pair.iteration == 1
    assert {pair.weight for pair in made.pairs if ids["b"] in (pair.chosen_id, pair.rejected_id)} == {2.0}


def test_the_first_iteration_is_a_plain_step_and_a_prompt_without_the_policy_before_is_dropped():
    wins, rows = random_preference(), rows_of(["a", "b", "c"])
    plain = new_pairs([judged(rows, wins)], rows, config_of("last"), iteration=0).pairs
    assert plain
    assert new_pairs([judged(rows, wins)], rows, config_of("optimistic"), iteration=0).pairs == plain
    made = new_pairs([judged(rows, wins)], rows, config_of("optimistic"), iteration=1)
    assert not made.pairs
    assert made.dropped == {"no samples of the policy before": 1}


@pytest.mark.parametrize("seed", range(5))
def test_the_second_half_of_an_extragradient_step_has_the_firsts_samples_and_new_opponents(seed):
    wins = random_preference(seed)
    half, start = ["b", "x", "y"], ["a", "b", "c"]
    rows = rows_of(half, start)
    made = new_pairs([judged(rows, wins)], rows, config_of("extragradient"), iteration=1)
    reward = {f"000/q/{i}": mean(wins(text, o) for o in half) for i, text in enumerate(start)}
    pairs = {frozenset((p.chosen_id, p.rejected_id)) for p in made.pairs}
    assert pairs == {frozenset(two) for two in itertools.combinations(reward, 2)}
    for pair in made.pairs:
        assert pair.iteration == 0  # whose samples they are, and whose log-probabilities were recorded
        assert pair.chosen_reward == pytest.approx(reward[pair.chosen_id], abs=1e-6)
        assert pair.target == pytest.approx(sigmoid(reward[pair.chosen_id] - reward[pair.rejected_id]))
    plain = new_pairs([judged(rows[:3], wins)], rows[:3], config_of("last"), iteration=2).pairs
    assert new_pairs([judged(rows[:3], wins)], rows[:3], config_of("extragradient"), iteration=2).pairs == plain


def test_each_training_starts_where_its_scheme_says():
    run_dir = RunDir("r")
    for scheme, starts in (("last", "0123"), ("optimistic", "0123"), ("extragradient", "0022")):
        config = config_of(scheme)
        found = [update_of(config, run_dir, t) for t in range(4)]
        assert "".join(str(int(update.previous.name)) for update in found) == starts
        assert [int(update.result.name) for update in found] == [1, 2, 3, 4]
    mixed = config_of("extragradient", reference={"kind": "mixture", "tau": 0.05})
    initials = [update_of(mixed, run_dir, t).initial for t in range(4)]
    assert [initial and initial.name for initial in initials] == [None, None, "000", "000"]


def test_the_samples_of_the_policy_before_stand_beside_its_own(tmp_path):
    config = config_of("optimistic", sampling={"num_samples": 3, "shard_prompts": 1})
    run_dir = RunDir(tmp_path)
    assert sample._Previous(run_dir, config, 0).read("0000000", "q") == []
    with pytest.raises(DnoError, match="stage 'sample' of iteration 0 is not finished; run `dno sample`"):
        sample._Previous(run_dir, config, 1).inputs()
    stage = run_dir.stage("sample", 0)
    older = rollout("z", 9, 0, source="previous", sample=3)
    stage.write_shard("0000000", [rollout(t, 0, i) for i, t in enumerate("abc")] + [older])
    stage.finish(config, inputs={}, rows=4, seconds=0.0)
    previous = sample._Previous(run_dir, config, 1)
    assert list(previous.inputs()) == ["iterations/000/rollouts/MANIFEST.json"]
    rows = previous.read("0000000", "q")
    assert [(row.rollout_id, row.sample, row.source, row.text) for row in rows] == [
        (f"000/q/{i}", 3 + i, "previous", text) for i, text in enumerate("abc")
    ]
    assert previous.read("0000000", "another") == []
    lengths = sample.ResponseLengths()
    for row in rows:
        lengths.add(row)
    assert lengths.figures() == {}  # they were counted in their own iteration
    assert epath.Path(run_dir.stage("sample", 0).path).exists()
    assert sample._Previous(run_dir, config_of("last"), 1).inputs() == {}


REFUSED = {
    "disjoint prompts": ({"prompts": {"split": "disjoint"}}, r"prompts\.split=disjoint .* set prompts\.split=shared"),
    "nothing sampled": ({"sampling": {"source": "data"}}, r"sampling\.source=data; set sampling\.source=policy"),
    "points": (
        {"pairing": {"reward": "score"}, "annotation": {"kind": "openai"}},
        r"set pairing\.reward=win_rate and pairing\.opponents=policy",
    ),
    "the pool": ({"pairing": {"opponents": "pool"}}, r"they are win_rate and pool"),
    "verdicts": ({"pairing": {"rule": "verdict"}}, r"pairing\.rule=verdict, which has no opponents.*pairing\.rule=all"),
    "nobody": ({"annotation": {"kind": "gold"}}, r"needs a judge, and annotation\.kind=gold asks nobody"),
    "single rates": (
        {"loss": {"name": "sppo", "target": "hard"}, "pairing": {"rule": "matching"}},
        r"loss\.name=sppo reads one win rate of each sample; set loss\.name=dno",
    ),
}


@pytest.mark.parametrize("scheme", ["optimistic", "extragradient"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_two_policies_to_meet_is_refused_at_the_start(scheme, what):
    changes, message = REFUSED[what]
    with pytest.raises(DnoError, match=rf"(?s)outer\.scheme={scheme} .*{message}"):
        config_of(scheme, **changes)


def test_an_extragradient_step_is_whole():
    with pytest.raises(DnoError, match=r"set pairing\.replay=0"):
        config_of("extragradient", pairing={"replay": 0.3})
    tree = config_of("extragradient").model_dump() | {"iterations": 3}
    with pytest.raises(DnoError, match="two iterations a step, and iterations=3; give an even number"):
        parse_config(RunConfig, tree, place="test")


# --- payoffs


@pytest.mark.parametrize(
    ("transform", "psi"),
    [
        ("identity", lambda p: p),
        ("sign", lambda p: 0.5 + 0.5 * np.sign(p - 0.5)),
        ("logit", lambda p: 0.5 + np.log(min(max(p, 0.01), 0.99) / (1 - min(max(p, 0.01), 0.99)))),
    ],
)
def test_win_rates_are_means_of_the_transformed_preferences(transform, psi):
    wins, now, before = random_preference(3), ["a", "b", "c"], ["a", "d", "e"]
    for scheme, t, rows in (("last", 0, rows_of(now)), ("optimistic", 1, rows_of(now, before))):
        config = config_of(scheme, pairing={"transform": transform})
        for pair in new_pairs([judged(rows, wins)], rows, config, iteration=t).pairs:
            for name, reward in ((pair.chosen_id, pair.chosen_reward), (pair.rejected_id, pair.rejected_reward)):
                text = now[int(name.rsplit("/", 1)[-1])]
                expected = mean(psi(wins(text, o)) for o in now if o != text)
                if t:
                    expected = 2 * expected - mean(psi(wins(text, o)) for o in before)
                assert reward == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotation": {"kind": "openai"}},
            r"annotation\.kind=openai gives points alone: set pairing\.tra",
        ),
        ({"annotation": {"kind": "self"}}, r"or a judge of pairs, such as annotation\.openai\.form=pairwise"),
        ({"pairing": {"reward": "score"}}, r"transform is sign, and no win rate is taken with reward=score"),
        ({"pairing": {"rule": "verdict"}}, r"set reward=win_rate and a rule that compares rewards"),
    ],
)
def test_a_transform_of_what_is_no_preference_is_refused(changes, message):
    changes["pairing"] = {"transform": "sign"} | changes.get("pairing", {})
    with pytest.raises(DnoError, match=message):
        config_of("last", **changes)


def test_margins_are_in_the_unit_of_the_transform():
    assert get_args(PairingSection.model_fields["transform"].annotation) == TRANSFORMS
    rule = {"rule": "best_worst", "margin": 2.0}
    assert config_of("last", pairing={"transform": "logit"} | rule).pairing.margin == 2.0
    with pytest.raises(DnoError, match=r"margin is 2\.0, no win rate"):
        config_of("last", pairing={"transform": "sign"} | rule)


# --- samples of the reference


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"source": "data"}, "pairing": {"opponents": "pool"}}, r"set sampling\.source=policy"),
        ({"sampling": {"engine": "openai"}}, r"set sampling\.engine=jax, or sampling\.server\.logprobs"),
        ({"reference": {"kind": "initial"}}, r"set pairing\.replay above 0, or reference\.kind=previous"),
    ],
)
def test_a_forward_kl_term_without_samples_of_the_reference_is_refused(changes, message):
    changes = {"loss": {"forward_kl_weight": 0.1}} | changes
    with pytest.raises(DnoError, match=rf"loss\.forward_kl_weight=0\.1 is of the reference's own samples: .*{message}"):
        config_of("last", **changes)
    config_of("last", loss=changes["loss"])
    config_of("last", loss=changes["loss"], reference={"kind": "initial"}, pairing={"replay": 0.3})
