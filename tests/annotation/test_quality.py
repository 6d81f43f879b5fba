"""Figures of judges whose faults are known, in closed form where there is one."""

from __future__ import annotations

import json
import random
from itertools import combinations

import numpy as np
import pytest

from dno_jax.annotation.quality.figures import Quality, Response
from dno_jax.annotation.quality.histogram import histogram
from dno_jax.annotation.quality.warnings import CHECKS, warnings
from dno_jax.config import QualitySection
from dno_jax.records import Answer, Judgement

SECTION = QualitySection()


def pairwise(judge, *, prompt="p", count=2, pairs=None, both=True):
    """A judgement by `judge(first, second) -> P(first shown is better)`, of indices, in both orders."""
    wins, answers = np.full((count, count), 0.5), []
    for row, column in pairs or combinations(range(count), 2):
        found = []
        for order in ((row, column), (column, row))[: 1 + both]:
            p = float(judge(*order))
            answers.append(Answer(order=order, state="tie" if p == 0.5 else "ok", scores=(p, 1.0 - p), judge="j"))
            found.append(p if order == (row, column) else 1.0 - p)
        wins[row, column] = sum(found) / len(found)
        wins[column, row] = 1.0 - wins[row, column]
    return verdict(prompt, count, wins=tuple(map(tuple, wins.tolist())), answers=tuple(answers))


def listwise(*lists, prompt="p"):
    """A judgement of (order, scores as shown), averaged."""
    answers = tuple(Answer(order=order, state="ok", scores=scores, judge="j") for order, scores in lists)
    count = len(lists[0][0])
    points = [sum(scores[order.index(i)] for order, scores in lists) / len(lists) for i in range(count)]
    return verdict(prompt, count, scores=tuple(points), answers=answers)


def verdict(prompt, count, **what):
    names = tuple(f"{prompt}/{i}" for i in range(count))
    return Judgement(prompt_id=prompt, candidate_ids=names, judge="j", state="ok", **what)


def responses(judgement, *, words=None, sources=None):
    count = len(judgement.candidate_ids)
    told = zip(words or [10] * count, sources or ["policy"] * count, strict=True)
    return dict(zip(judgement.candidate_ids, (Response(*one) for one in told), strict=True))


def figures(*judgements, **told):
    quality = Quality()
    for judgement in judgements:
        quality.add(judgement, responses=responses(judgement, **told))
    return quality.figures()


def value(found, name):
    return found[name]["value"], found[name]["n"]


def by_index(first, second):
    return float(first < second)


def test_a_judge_without_faults():
    found = figures(*(pairwise(by_index, prompt=str(i), count=4) for i in range(50)), words=[5, 9, 5, 9])
    assert value(found, "flip_rate") == (0.0, 50 * 6)
    assert value(found, "tie_rate") == (0.0, 50 * 6)
    assert value(found, "answer_tie_rate") == (0.0, 50 * 12)
    assert value(found, "first_wins") == (0.5, 50 * 12)
    assert value(found, "cyclic_share") == (0.0, 50 * 4)
    # Unequal lengths are 0-1, 0-3, 1-2 and 2-3; the lower index wins, which is the longer one in 1-2 alone.
    assert value(found, "longer_wins") == (0.25, 50 * 4)
    assert found["answers"] == {"ok": 600}
    assert "gold_wins" not in found
    assert "points_by_position" not in found
    assert warnings(found, SECTION) == []


def test_a_judge_that_always_says_first():
    found = figures(*(pairwise(lambda first, second: 1.0, prompt=str(i), count=3) for i in range(40)))
    assert value(found, "first_wins") == (1.0, 40 * 6)
    assert value(found, "flip_rate") == (1.0, 40 * 3)
    assert value(found, "tie_rate") == (1.0, 40 * 3)  # its two answers to a pair average to a tie
    assert value(found, "answer_tie_rate") == (0.0, 40 * 6)
    assert "longer_wins" not in found  # nothing is decided
    assert "cyclic_share" not in found
    named = " ".join(warnings(found, SECTION))
    assert len(warnings(found, SECTION)) == 1  # flips and ties follow from it
    assert all(name in named for name in ("order-flip rate", "tie rate", "P(first shown wins)"))


def test_a_judge_that_says_tie():
    found = figures(*(pairwise(lambda first, second: 0.5, prompt=str(i)) for i in range(40)))
    assert value(found, "tie_rate") == (1.0, 40)
    assert value(found, "answer_tie_rate") == (1.0, 80)
    assert "flip_rate" not in found
    assert "first_wins" not in found
    assert found["answers"] == {"tie": 80}
    assert [sentence.split(" is ")[0] for sentence in warnings(found, SECTION)] == ["tie rate"]


def test_a_tie_in_one_order_is_no_contradiction():
    found = figures(pairwise(lambda first, second: 1.0 if first == 0 else 0.5))
    assert "flip_rate" not in found
    assert value(found, "tie_rate") == (0.0, 1)
    assert value(found, "answer_tie_rate") == (0.5, 2)
    assert value(found, "first_wins") == (1.0, 1)


@pytest.mark.parametrize("shown_first", [0.6, 0.4])
def test_a_sixty_forty_bias_lies_in_its_interval_and_is_named(shown_first):
    draw = random.Random(1)
    coin = lambda first, second: float(draw.random() < shown_first)  # noqa: E731
    found = figures(*(pairwise(coin, prompt=str(i)) for i in range(1000)))
    assert found["first_wins"]["low"] < shown_first < found["first_wins"]["high"]
    # Both orders say "first" or both say "second": 0.36 + 0.16.
    assert found["flip_rate"]["low"] < 0.52 < found["flip_rate"]["high"]
    (named,) = [sentence for sentence in warnings(found, SECTION) if "P(first shown wins)" in sentence]
    assert "over 2,000 decided comparisons" in named
    assert "max_first_rate_error" in named
    assert f"{found['first_wins']['value']:.2f}" in named


def test_a_sixty_forty_bias_on_top_of_true_preferences_is_named():
    """A fifth of the answers go by place alone: the order is recovered on average, the bias is not hidden."""
    draw = random.Random(2)
    biased = lambda first, second: 1.0 if draw.random() < 0.2 else by_index(first, second)  # noqa: E731
    found = figures(*(pairwise(biased, prompt=str(i), count=3) for i in range(400)))
    assert found["first_wins"]["value"] == pytest.approx(0.6, abs=0.02)
    assert any("P(first shown wins)" in sentence for sentence in warnings(found, SECTION))


def test_few_answers_warn_of_nothing():
    """Three of three flips are far over the limit, and no evidence where a prompt is one witness."""
    found = figures(pairwise(lambda first, second: 1.0, count=3))
    assert value(found, "flip_rate") == (1.0, 3)
    assert found["flip_rate"]["prompts"] == 1
    assert warnings(found, SECTION) == []


def test_a_judge_of_length():
    longest = lambda first, second: float(first > second)  # noqa: E731
    judged = [pairwise(longest, prompt=str(i), count=3) for i in range(40)]
    found = figures(*judged, words=[5, 7, 9])
    assert value(found, "longer_wins") == (1.0, 120)
    assert [sentence.split(" is ")[0] for sentence in warnings(found, SECTION)] == ["P(longer wins)"]
    assert "longer_wins" not in figures(*judged, words=[7, 7, 7])


def test_a_cyclic_judge():
    cycle = lambda first, second: float((second - first) % 3 == 1)  # noqa: E731
    found = figures(*(pairwise(cycle, prompt=str(i), count=3) for i in range(40)))
    assert value(found, "cyclic_share") == (1.0, 40)
    assert value(found, "flip_rate") == (0.0, 120)
    assert [sentence.split(" is ")[0] for sentence in warnings(found, SECTION)] == ["share of cyclic triples"]


def test_triples_with_an_undecided_pair_do_not_count():
    """0 > 1 > 2 > 0 is a cycle; candidate 3 ties with 0, and so stands in one decided triple of three."""
    table = {(0, 1): 1.0, (1, 2): 1.0, (0, 2): 0.0, (0, 3): 0.5, (1, 3): 1.0, (2, 3): 1.0}
    judge = lambda first, second: table[first, second] if first < second else 1.0 - table[second, first]  # noqa: E731
    assert value(figures(pairwise(judge, count=4)), "cyclic_share") == (0.5, 2)


def test_what_a_schedule_infers_is_no_verdict():
    """0 beat 1 and 1 beat 2; the chain says 0 over 2 too, but nobody was asked."""
    judged = pairwise(by_index, count=3, pairs=[(0, 1), (1, 2)])
    wins = [list(row) for row in judged.wins]
    wins[0][2], wins[2][0] = 1.0, 0.0
    judged = judged.model_copy(update={"wins": tuple(map(tuple, wins))})
    found = figures(judged, words=[1, 1, 2])
    assert value(found, "tie_rate") == (0.0, 2)
    assert value(found, "longer_wins") == (0.0, 1)
    assert "cyclic_share" not in found


def test_lists_in_two_orders():
    # The first shown gets a point too many: 0 has 4 or 5, 1 has 3, 2 has 4 or 5.
    judged = listwise(((0, 1, 2), (5.0, 3.0, 4.0)), ((2, 1, 0), (5.0, 3.0, 4.0)))
    found = figures(judged, words=[3, 2, 1])
    assert value(found, "flip_rate") == (pytest.approx(1 / 3, abs=1e-4), 3)  # 0 and 2; both beat 1 either way
    assert value(found, "tie_rate") == (pytest.approx(1 / 3, abs=1e-4), 3)  # 0 and 2 on the mean
    assert value(found, "answer_tie_rate") == (0.0, 6)
    assert value(found, "first_wins") == (1.0, 4)
    assert value(found, "first_on_top") == (1.0, 2)
    assert found["first_on_top"]["chance"] == pytest.approx(1 / 3, abs=1e-4)
    assert [place["value"] for place in found["points_by_position"]] == [1.0, -1.0, 0.0]
    assert found["points_by_position"][0]["low"] is None  # one prompt shows no spread
    assert json.loads(json.dumps(found)) == found
    assert value(found, "longer_wins") == (0.5, 2)  # 0 over the shorter 1, 2 over the longer 1
    assert "cyclic_share" not in found  # points have no cycles


def test_a_shared_top_is_shared():
    found = figures(listwise(((0, 1, 2), (4.0, 4.0, 1.0))))
    assert value(found, "first_on_top") == (0.5, 1)
    assert value(found, "first_wins") == (1.0, 1)
    assert value(found, "answer_tie_rate") == (pytest.approx(1 / 3, abs=1e-4), 3)
    assert "flip_rate" not in found


def test_members_of_an_ensemble_may_differ():
    """Two judges that contradict each other are no flip of either."""
    answers = [
        Answer(order=order, state="ok", scores=(1.0, 0.0) if order[0] == best else (0.0, 1.0), judge=judge)
        for judge, best in (("a", 0), ("b", 1))
        for order in ((0, 1), (1, 0))
    ]
    found = figures(verdict("p", 2, wins=((0.5, 0.5), (0.5, 0.5)), answers=tuple(answers)))
    assert value(found, "flip_rate") == (0.0, 2)
    assert value(found, "tie_rate") == (1.0, 1)


def test_scores_by_source_and_gold():
    sources = ["policy", "mixture", "gold", "data"]
    judged = [listwise(((0, 1, 2, 3), (2.0, 3.0, top, 3.0)), prompt=str(i)) for i, top in enumerate((6.0, 3.0))]
    found = figures(*judged, sources=sources)
    # Gold over policy and mixture: 1, 1, then 1 and a tie.
    assert value(found, "gold_wins") == (0.875, 4)
    assert {source: (mean["value"], mean["n"]) for source, mean in found["scores"]["mean"].items()} == {
        "student": (2.5, 4),
        "gold": (4.5, 2),
        "data": (3.0, 2),
    }
    assert found["scores"]["bins"] == {"student": {"2": 2, "3": 2}, "gold": {"3": 1, "6": 1}, "data": {"3": 2}}


def test_wins_are_scored_by_their_mean_in_the_pool():
    found = figures(pairwise(by_index, count=3), sources=["gold", "policy", "policy"])
    assert found["scores"]["mean"]["gold"]["value"] == 1.0
    assert found["scores"]["bins"] == {"gold": {"1": 1}, "student": {"0": 1, "0.5": 1}}


def test_what_is_no_verdict_counts_by_its_answers_alone():
    states = ("ok", "refused")
    answers = tuple(Answer(order=(0, 1), state=s, scores=(1.0, 0.0) if s == "ok" else None) for s in states)
    judged = Judgement(prompt_id="p", candidate_ids=("a", "b"), judge="j", state="refused", answers=answers)
    quality = Quality()
    quality.add(judged, responses={})
    fine = pairwise(by_index)
    quality.add_repeat(judged, judged)
    quality.add_label(judged, 1.0)
    found = quality.figures()
    assert found.pop("calibration_missing")["value"] == 1.0
    assert found == {"answers": {"ok": 1, "refused": 1}}
    with pytest.raises(KeyError):
        quality.add(fine, responses={})


def test_a_verdict_that_rests_on_no_answers_compares_all():
    wins = ((0.5, 1.0, 0.0), (0.0, 0.5, 1.0), (1.0, 0.0, 0.5))
    found = figures(verdict("p", 3, wins=wins), words=[1, 2, 2])
    assert value(found, "cyclic_share") == (1.0, 1)
    assert value(found, "tie_rate") == (0.0, 3)
    assert "answers" not in found
    assert not {"first_wins", "flip_rate", "answer_tie_rate"} & set(found)


def test_repeats():
    quality = Quality()
    first = listwise(((0, 1, 2), (5.0, 3.0, 1.0)))
    # 0-1 becomes a tie, 0-2 turns round, 1-2 turns round; 0 loses its points, 1 keeps them.
    quality.add_repeat(first, listwise(((0, 1, 2), (3.0, 3.0, 4.0))))
    found = quality.figures()
    assert value(found, "repeat_agreement") == (pytest.approx(0.5 / 3, abs=1e-4), 3)
    assert value(found, "repeat_same_score") == (pytest.approx(1 / 3, abs=1e-4), 3)
    with pytest.raises(ValueError, match="same candidates"):
        quality.add_repeat(first, pairwise(by_index))
    for i in range(30):
        quality.add_repeat(pairwise(by_index, prompt=str(i)), pairwise(by_index, prompt=str(i)))
    assert value(quality.figures(), "repeat_agreement") == (pytest.approx(30.5 / 33, abs=1e-4), 33)
    assert quality.figures()["repeat_same_score"]["n"] == 3  # a pairwise judge gives no points


def test_labels():
    quality = Quality()
    for judged, label in ((1.0, 1.0), (0.8, 0.6), (0.5, 0.0), (0.9, 0.2), (0.7, 0.5)):
        quality.add_label(pairwise(lambda first, second, p=judged: p if first == 0 else 1.0 - p), label)
    found = quality.figures()
    assert value(found, "calibration_agreement") == ((1.0 + 1.0 + 0.5 + 0.0) / 4, 4)
    assert value(found, "calibration_error") == (pytest.approx((0.0 + 0.2 + 0.5 + 0.7 + 0.2) / 5), 5)
    with pytest.raises(ValueError, match="of two candidates"):
        quality.add_label(pairwise(by_index), 1.5)
    with pytest.raises(ValueError, match="of two candidates"):
        quality.add_label(pairwise(by_index, count=3), 0.5)


def test_low_agreement_is_named_and_none_silences():
    quality = Quality()
    for i in range(60):
        right, wrong = pairwise(by_index, prompt=str(i)), pairwise(lambda *pair: 1.0 - by_index(*pair), prompt=str(i))
        quality.add_repeat(right, wrong if i % 2 else right)
        quality.add_label(wrong if i % 2 else right, 1.0 if i % 4 < 3 else 0.0)
    found = quality.figures()
    named = [sentence.split(" is ")[0] for sentence in warnings(found, SECTION)]
    assert named == ["agreement with a repeated sample"]  # 0.5; labels: 0.75, over 0.6
    assert warnings(found, QualitySection(min_repeat_agreement=None)) == []
    strict = QualitySection(min_repeat_agreement=None, min_calibration_agreement=0.95)
    (sentence,) = warnings(found, strict)
    assert sentence.startswith("agreement with labelled pairs is 0.75 [")
    assert "over 60 labels, expected at least 0.95 (annotation.quality.min_calibration_agreement)" in sentence


def test_every_threshold_of_the_configuration_has_a_check():
    thresholds = {name for name in QualitySection.model_fields if name.startswith(("max_", "min_"))}
    assert {check.field for check in CHECKS} == thresholds


def test_bins_far_from_zero_are_told_apart():
    found = histogram({"student": [10000 + k / 64 for k in range(10)]})
    assert found["bins"] == {"student": {str(10000 + k / 64).removesuffix(".0"): 1 for k in range(10)}}


def test_the_bin_of_zero_has_one_name():
    assert histogram({"a": [-0.0, 0.0, 0.01], "b": [-0.01]})["bins"] == {"a": {"0": 3}, "b": {"-0.015625": 1}}


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e4])
def test_histograms_are_as_fine_as_24_bins_allow(scale):
    rng = np.random.default_rng(1)
    values = {"a": rng.normal(0.0, scale, size=2000).tolist(), "b": rng.uniform(0, 1, size=500).tolist()}
    found = histogram(values)
    width = found["width"]
    floors = {group: np.floor(np.asarray(own) / width) for group, own in values.items()}
    used = np.unique(np.concatenate(list(floors.values())))
    assert len(used) <= 24
    assert width == 2.0**-6 or len(np.unique(np.floor(np.concatenate(list(values.values())) * 2 / width))) > 24
    for group, floor in floors.items():
        edges, counts = np.unique(floor * width, return_counts=True)
        bins = found["bins"][group]
        assert ([float(edge) for edge in bins], list(bins.values())) == (edges.tolist(), counts.tolist())
    assert json.loads(json.dumps(found)) == found
