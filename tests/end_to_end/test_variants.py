"""Every variant of the recipes, run by the real stages on the small model: what it does is read off its files."""

import hashlib
import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from dno_jax import iteration
from dno_jax.config import RunConfig, parse_config
from dno_jax.model import hf
from dno_jax.model.config import ModelConfig
from dno_jax.records import Judgement, ReferenceScore, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.runtime.scheme import initial_policy, mixture_weight
from dno_jax.stage_dir import stage_names
from dno_jax.stages.checkpoints import pool_member
from dno_jax.training.batches import batch_order
from dno_jax.training.checkpoint import policy_fingerprint
from tests.configured import deep_merge
from tests.pairs import in_order_of_id, read_pairs
from tests.small import WORDS, small_tree

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE = "mistral_7b_ultrafeedback.yaml"
# The judges of these need other kinds of models: tests/stages/judge_on_devices/test_policy.py, test_reward_recipe.py.
FILES = [
    path for folder in ("variants", "ablations") for path in sorted((CONFIGS / folder).glob("*.yaml"))
    if path.stem not in ("self_rewarding", "reward_maximisation")
]  # fmt: skip
NAMES = [path.stem for path in FILES]
# As few iterations as show what the scheme does.
ITERATIONS = {"algorithm_1": 2, "optimistic": 2, "extragradient": 2, "option_2": 2, "comal": 3, "lookahead": 3}
ORACLE = {"kind": "oracle", "oracle": {"target_words": 6}}
LOG_2 = math.log(2)
POINTS = (8.0, 6.5, 6.5, 6.0, 0.5)  # of the candidates that come with the data


def overlay_of(path):
    """What the files between a variant and the recipe of the paper say, merged."""
    tree = yaml.safe_load(path.read_text())
    base = tree.pop("base")
    return tree if Path(base).name == RECIPE else deep_merge(overlay_of(path.parent / base), tree)


def write_candidates(path, count=6):
    """Prompts that bring five responses with points; two of them tie."""
    rng, rows = np.random.default_rng(5), []
    for index in range(count):
        texts = [" ".join(rng.choice(WORDS, size=5, replace=False)) + " ." for _ in POINTS]
        given = [{"text": text, "score": score} for text, score in zip(texts, POINTS, strict=True)]
        prompt = " ".join(rng.choice(WORDS, size=4, replace=False))
        row = {"prompt_id": f"d{index}", "messages": [{"role": "user", "content": prompt}], "candidates": given}
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n")


def small_config(name, folder):
    """The small configuration with a variant's own settings laid over it, but for sizes and endpoints."""
    tree = overlay_of(next(path for path in FILES if path.stem == name))
    for section in ("run_dir", "optimizer"):
        tree.pop(section, None)
    if tree.get("evaluation", {}).pop("annotation", None):
        tree = deep_merge(tree, {"evaluation": {"annotation": ORACLE}})
    if tree.get("sampling", {}).get("source") == "data":
        tree = deep_merge(tree, {"prompts": {"path": str(folder / "candidates.jsonl")}, "pairing": {"reward": "score"}})
    changes = {
        "run_dir": str(folder / name),
        "iterations": ITERATIONS.get(name, 1),
        "evaluation": {"num_samples": 1},
    }
    small = small_tree(folder, prompts=8)
    return parse_config(RunConfig, deep_merge(deep_merge(small, tree), changes), place=name)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Name -> a finished run of that variant, made once; tests read it and must not change it."""
    folder, finished = tmp_path_factory.mktemp("variants"), {}
    write_candidates(folder / "candidates.jsonl")

    def get(name):
        if name not in finished:
            config = small_config(name, folder)
            iteration.run(config)
            finished[name] = config, RunDir(config.run_dir)
        return finished[name]

    return get


def pairs_of(run_dir, t):
    return read_pairs(run_dir.stage("pair", t))


def rollouts_of(run_dir, t):
    return {row.rollout_id: row for row in run_dir.stage("sample", t).read(Rollout)}


def steps_of(run_dir, t, stage="train"):
    return [row for row in run_dir.read_metrics() if (row["stage"], row["iteration"]) == (stage, t)]


def first_batch(config, run_dir, t):
    pairs = in_order_of_id(run_dir, t)
    order = batch_order(len(pairs), batch_size=8, num_epochs=1, seed=config.seed, iteration=t)
    return [pairs[i] for i in next(order)]


# What a loss is of a pair where pi = pi_t = pi_ref: (rewards [2], target, beta) -> number.
AT_ZERO = {
    "dno": lambda r, z, b: LOG_2,
    "spin": lambda r, z, b: LOG_2,
    "ipo": lambda r, z, b: (0.5 / b) ** 2,  # hard labels
    "inpo": lambda r, z, b: (0.5 / b) ** 2,
    "sppo": lambda r, z, b: np.mean(((r - 0.5) / b) ** 2),
    "spo": lambda r, z, b: -np.mean(r - 0.5),
    "nash_md_pg": lambda r, z, b: -np.mean(r - 0.5),
}


def test_every_variant_is_here():
    assert len(NAMES) == len(set(NAMES)) == 19
    assert set(ITERATIONS) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_training_starts_at_pi_t_and_its_loss_at_the_value_that_follows(name, run_of):
    config, run_dir = run_of(name)
    assert policy_fingerprint(run_dir.policy(config.iterations)) != policy_fingerprint(run_dir.policy(0))
    for t in range(config.iterations):
        stages = [stage for stage in stage_names(config, t) if stage.startswith("train")]
        for stage in stages:
            first = steps_of(run_dir, t, stage)[0]
            assert first["step"] == 0
            assert first["max_abs_log_ratio"] < 1e-3
            assert math.isfinite(first["grad_norm"])
            assert first["grad_norm"] > 0.0
            if config.loss.name == "sft":
                continue
            batch = first_batch(config, run_dir, t)
            rewards = [np.asarray([pair.chosen_reward, pair.rejected_reward]) for pair in batch]
            beta, of_pair = config.loss_at(t).beta, AT_ZERO[config.loss.name]
            values = [of_pair(r, pair.target, beta) for r, pair in zip(rewards, batch, strict=True)]
            expected = np.average(values, weights=[pair.weight for pair in batch])
            one_reference = (name, t) not in (("comal", 1), ("option_2", 1))  # there pi_t has left pi_ref
            assert (first["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-5)) == one_reference
            assert (first["loss"] == pytest.approx(LOG_2, abs=1e-5)) == (
                one_reference and config.loss.name in ("dno", "spin")
            )


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_those_of_the_configuration(name, run_of):
    """Hard labels are 1; Eq. 8's are sigma(r(y+) - r(y-))."""
    config, run_dir = run_of(name)
    soft = name in ("algorithm_1", "comal", "extragradient", "optimistic", "option_2", "regularised")
    assert (config.loss.target == "soft") == soft
    for t in range(config.iterations):
        pairs = pairs_of(run_dir, t)
        assert pairs
        for pair in pairs:
            gap = pair.chosen_reward - pair.rejected_reward
            # Rewards are written to six digits.
            expected = 1.0 / (1.0 + math.exp(-gap)) if soft else 1.0
            assert pair.target == pytest.approx(expected, abs=1e-6)
    if soft:
        largest = 0.953 if name == "optimistic" else 0.732  # sigma(3), of 2 dr_t - dr_{t-1}; sigma(1)
        assert all(0.5 <= pair.target <= largest for pair in pairs)
        assert len({round(pair.target, 4) for pair in pairs}) > 2


def test_spin_lets_the_teacher_win_and_asks_nobody(run_of):
    _config, run_dir = run_of("spin")
    pairs, rollouts = pairs_of(run_dir, 0), rollouts_of(run_dir, 0)
    assert {pair.kind for pair in pairs} == {"gold>student"}
    assert all(rollouts[pair.chosen_id].is_gold and not rollouts[pair.rejected_id].is_gold for pair in pairs)
    assert not run_dir.annotations_path.exists()
    details = run_dir.stage("annotate", 0).require().details
    assert details["judge"].startswith("gold")
    # Every sample serves: what was sampled twice is one pair of weight 2.
    distinct = Counter((row.prompt_id, row.text.strip()) for row in rollouts.values() if not row.is_gold)
    gold = {(row.prompt_id, row.text.strip()) for row in rollouts.values() if row.is_gold}
    expected = {key: count for key, count in distinct.items() if key[1] and key not in gold}
    found = {(pair.prompt_id, rollouts[pair.rejected_id].text.strip()): pair.weight for pair in pairs}
    assert found == expected
    assert run_dir.stage("evaluate", 0).require().details["win_rates"]


def test_restrictive_keeps_only_what_the_teacher_wins(run_of):
    _config, run_dir = run_of("restrictive")
    assert {pair.kind for pair in pairs_of(run_dir, 0)} == {"gold>student"}
    dropped = run_dir.stage("pair", 0).require().dropped
    assert dropped["winner is not gold"] > 0


def test_no_margin_takes_every_strict_preference(run_of):
    _config, run_dir = run_of("no_margin")
    dropped = run_dir.stage("pair", 0).require().dropped
    assert set(dropped) <= {"tie", "both degenerate"}
    margins = [pair.chosen_reward - pair.rejected_reward for pair in pairs_of(run_dir, 0)]
    assert min(margins) < 0.2  # which the margins of the small configuration would have dropped
    assert {pair.kind for pair in pairs_of(run_dir, 0)} >= {"gold>student", "student>student"}


@pytest.mark.parametrize(
    ("name", "epochs", "margin"),
    [("offline_dpo", 4, 1.0), ("offline_dpo_no_margin", 1, 0.0), ("sft_on_positives", 4, 1.0)],
)
def test_offline_variants_sample_nothing_and_trust_the_given_points(name, epochs, margin, run_of):
    _config, run_dir = run_of(name)
    rollouts = rollouts_of(run_dir, 0)
    assert {(row.source, row.policy, row.logprob) for row in rollouts.values()} == {("data", None, None)}
    assert len(rollouts) == 6 * 5
    for judgement in run_dir.stage("annotate", 0).read(Judgement):
        assert judgement.scores == POINTS
    pairs = pairs_of(run_dir, 0)
    assert {pair.kind for pair in pairs} == {"data>data"}
    expected = [(a, b) for a, b in itertools.combinations(POINTS, 2) if a != b and a - b >= margin]
    for index in range(6):
        found = [(pair.chosen_reward, pair.rejected_reward) for pair in pairs if pair.prompt_id == f"d{index}"]
        assert sorted(found) == sorted(expected)
    dropped = {"tie": 6, "below margin": 6 * (9 - len(expected))}
    assert run_dir.stage("pair", 0).require().dropped == {key: count for key, count in dropped.items() if count}
    assert len(steps_of(run_dir, 0)) == epochs * math.ceil(len(pairs) / 8)
    # New responses are compared by the judge of the evaluation: the data knows no points for them.
    assert run_dir.stage("evaluate", 0).require().details["win_rates"].keys() == {"0", "gold"}


def test_sft_makes_the_positives_likelier(run_of):
    config, run_dir = run_of("sft_on_positives")
    steps = steps_of(run_dir, 0)
    an_epoch = len(steps) // config.training.num_epochs
    first, last = steps[:an_epoch], steps[-an_epoch:]
    for column, sign in (("chosen_logprob", 1), ("loss", -1)):
        means = [float(np.mean([row[column] for row in rows])) for rows in (first, last)]
        assert sign * (means[1] - means[0]) > 0.1, column


def test_iterative_dpo_and_online_ipo_take_each_pairs_own_verdict(run_of):
    for name in ("iterative_dpo", "online_ipo"):
        _config, run_dir = run_of(name)
        verdicts = {row.prompt_id: row for row in run_dir.stage("annotate", 0).read(Judgement)}
        against_the_rates = 0
        for pair in pairs_of(run_dir, 0):
            judgement = verdicts[pair.prompt_id]
            row, column = (judgement.candidate_ids.index(x) for x in (pair.chosen_id, pair.rejected_id))
            assert judgement.wins[row][column] > 0.5
            against_the_rates += pair.chosen_reward < pair.rejected_reward
        decided = sum(
            judgement.wins[i][j] != 0.5
            for judgement in verdicts.values()
            for i, j in itertools.combinations(range(len(judgement.candidate_ids)), 2)
        )
        assert len(pairs_of(run_dir, 0)) == decided
    assert run_of("online_ipo")[0].reference.kind == "initial"
    assert run_of("iterative_dpo")[0].reference.kind == "previous"


def test_inpo_takes_the_best_against_the_worst(run_of):
    config, run_dir = run_of("inpo")
    assert config.reference.tau == pytest.approx(config.loss.beta / 3)
    pairs = pairs_of(run_dir, 0)
    assert max(Counter(pair.prompt_id for pair in pairs).values()) == 1
    for pair in pairs:
        judgement = next(row for row in run_dir.stage("annotate", 0).read(Judgement) if row.prompt_id == pair.prompt_id)
        rewards = rates_against(run_dir, judgement, "policy")
        assert pair.chosen_reward == pytest.approx(max(rewards.values()), abs=1e-6)
        assert pair.rejected_reward == pytest.approx(min(rewards.values()), abs=1e-6)


def rates_against(run_dir, judgement, opponents, t=0):
    """{judged id: mean win rate against these samples, one of its own left out}, by the definition."""
    rollouts = [row for row in rollouts_of(run_dir, t).values() if row.prompt_id == judgement.prompt_id]
    texts = {row.rollout_id: row.text.strip() for row in rollouts}
    place = {texts[name]: index for index, name in enumerate(judgement.candidate_ids)}
    rates = {}
    for name in judgement.candidate_ids:
        met = [row.text.strip() for row in rollouts if row.source == opponents and row.text.strip() in place]
        if next(row for row in rollouts if row.rollout_id == name).source == opponents:
            met.remove(texts[name])
        rates[name] = float(np.mean([judgement.wins[place[texts[name]]][place[text]] for text in met]))
    return rates


@pytest.mark.parametrize(
    ("name", "opponents"), [("algorithm_1", "policy"), ("option_2", "mixture"), ("nash_md_pg", "mixture")]
)
def test_win_rates_are_against_the_opponents_of_the_variant(name, opponents, run_of):
    config, run_dir = run_of(name)
    for t in range(config.iterations):
        verdicts = {row.prompt_id: row for row in run_dir.stage("annotate", t).read(Judgement)}
        rates = {key: rates_against(run_dir, row, opponents, t) for key, row in verdicts.items()}
        texts = {key: row.text.strip() for key, row in rollouts_of(run_dir, t).items()}
        for pair in pairs_of(run_dir, t):
            judged = {texts[key]: rate for key, rate in rates[pair.prompt_id].items()}
            for key, reward in ((pair.chosen_id, pair.chosen_reward), (pair.rejected_id, pair.rejected_reward)):
                if key in rates[pair.prompt_id]:
                    assert reward == pytest.approx(judged[texts[key]], abs=1e-6)


@pytest.mark.parametrize("name", ["sppo", "spo", "nash_md_pg"])
def test_losses_a_response_see_every_sample_once(name, run_of):
    _config, run_dir = run_of(name)
    pairs, rollouts = pairs_of(run_dir, 0), rollouts_of(run_dir, 0)
    used = [key for pair in pairs for key in (pair.chosen_id, pair.rejected_id)]
    assert len(used) == len(set(used))
    assert {rollouts[key].source for key in used} == {"policy"}
    assert {pair.weight for pair in pairs} == {1.0}
    judged = {row.prompt_id for row in run_dir.stage("annotate", 0).read(Judgement)}
    there = [
        row for row in rollouts.values() if row.source == "policy" and row.prompt_id in judged and row.text.strip()
    ]
    assert len(there) - len(used) == run_dir.stage("pair", 0).require().dropped.get("odd one out", 0)


def test_nash_md_pg_compares_with_the_mixture_and_trains_on_the_policy(run_of):
    config, run_dir = run_of("nash_md_pg")
    rollouts = rollouts_of(run_dir, 0)
    numbers = {}
    for row in rollouts.values():
        numbers.setdefault(row.prompt_id, {}).setdefault(row.source, []).append(row.sample)
    for found in numbers.values():
        assert found == {"policy": [0, 1, 2, 3], "mixture": [4, 5, 6, 7], "gold": [-1]}
    opponents = {key for key, row in rollouts.items() if row.source == "mixture"}
    assert not opponents & {key for pair in pairs_of(run_dir, 0) for key in (pair.chosen_id, pair.rejected_id)}
    assert mixture_weight(config, 0) == mixture_weight(config, 5) == 0.25


def test_option_2_samples_the_mixture_with_nash_mds_schedule(run_of):
    config, run_dir = run_of("option_2")
    for t in range(2):
        found = {row.source for row in rollouts_of(run_dir, t).values() if not row.is_gold}
        assert found == {"mixture"}
        names = {name for name in run_dir.stage("sample", t).require().inputs if name.startswith("policies/")}
        assert names == {"policies/000", f"policies/{t:03d}"}
        assert config.loss_at(t).beta == pytest.approx(0.02 * (t + 2) / 2)
        assert mixture_weight(config, t) == pytest.approx(2 / (t + 2))
        # Also at temperature 1 the record is log pi_t, not that of the mixture it was drawn from.
        scores = {row.pair_id: row for row in run_dir.stage("score", t).read(ReferenceScore)}
        rollouts = rollouts_of(run_dir, t)
        compared = 0
        for pair in pairs_of(run_dir, t):
            if rollouts[pair.chosen_id].logprob is not None:
                compared += 1
                assert scores[pair.pair_id].chosen_logprob == pytest.approx(rollouts[pair.chosen_id].logprob, abs=1e-3)
        assert compared > 5


def inputs_of(run_dir, stage, t):
    """{policy: fingerprint} of a manifest's inputs."""
    inputs = run_dir.stage(stage, t).require().inputs
    return {name.removeprefix("policies/"): value for name, value in inputs.items() if name.startswith("policies/")}


def test_the_proximal_scheme_moves_its_centre(run_of):
    config, run_dir = run_of("comal")
    fingerprints = {f"{t:03d}": policy_fingerprint(run_dir.policy(t)) for t in range(4)}
    # pi_ref is policy 0, 0, 2, 2, 4 ...: where it is pi_t itself one set of scores serves as both.
    held_to = [{"000"}, {"001", "000"}, {"002"}]
    for t, names in enumerate(held_to):
        assert inputs_of(run_dir, "score", t) == {name: fingerprints[name] for name in names}
        details = run_dir.stage("score", t).require().details
        assert details["policy"] == f"{t:03d}"
        assert details["initial"] == (fingerprints["000"] if t == 1 else "")
        assert bool(run_dir.stage("score", t).sub("initial").shard_names()) == (t == 1)
    assert [initial_policy(config, RunDir("."), t).name for t in range(6)] == ["000", "000", "002", "002", "004", "004"]
    columns = [
        {row.pair_id: row.chosen_logprob for row in stage.read(ReferenceScore)}
        for stage in (run_dir.stage("score", 1), run_dir.stage("score", 1).sub("initial"))
    ]
    assert columns[0].keys() == columns[1].keys()
    assert max(abs(columns[0][key] - columns[1][key]) for key in columns[0]) > 1e-2


def rates_of_texts(run_dir, t, opponents):
    """(prompt, text) -> win rate against the samples of a source, as a judge was shown them."""
    texts = {key: row.text.strip() for key, row in rollouts_of(run_dir, t).items()}
    found = {}
    for judgement in run_dir.stage("annotate", t).read(Judgement):
        if any(
            row.prompt_id == judgement.prompt_id and not row.text.strip() for row in rollouts_of(run_dir, t).values()
        ):
            continue  # an empty response is an opponent that no judge was shown
        rates = rates_against(run_dir, judgement, opponents, t)
        found |= {(judgement.prompt_id, texts[key]): rate for key, rate in rates.items()}
    return found


def judged_pairs(run_dir, t, rates):
    """Pairs of texts that a judge was shown, with the places of both in `rates`."""
    texts = {key: row.text.strip() for key, row in rollouts_of(run_dir, t).items()}
    for pair in pairs_of(run_dir, t):
        chosen, rejected = ((pair.prompt_id, texts[key]) for key in (pair.chosen_id, pair.rejected_id))
        if {chosen, rejected} <= rates.keys():
            yield pair, chosen, rejected


def test_the_optimistic_scheme_regresses_once_on_both_policies_win_rates(run_of):
    config, run_dir = run_of("optimistic")
    assert stage_names(config, 1) == ("sample", "annotate", "pair", "score", "train", "evaluate")
    assert sorted(path.name for path in (run_dir.path / "policies").iterdir() if path.is_dir()) == ["000", "001", "002"]
    for t in range(2):
        assert list(inputs_of(run_dir, "train", t)) == [f"{t:03d}"]
        sources = Counter(row.source for row in rollouts_of(run_dir, t).values())
        assert sources["previous"] == (sources["policy"] if t else 0)
    older = {row.rollout_id: row for row in rollouts_of(run_dir, 0).values()}
    again = [row for row in rollouts_of(run_dir, 1).values() if row.source == "previous"]
    assert all(older[row.rollout_id].text == row.text for row in again)
    before = run_dir.stage("sample", 0)
    assert before.input_digest(before.manifest_path).items() <= run_dir.stage("sample", 1).require().inputs.items()
    now, then = (rates_of_texts(run_dir, 1, source) for source in ("policy", "previous"))
    compared = list(judged_pairs(run_dir, 1, now))
    assert len(compared) > 5
    for pair, chosen, rejected in compared:
        difference = 2 * (now[chosen] - now[rejected]) - (then[chosen] - then[rejected])
        assert pair.target == pytest.approx(1 / (1 + math.exp(-difference)))


def test_an_extragradient_step_trains_twice_from_one_policy(run_of):
    _, run_dir = run_of("extragradient")
    assert [list(inputs_of(run_dir, "train", t)) for t in range(2)] == [["000"], ["000"]]
    assert [run_dir.stage("train", t).require().details["policy"] for t in range(2)] == ["001", "002"]
    assert list(inputs_of(run_dir, "sample", 1)) == ["001"]
    halves = [pairs_of(run_dir, t) for t in range(2)]
    assert {pair.iteration for pair in halves[0] + halves[1]} == {0}
    used = {name for pair in halves[1] for name in (pair.chosen_id, pair.rejected_id) if not name.endswith("/gold")}
    assert used <= rollouts_of(run_dir, 0).keys()
    rates = rates_of_texts(run_dir, 1, "policy")
    compared = list(judged_pairs(run_dir, 1, rates))
    assert len(compared) > 5
    for pair, chosen, rejected in compared:
        assert (pair.chosen_reward, pair.rejected_reward) == pytest.approx((rates[chosen], rates[rejected]), abs=1e-6)
    # The second half begins where the reference is: at log 2 soft labels, and log-ratios of 0.
    first = next(row for row in steps_of(run_dir, 1) if row["step"] == 0)
    assert first["max_abs_log_ratio"] < 1e-3


def test_a_killed_optimistic_run_ends_at_the_same_policy(run_of, tmp_path):
    config, run_dir = run_of("optimistic")
    shutil.copytree(run_dir.path, tmp_path / "copy")
    copied = config.model_copy(update={"run_dir": str(tmp_path / "copy")})
    copy = RunDir(copied.run_dir)
    for name in ("sample", "annotate", "pair", "score", "train"):
        shutil.rmtree(copy.stage(name, 1).path)
    shutil.rmtree(copy.policy(2))
    shutil.rmtree(copy.stage("evaluate", 1).path)
    iteration.run(copied)
    assert policy_fingerprint(copy.policy(2)) == policy_fingerprint(run_dir.policy(2))
    again, before = ([row["loss"] for row in steps_of(d, 1)] for d in (copy, run_dir))
    np.testing.assert_allclose(again, before, rtol=1e-6)


def test_lookahead_restarts_from_policy_0_on_all_earlier_pairs(run_of):
    config, run_dir = run_of("lookahead")
    last = run_dir.stage("sample", 2)
    assert not last.path.exists()
    assert not run_dir.stage("annotate", 2).path.exists()
    earlier = [pair for t in range(2) for pair in read_pairs(run_dir.stage("pair", t), "new")]
    assert {pair.iteration for pair in earlier} == {0, 1}
    assert read_pairs(run_dir.stage("pair", 2), "new") == []
    assert read_pairs(run_dir.stage("pair", 2), "replayed") == earlier
    for name in ("score", "train"):
        assert inputs_of(run_dir, name, 2) == {"000": policy_fingerprint(run_dir.policy(0))}
    assert run_dir.stage("score", 2).require().details["policy"] == "000"
    assert run_dir.stage("train", 2).require().rows == len(earlier)
    # Pairs of iteration 1 come from policy 1: under policy 0 their scores are others than they were.
    then, now = ({row.pair_id: row for row in run_dir.stage("score", t).read(ReferenceScore)} for t in (1, 2))
    moved = [abs(then[p.pair_id].chosen_logprob - now[p.pair_id].chosen_logprob) for p in earlier if p.iteration == 1]
    assert max(moved) > 1e-2
    assert stage_names(config, 2) == ("pair", "score", "train", "evaluate")


@pytest.mark.parametrize("name", ["algorithm_1", "spo"])
def test_the_average_of_all_policies_is_returned_and_evaluated(name, run_of):
    config, run_dir = run_of(name)
    tree = json.loads((run_dir.export_average_path / "mixture.json").read_text())
    names = [f"policy-{t:03d}" for t in range(config.iterations)]
    assert tree["policies"] == names  # pi_0 .. pi_{T-1}: the newest is no part of unif(pi_1 .. pi_T)
    assert tree["seed"] == config.seed
    for folder in names:
        loaded, params = hf.load(str(run_dir.export_average_path / folder))
        assert isinstance(loaded, ModelConfig)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))
        assert (run_dir.export_average_path / folder / "tokenizer.json").exists()
    source = Path(config.model.path, "model.safetensors").read_bytes()
    assert (run_dir.export_average_path / names[0] / "model.safetensors").read_bytes() == source
    newest = config.iterations
    average = run_dir.stage("evaluate", newest - 1).require().details["average"]
    assert set(average) == {str(t) for t in range(newest + 1)} | {"gold"}
    assert all(0.0 <= found["rate"] <= 1.0 for found in average.values())


def test_a_pool_draws_each_policy_about_as_often():
    drawn = Counter(pool_member(f"p{i}", seed=3, size=4) for i in range(2000))
    # 500 each, standard deviation 19.
    assert all(abs(drawn[member] - 500) < 80 for member in range(4))
    digest = hashlib.sha256(b'["mixture member", 1, "p", 0]').digest()  # as mixture.json says it
    assert pool_member("p", seed=1, size=3) == int.from_bytes(digest[:8], "big") % 3
