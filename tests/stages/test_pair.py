"""From judged pools to pairs, on pools written by hand: no model and no device takes part."""

import itertools
import math

import numpy as np
import pytest

from dno_jax.config import RunConfig, parse_config
from dno_jax.errors import DnoError
from dno_jax.files import write_lines_atomically
from dno_jax.records import Judgement, Message, Prompt, Rollout
from dno_jax.run_dir import RunDir
from dno_jax.stages import pair
from dno_jax.stages.pair import new_pairs
from tests.pairs import read_pairs
from tests.running import run_stage


def make_config(run_dir="run", *, kind="oracle", iterations=2, **sections):
    """As Algorithm 1 has it unless a section says otherwise."""
    tree = {
        "run_dir": str(run_dir),
        "iterations": iterations,
        "model": {"path": "m"},
        "prompts": {"path": "p.jsonl"},
        "annotation": {"kind": kind},
        "pairing": {"rule": "all", "reward": "win_rate", "opponents": "policy", "replay": 0.0},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return parse_config(RunConfig, tree, place="test")


def mixture_config(**sections):
    """Nash-MD: samples of the policy, compared with samples of the mixture."""
    sections["pairing"] = {"opponents": "mixture"} | sections.get("pairing", {})
    sampling = {"num_opponents": 3, "mixture_weight": 0.25}
    return make_config(sampling=sampling, **sections)


def rollout(text, sample, *, source="policy", prompt="q", token_ids=None):
    ids = tuple(range(3, 3 + max(len(text), 1))) if token_ids is None else token_ids
    return Rollout(
        rollout_id=f"000/{prompt}/{'gold' if source == 'gold' else sample}",
        prompt_id=prompt,
        sample=-1 if source == "gold" else sample,
        source=source,
        policy=0 if source in ("policy", "mixture") else None,
        text=text,
        token_ids=ids,
        prompt_token_ids=(1,),
        logprob=None,
        finish="stop",
    )


def samples_of(texts, *, source="policy", first=0, prompt="q"):
    return [rollout(text, first + i, source=source, prompt=prompt) for i, text in enumerate(texts)]


def judged(rollouts, *, wins=None, scores=None):
    """A verdict on the texts in order of first appearance: {(a, b): P(a beats b)}, or {a: points}."""
    firsts = {}
    for row in rollouts:
        if row.text.strip():
            firsts.setdefault(row.text.strip(), row)
    answer = {}
    if scores is not None:
        answer["scores"] = tuple(float(scores[text]) for text in firsts)
    else:
        answer["wins"] = tuple(tuple(probability(wins, a, b) for b in firsts) for a in firsts)
    ids = tuple(row.rollout_id for row in firsts.values())
    return Judgement(prompt_id=rollouts[0].prompt_id, candidate_ids=ids, judge="hand", state="ok", **answer)


def probability(wins, a, b):
    if a == b:
        return 0.5
    if not (a and b):  # an empty response loses to every text
        return float(bool(a))
    return wins[a, b] if (a, b) in wins else 1.0 - wins[b, a]


def random_wins(texts, rng):
    return {pair: float(rng.choice([0.0, 0.25, 0.5, 0.7, 1.0])) for pair in itertools.combinations(texts, 2)}


def made_of(config, rollouts, **verdict):
    return new_pairs([judged(rollouts, **verdict)], rollouts, config, iteration=0)


def texts_of(made, rollouts):
    """{(chosen text, rejected text): pair}"""
    text = {row.rollout_id: row.text.strip() for row in rollouts}
    return {(text[row.chosen_id], text[row.rejected_id]): row for row in made.pairs}


def met_by(rollouts, text, opponents, source):
    """The opponents, one entry a sample, that a candidate of this text meets: all but itself."""
    met = [row.text.strip() for row in rollouts if row.source in opponents]
    if source in opponents:
        met.remove(text)
    return met


@pytest.mark.parametrize("opponents", ["pool", "policy", "mixture"])
@pytest.mark.parametrize("seed", range(5))
def test_win_rates_count_every_sample_of_a_text(opponents, seed):
    """Against brute force over samples: a text that was judged once and sampled three times is three opponents."""
    rng = np.random.default_rng(seed)
    rollouts = [rollout("gold", -1, source="gold"), *samples_of([*rng.choice(list("abcd"), size=6), " ", "d"])]
    if opponents == "mixture":
        rollouts += samples_of(rng.choice(list("cdef"), size=3), source="mixture", first=8)
    wins = random_wins(["gold", *"abcdef"], rng)
    pairing = {"opponents": opponents}
    config = mixture_config(pairing=pairing) if opponents == "mixture" else make_config(pairing=pairing)
    made = made_of(config, rollouts, wins=wins)
    whom = {"gold", "policy", "mixture"} if opponents == "pool" else {opponents}
    sources = {}
    for row in rollouts:
        sources.setdefault(row.text.strip(), row.source)
    rates, errors = {}, {}
    for text, source in sources.items():
        if source != "mixture":
            verdicts = [probability(wins, text, other) for other in met_by(rollouts, text, whom, source)]
            rates[text] = np.mean(verdicts)
            errors[text] = np.std(verdicts, ddof=1) / math.sqrt(len(verdicts))
    found = texts_of(made, rollouts)
    assert found
    for (chosen, rejected), row in found.items():
        assert row.chosen_reward == pytest.approx(rates[chosen], abs=1e-6)
        assert row.rejected_reward == pytest.approx(rates[rejected], abs=1e-6)
    pairs = list(itertools.combinations(rates, 2))
    strict = {frozenset(p) for p in pairs if abs(rates[p[0]] - rates[p[1]]) > 1e-9}
    assert {frozenset(p) for p in found} == strict
    assert made.dropped == ({"tie": len(pairs) - len(strict)} if len(pairs) > len(strict) else {})
    assert made.verdicts()["mean_win_rate_error"] == pytest.approx(np.mean(list(errors.values())), abs=1e-4)


@pytest.mark.parametrize("rule", ["all", "large_margin", "best_worst", "verdict", "spin"])
@pytest.mark.parametrize("kind", ["wins", "scores"])
def test_an_empty_response_loses_to_every_text(rule, kind):
    """No judge is shown it. Under hard rules and margins too it is a negative, and never a winner."""
    rollouts = [rollout("gold", -1, source="gold"), *samples_of(["a", "", " ", "b"])]
    scores, wins = {"gold": 5, "a": 4, "b": 1}, {("gold", "a"): 0.6, ("gold", "b"): 1.0, ("a", "b"): 0.9}
    pairing = {"rule": rule, "opponents": "pool", "positive_floor": 0.6, "margin": 0.3, "student_margin": 0.3}
    if kind == "scores":
        pairing |= {"reward": "score", "positive_floor": 4.0, "margin": 1.0, "student_margin": 1.0}
    verdict = {"scores": scores} if kind == "scores" else {"wins": wins}
    target = "hard" if rule != "all" else "soft"
    config = make_config(kind="oracle" if kind == "wins" else "openai", pairing=pairing, loss={"target": target})
    found = texts_of(made_of(config, rollouts, **verdict), rollouts)
    losers = {"all": {"gold", "a", "b"}, "verdict": {"gold", "a", "b"}, "large_margin": {"gold", "a"}}
    assert {chosen for chosen, rejected in found if not rejected} == losers.get(rule, {"gold"})
    assert not [1 for chosen, _ in found if not chosen]
    if rule in ("all", "spin"):
        assert found["gold", ""].weight == 2.0  # two samples said nothing
    if kind == "scores":
        assert {row.rejected_reward for (_, rejected), row in found.items() if not rejected} == {0.0}


def test_one_text_beside_empty_responses_needs_no_judge():
    rollouts = samples_of(["a", "", "a", ""])
    made = new_pairs([], rollouts, make_config(), iteration=0)
    ((_, row),) = texts_of(made, rollouts).items()
    assert (row.chosen_id, row.rejected_id, row.weight) == ("000/q/0", "000/q/1", 4.0)
    assert row.chosen_reward == pytest.approx((0.5 + 1 + 1) / 3, abs=1e-6)
    assert row.rejected_reward == pytest.approx((0.5 + 0 + 0) / 3, abs=1e-6)
    # Points of a text that nobody judged are unknown; a prompt without any text, or without an empty one, has no pair.
    scored = make_config(kind="openai", pairing={"reward": "score", "opponents": "pool"})
    assert not new_pairs([], rollouts, scored, iteration=0).pairs
    for texts in (["", ""], ["a", "a"]):
        assert not new_pairs([], samples_of(texts), make_config(), iteration=0).pairs


def test_duplicates_weigh_as_opponents_and_as_pairs():
    """By hand: samples a a a b, where b beats a for certain."""
    rollouts = samples_of(["a", "a", "a", "b"])
    row = texts_of(made_of(make_config(), rollouts, wins={("b", "a"): 1.0}), rollouts)["b", "a"]
    assert row.chosen_reward == 1.0
    assert row.rejected_reward == pytest.approx((0.5 + 0.5 + 0.0) / 3, abs=1e-6)
    assert row.weight == 3 * 1
    assert (row.pair_id, row.kind, row.iteration) == ("000/q/3>0", "student>student", 0)


@pytest.mark.parametrize("rule", ["all", "verdict"])
def test_weights_are_products_of_counts(rule):
    rollouts = [rollout("g", -1, source="gold"), *samples_of(["a", "a", "b", "b", "b", "c"])]
    counts = {"g": 1, "a": 2, "b": 3, "c": 1}
    order = "gabc"
    wins = dict.fromkeys(itertools.combinations(order, 2), 0.9)
    made = made_of(make_config(pairing={"rule": rule}), rollouts, wins=wins)
    found = {names: row.weight for names, row in texts_of(made, rollouts).items()}
    assert found == {(x, y): counts[x] * counts[y] for x, y in itertools.combinations(order, 2)}


def test_samples_of_the_mixture_are_only_compared_with():
    rollouts = samples_of(["a", "b", "b"]) + samples_of(["m", "b", "n"], source="mixture", first=3)
    wins = random_wins("abmn", np.random.default_rng(0)) | {("a", "b"): 0.9, ("a", "m"): 1.0, ("a", "n"): 1.0}
    made = made_of(mixture_config(), rollouts, wins=wins)
    assert list(texts_of(made, rollouts)) == [("a", "b")]
    row = made.pairs[0]
    assert row.chosen_reward == pytest.approx((1.0 + 0.9 + 1.0) / 3, abs=1e-6)
    # b was drawn by both: as a sample of the policy it meets all three of the mixture, the b among them too.
    rate = (probability(wins, "b", "m") + 0.5 + probability(wins, "b", "n")) / 3
    assert row.rejected_reward == pytest.approx(rate, abs=1e-6)
    assert row.weight == 2  # its weight is of the policy's samples alone
    assert {row.chosen_id, row.rejected_id} <= {f"000/q/{sample}" for sample in range(3)}


def test_where_all_samples_are_the_mixtures_they_are_trained_on():
    """Option II."""
    rollouts = samples_of(["a", "b", "c"], source="mixture")
    config = make_config(sampling={"source": "mixture", "mixture_weight": 0.5}, pairing={"opponents": "mixture"})
    made = made_of(config, rollouts, wins={("a", "b"): 1.0, ("a", "c"): 1.0, ("b", "c"): 1.0})
    assert list(texts_of(made, rollouts)) == [("a", "c"), ("a", "b"), ("b", "c")]
    assert [row.chosen_reward for row in made.pairs] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_soft_targets_are_the_sigmoid_of_the_gap(temperature):
    rollouts = [rollout("g", -1, source="gold"), *samples_of(["a", "b", "b", "c"])]
    config = make_config(loss={"target": "soft", "target_temperature": temperature})
    made = made_of(config, rollouts, wins=random_wins("gabc", np.random.default_rng(3)))
    assert len(made.pairs) == 6  # ties are kept
    for row in made.pairs:
        gap = (row.chosen_reward - row.rejected_reward) / temperature
        assert row.target == pytest.approx(1 / (1 + math.exp(-gap)), abs=1e-5)
        assert row.target >= 0.5
    hard = made_of(make_config(), rollouts, wins=random_wins("gabc", np.random.default_rng(3)))
    assert {row.target for row in hard.pairs} == {1.0}


@pytest.mark.parametrize("rule", ["all", "verdict"])
def test_ties_are_kept_for_soft_labels_alone(rule):
    rollouts = samples_of(["a", "b", "c"])
    wins = {("a", "b"): 0.5, ("a", "c"): 0.5, ("b", "c"): 0.5}
    soft = made_of(make_config(pairing={"rule": rule}, loss={"target": "soft"}), rollouts, wins=wins)
    assert [row.target for row in soft.pairs] == [0.5] * 3
    assert all(row.chosen_id < row.rejected_id for row in soft.pairs)
    hard = made_of(make_config(pairing={"rule": rule}), rollouts, wins=wins)
    assert (hard.pairs, dict(hard.dropped)) == ([], {"tie": 3})


def test_a_verdicts_soft_label_is_the_stated_probability():
    rollouts = samples_of(["a", "b", "b", "c"])
    wins = {("a", "b"): 0.7, ("b", "c"): 0.9, ("c", "a"): 0.6}  # a cycle: rewards could not say so
    config = make_config(pairing={"rule": "verdict"}, loss={"target": "soft", "target_temperature": 0.1})
    made = made_of(config, rollouts, wins=wins)
    assert {names: row.target for names, row in texts_of(made, rollouts).items()} == pytest.approx(wins)
    assert made.cycles == 1
    hard = made_of(make_config(pairing={"rule": "verdict"}), rollouts, wins=wins)
    assert {names: row.target for names, row in texts_of(hard, rollouts).items()} == dict.fromkeys(wins, 1.0)


def test_spin_needs_no_verdict_to_know_the_winner():
    rollouts = [rollout("g", -1, source="gold"), *samples_of(["a", "a", "b"])]
    config = make_config(kind="gold", pairing={"rule": "spin", "opponents": "pool"}, loss={"name": "spin"})
    made = made_of(config, rollouts, wins={("a", "g"): 1.0, ("g", "b"): 1.0, ("a", "b"): 1.0})
    assert {names: row.weight for names, row in texts_of(made, rollouts).items()} == {("g", "a"): 2, ("g", "b"): 1}
    assert {row.kind for row in made.pairs} == {"gold>student"}
    assert made.dropped == {"both students": 1}
    alone = samples_of(["a", "b"])
    assert made_of(config, alone, wins={("a", "b"): 1.0}).dropped == {"no gold": 1}


def points_config(**pairing):
    floors = {"rule": "large_margin", "reward": "score", "opponents": "pool"}
    return make_config(kind="openai", pairing=floors | pairing)


POINTS = {"g": 5, "a": 6, "b": 4, "c": 3}


def test_large_margins_are_section_5s():
    rollouts = [rollout("g", -1, source="gold"), *samples_of(["a", "b", "c", "b"])]
    made = made_of(points_config(), rollouts, scores=POINTS)
    found = texts_of(made, rollouts)
    assert list(found) == [("a", "c"), ("a", "b"), ("g", "c"), ("a", "g")]
    assert found["a", "g"].kind == "student>gold"  # a margin of 1 is enough for a student
    assert {row.weight for row in made.pairs} == {1.0}
    assert made.dropped == {"below margin": 1, "chosen below positive_floor": 1}
    widest = made_of(points_config(max_pairs_per_prompt=1), rollouts, scores=POINTS)
    assert list(texts_of(widest, rollouts)) == [("a", "c")]
    assert widest.dropped["over max_pairs_per_prompt"] == 3


def test_restrictive_drops_what_a_student_wins():
    rollouts = [rollout("g", -1, source="gold"), *samples_of(["a", "b", "c"])]
    made = made_of(points_config(rule="restrictive"), rollouts, scores=POINTS)
    assert list(texts_of(made, rollouts)) == [("g", "c")]
    assert made.dropped == {"winner is not gold": 3, "below margin": 1, "chosen below positive_floor": 1}


def test_best_against_worst():
    rollouts = [rollout("g", -1, source="gold"), *samples_of(["a", "b", "c"])]
    made = made_of(points_config(rule="best_worst"), rollouts, scores=POINTS)
    assert list(texts_of(made, rollouts)) == [("a", "c")]
    assert made.dropped == {"not best against worst": 5}
    narrow = made_of(points_config(rule="best_worst", margin=4.0), rollouts, scores=POINTS)
    assert (narrow.pairs, narrow.dropped["below margin"]) == ([], 1)


def test_a_repetitive_response_is_a_negative_and_gold_never_is():
    loop = (5, 6) * 8
    rollouts = [
        rollout("g", -1, source="gold", token_ids=loop),
        rollout("a", 0, token_ids=loop),
        rollout("b", 1, token_ids=tuple(range(16))),
    ]
    made = made_of(points_config(), rollouts, scores={"g": 5, "a": 6, "b": 5})
    assert list(texts_of(made, rollouts)) == [("b", "a"), ("g", "a")]
    assert made.dropped == {"tie": 1}


def test_points_become_verdicts_at_the_score_temperature():
    rollouts = samples_of(["a", "b", "c"])
    points = {"a": 6, "b": 4, "c": 3}
    for temperature, win in ((0.0, lambda gap: 1.0), (2.0, lambda gap: 1 / (1 + math.exp(-gap / 2.0)))):
        pairing = {"score_temperature": temperature}
        config = make_config(kind="openai", pairing=pairing)
        row = texts_of(made_of(config, rollouts, scores=points), rollouts)["a", "c"]
        assert row.chosen_reward == pytest.approx((win(2) + win(3)) / 2, abs=1e-6)
        assert row.rejected_reward == pytest.approx((1 - win(3) + 1 - win(1)) / 2, abs=1e-6)
        verdict = make_config(
            kind="openai", pairing=pairing | {"rule": "verdict", "reward": "score"}, loss={"target": "soft"}
        )
        row = texts_of(made_of(verdict, rollouts, scores=points), rollouts)["a", "c"]
        assert row.target == pytest.approx(win(3))
        assert (row.chosen_reward, row.rejected_reward) == (6.0, 3.0)


def test_points_are_not_made_of_pairwise_verdicts():
    rollouts = samples_of(["a", "b"])
    with pytest.raises(DnoError, match=r"prompt 'q' by hand has pairwise verdicts, no scores; set pairing\.reward"):
        made_of(points_config(), rollouts, wins={("a", "b"): 1.0})


def matching_config():
    return make_config(pairing={"rule": "matching"}, loss={"name": "sppo"})


def test_matching_takes_every_sample_of_the_policy_once():
    rollouts = [rollout("g", -1, source="gold"), *samples_of(["a", "b", "a", "c", "b", "a", "d"])]
    wins = dict.fromkeys(itertools.combinations("gabcd", 2), 0.8)
    verdict = judged(rollouts, wins=wins)
    made = new_pairs([verdict], rollouts, matching_config(), iteration=0)
    used = [key for row in made.pairs for key in (row.chosen_id, row.rejected_id)]
    assert len(used) == len(set(used)) == 6
    assert "000/q/gold" not in used
    assert made.dropped == {"odd one out": 1}
    assert {row.weight for row in made.pairs} == {1.0}
    text = {row.rollout_id: row.text for row in rollouts}
    for row in made.pairs:
        for key, reward in ((row.chosen_id, row.chosen_reward), (row.rejected_id, row.rejected_reward)):
            verdicts = [probability(wins, text[key], x) for x in met_by(rollouts, text[key], {"policy"}, "policy")]
            assert reward == pytest.approx(np.mean(verdicts), abs=1e-6)
    again = new_pairs([verdict], rollouts, matching_config(), iteration=0)
    assert again.pairs == made.pairs
    others = [new_pairs([verdict], rollouts, matching_config(), iteration=t).pairs for t in range(1, 5)]
    partners = [frozenset(row.pair_id for row in pairs) for pairs in (made.pairs, *others)]
    assert len(set(partners)) > 1  # drawn anew in every iteration


def test_matching_leaves_the_mixtures_samples_alone():
    rollouts = samples_of(["a", "b"]) + samples_of(["m", "n", "a"], source="mixture", first=2)
    config = mixture_config(
        pairing={"rule": "matching"}, loss={"name": "nash_md_pg"}, reference={"kind": "mixture", "tau": 0.01}
    )
    made = made_of(config, rollouts, wins=random_wins("abmn", np.random.default_rng(1)))
    assert {made.pairs[0].chosen_id, made.pairs[0].rejected_id} == {"000/q/0", "000/q/1"}
    assert len(made.pairs) == 1


def test_pools_without_a_verdict_or_without_opponents_are_counted():
    good = samples_of(["a", "b"])
    refused = samples_of(["a", "b"], prompt="r")
    alone = [rollout("g", -1, source="gold", prompt="s"), *samples_of(["a"], prompt="s")]
    ids = tuple(row.rollout_id for row in refused)
    judgements = [
        judged(alone, wins={("g", "a"): 1.0}),
        Judgement(prompt_id="r", candidate_ids=ids, judge="hand", state="refused", detail="no"),
        judged(good, wins={("a", "b"): 1.0}),
    ]
    made = new_pairs(judgements, [*alone, *refused, *good], make_config(), iteration=0)
    assert [row.prompt_id for row in made.pairs] == ["q"]
    assert made.dropped == {"verdict refused": 1, "no opponents for a win rate": 1}
    pool = new_pairs(judgements, [*alone, *refused, *good], make_config(pairing={"opponents": "pool"}), iteration=0)
    assert [row.prompt_id for row in pool.pairs] == ["q", "s"]  # the paper's estimator has the teacher to meet
    # Between two there is one opponent each, and no spread to tell an error from.
    assert made.verdicts() == {"cyclic_triples": 0}


def keep_prompts(run_dir, names, iteration=0):
    rows = [Prompt(prompt_id=name, messages=(Message(role="user", content=f"{name}?"),)) for name in sorted(names)]
    write_lines_atomically(run_dir.prompts_path(iteration), [row.model_dump_json() for row in rows])


def finish(config, rollouts, judgements, iteration=0):
    """Leave a sample and an annotate stage as those stages would."""
    run_dir = RunDir(config.run_dir)
    keep_prompts(run_dir, {row.prompt_id for row in rollouts}, iteration)
    for name, rows in (("sample", rollouts), ("annotate", judgements)):
        stage = run_dir.stage(name, iteration)
        stage.write_shard("0000000", rows)
        stage.finish(config, inputs={}, rows=len(rows), seconds=0.0)


def test_pairs_do_not_depend_on_how_shards_were_cut(tmp_path):
    """Replay draws pairs by their place, so that the order is part of the result."""
    texts = {prompt: samples_of(["a", "b", "c"], prompt=prompt) for prompt in "qrst"}
    verdicts = {
        prompt: judged(rows, wins={("a", "b"): 0.9, ("b", "c"): 0.8, ("c", "a"): 0.1 * place})
        for place, (prompt, rows) in enumerate(texts.items())
    }
    found = []
    for cut in (["qrst"], ["ts", "rq"], ["s", "q", "t", "r"]):
        config = make_config(tmp_path / "-".join(cut))
        run_dir = RunDir(config.run_dir)
        keep_prompts(run_dir, texts)
        for name in ("sample", "annotate"):
            stage = run_dir.stage(name, 0)
            for number, prompts in enumerate(cut):
                rows = [
                    row for prompt in prompts for row in (texts[prompt] if name == "sample" else [verdicts[prompt]])
                ]
                stage.write_shard(f"{number:07d}", rows)
            stage.finish(config, inputs={}, rows=0, seconds=0.0)
        details = run_stage(pair, config, 0).details
        found.append((read_pairs(run_dir.stage("pair", 0)), details))
    assert len({row.prompt_id for row in found[0][0]}) == 4
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_the_manifest_holds_cycles_errors_and_drops(tmp_path):
    config = make_config(tmp_path / "run")
    cyclic = samples_of(["a", "b", "c"])
    chain = samples_of(["aaaa", "bb", "cc", "d"], prompt="r")
    wins = {("a", "b"): 0.9, ("b", "c"): 0.8, ("c", "a"): 0.8}
    order = dict.fromkeys(itertools.combinations(["aaaa", "bb", "cc", "d"], 2), 1.0)
    finish(config, cyclic + chain, [judged(cyclic, wins=wins), judged(chain, wins=order)])
    manifest = run_stage(pair, config, 0)
    details, made = manifest.details, read_pairs(RunDir(config.run_dir).stage("pair", 0))
    rates = {"a": [0.9, 0.2], "b": [0.1, 0.8], "c": [0.2, 0.8]}
    errors = [np.std(values, ddof=1) / math.sqrt(2) for values in rates.values()]
    for beaten in (3, 2, 1, 0):
        errors.append(np.std([1.0] * beaten + [0.0] * (3 - beaten), ddof=1) / math.sqrt(3))
    assert details["cyclic_triples"] == 1
    assert details["mean_win_rate_error"] == pytest.approx(np.mean(errors), abs=1e-4)
    assert (details["new"], details["replayed"], details["prompts"]) == (len(made), 0, 2)
    assert len(made) + sum(manifest.dropped.values()) == 3 + 6
    assert details["kinds"] == {"student>student": len(made)}
    margins = [row.chosen_reward - row.rejected_reward for row in made]
    assert details["mean_margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert details["mean_target"] == 1.0
    ids = {row.rollout_id: len(row.token_ids) for row in cyclic + chain}
    assert details["mean_tokens_chosen"] == pytest.approx(np.mean([ids[row.chosen_id] for row in made]), abs=1e-2)
    assert run_stage(pair, config, 0) == manifest


def test_point_wise_judges_leave_no_win_rate_error(tmp_path):
    config = points_config()
    config = config.model_copy(update={"run_dir": str(tmp_path / "run")})
    rollouts = [rollout("g", -1, source="gold"), *samples_of(["a", "b", "c"])]
    finish(config, rollouts, [judged(rollouts, scores=POINTS)])
    details = run_stage(pair, config, 0).details
    assert details["cyclic_triples"] == 0
    assert "mean_win_rate_error" not in details


# Responses that were cut at the limit of tokens


def cut(row):
    return row.model_copy(update={"finish": "length"})


def cut_pool(*, gold=False, samples=()):
    """Gold and three samples, of which those named are cut; the judge likes "a" best, then gold, "b", "c"."""
    rows = [rollout("gold", -1, source="gold"), *samples_of(["a", "b", "c"])]
    return [cut(row) if row.text in samples or (gold and row.is_gold) else row for row in rows]


LIKED = {"a": 6, "gold": 5, "b": 4, "c": 1}
BEATS = {("a", "gold"): 1.0, ("a", "b"): 1.0, ("a", "c"): 1.0, ("gold", "b"): 1.0, ("gold", "c"): 1.0, ("b", "c"): 1.0}
BY_POINTS = {"reward": "score", "positive_floor": 1.0, "margin": 0.5, "student_margin": 0.5}


@pytest.mark.parametrize("rule", ["all", "large_margin", "restrictive", "best_worst", "verdict", "spin", "matching"])
@pytest.mark.parametrize("kind", ["wins", "scores"])
@pytest.mark.parametrize("target", ["hard", "soft"])
def test_a_cut_sample_is_never_chosen_and_cut_gold_is_in_no_pair(rule, kind, target):
    rollouts = cut_pool(gold=True, samples=("a",))
    pairing = {"rule": rule, **(BY_POINTS if kind == "scores" else {"positive_floor": 0.1, "margin": 0.1})}
    if kind == "wins":
        pairing |= {"opponents": "pool", "student_margin": 0.1}
    config = make_config(kind="oracle" if kind == "wins" else "openai", pairing=pairing, loss={"target": target})
    made = made_of(config, rollouts, **({"scores": LIKED} if kind == "scores" else {"wins": BEATS}))
    found = texts_of(made, rollouts)
    assert not [names for names in found if names[0] == "a" or "gold" in names]
    assert made.dropped["gold cut at the limit"] == 1
    if rule in ("all", "large_margin", "verdict"):
        assert set(found) == {("b", "a"), ("c", "a"), ("b", "c")}
    assert made.verdicts()["cut"] == {"gold": 1.0, "samples": 0.3333}


@pytest.mark.parametrize(
    ("fate", "expected"),
    [
        ("keep", {("a", "gold"), ("a", "b"), ("a", "c"), ("gold", "b"), ("gold", "c"), ("b", "c")}),
        ("negative", {("b", "a"), ("c", "a"), ("b", "gold"), ("c", "gold"), ("b", "c")}),
        ("drop", {("b", "c")}),
        (None, {("b", "a"), ("c", "a"), ("b", "c")}),
    ],
)
def test_what_becomes_of_cut_responses_is_a_setting(fate, expected):
    rollouts = cut_pool(gold=True, samples=("a",))
    made = made_of(make_config(kind="openai", pairing={"cut": fate, **BY_POINTS}), rollouts, scores=LIKED)
    assert set(texts_of(made, rollouts)) == expected


def test_where_all_is_cut_nothing_is_trained_on_and_the_way_on_is_named(tmp_path, capsys):
    config = make_config(tmp_path / "run", sampling={"max_new_tokens": 8}, iterations=1)
    rollouts = [cut(row) for row in samples_of(["a", "b", "c"])]
    run_dir = RunDir(config.run_dir)
    write_lines_atomically(
        run_dir.prompts_path(0),
        [Prompt(prompt_id="q", messages=(Message(role="user", content="?"),)).model_dump_json()],
    )
    for name, rows in (("sample", rollouts), ("annotate", [judged(rollouts, scores={"a": 6, "b": 4, "c": 1})])):
        stage = run_dir.stage(name, 0)
        stage.write_shard("0000000", rows)
        stage.finish(config, inputs={}, rows=len(rows), seconds=0.0)
    with pytest.raises(DnoError, match=r"no pair passed .* raise sampling\.max_new_tokens, or set pairing\.cut=keep"):
        run_stage(pair, config, 0)
    said = capsys.readouterr()
    assert "warning: pair 0: cut at sampling.max_new_tokens=8: 100 % of samples" in said.out + said.err
