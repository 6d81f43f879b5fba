"""Planted defects: each synthetic run raises its own warning and no other, and a sound run none."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest

from dno_jax.annotation.quality.figures import Quality
from dno_jax.config import EvaluationSection, QualitySection
from dno_jax.evaluation.audit import audit
from dno_jax.evaluation.comparisons import Row
from dno_jax.evaluation.matrix import win_rate_matrix
from dno_jax.records import Answer, Judgement, Message, Prompt
from dno_jax.stages.held_out import Players

POLICIES = ("0", "1", "2")
STRENGTH = {"0": 0.0, "1": 0.7, "2": 1.4, "gold": 1.0}


def ranked(first, second):
    return 1.0 / (1.0 + np.exp(STRENGTH[second] - STRENGTH[first]))


def run(*, prompts=200, samples=1, names=(*POLICIES, "gold"), wins=ranked, verdict=None, words=None, judges=("a",),
        repeats=None, seed=0, separate=False, alike=False):  # fmt: skip
    """A run's rows and its judge's figures.

    Args:
        wins: P(first player's response is better).
        verdict: (is the first of the two better, both players, both lengths, draw) -> P(first shown is better).
        words: player -> words of its responses.
        judges: names; a verdict asks each in both orders.
        repeats: how often a second verdict is another draw.
        separate: policy 2 answers prompts of its own, with gold.
        alike: all samples of a prompt are judged alike.
    """
    draw, quality, rows = random.Random(seed), Quality(), []
    for number in range(prompts):
        prompt = Prompt(prompt_id=f"p{number}", messages=(Message(role="user", content="?"),))
        here = names if not separate else (("0", "1") if number % 2 else ("2", "gold"))
        truth = None
        for sample in range(samples):
            texts = {}
            for name in here:
                length = words(name, draw) if words else draw.randrange(20, 60)
                texts[name] = f"{name} {sample} " + "word " * length
            group = Players(prompt, sample, texts)
            if truth is None or not alike:
                truth = {}
                for i, one in enumerate(here):
                    for other in here[i + 1 :]:
                        better = draw.random() < wins(one, other)
                        truth[one, other], truth[other, one] = better, not better
            judged = judgement(group, truth, verdict, judges, draw)
            quality.add(judged, responses=group.responses())
            if repeats is not None:
                again = truth if draw.random() >= repeats else {pair: draw.random() < 0.5 for pair in truth}
                again = {pair: again[pair] if pair < pair[::-1] else not again[pair[::-1]] for pair in again}
                quality.add_repeat(judged, judgement(group, again, verdict, judges, draw))
            rows += group.preferences(judged)
    others = tuple(name for name in names if name not in POLICIES)
    return win_rate_matrix(rows, policies=POLICIES, others=others), quality.figures()


def judgement(group, truth, verdict, judges, draw):
    names = list(group.texts)
    wins, answers = np.full((len(names), len(names)), 0.5), []
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            found = []
            for judge in judges:
                for order in ((i, j), (j, i)):
                    first, second = (names[k] for k in order)
                    lengths = tuple(len(group.texts[name].split()) for name in (first, second))
                    p = float(truth[first, second])
                    if verdict is not None:
                        p = float(verdict(p, (first, second), lengths, draw, judge))
                    state = "tie" if p == 0.5 else "ok"
                    answers.append(Answer(order=order, state=state, scores=(p, 1.0 - p), judge=judge))
                    found.append(p if order == (i, j) else 1.0 - p)
            wins[i, j] = sum(found) / len(found)
            wins[j, i] = 1.0 - wins[i, j]
    return Judgement(
        prompt_id=group.prompt.prompt_id,
        candidate_ids=tuple(f"{name}/{group.sample}" for name in names),
        judge=" ".join(judges),
        state="ok",
        wins=tuple(map(tuple, wins.tolist())),
        answers=tuple(answers),
    )


def ring(first, second):
    """2 > 1 > 0 > 2, and gold is as good as any."""
    if "gold" in (first, second):
        return 0.5
    return 0.7 if (int(first) - int(second)) % 3 == 1 else 0.3


def by_place(p, players, lengths, draw, judge):
    return 1.0 if draw.random() < 0.4 else p


def by_length(p, players, lengths, draw, judge):
    return float(lengths[0] > lengths[1]) if lengths[0] != lengths[1] and hash_of(players, lengths) < 0.8 else p


def hash_of(players, lengths):
    """The same in both orders, so that a taste for length is no taste for places."""
    return random.Random(str(sorted(zip(players, lengths, strict=True)))).random()


def with_ties(p, players, lengths, draw, judge):
    """Policy 1 beats 0 by a little more than 2 does, which ties most of the time, and never loses."""
    pair = set(players)
    if pair == {"2", "0"}:
        tie = hash_of(players, lengths) < 0.7
        return 0.5 if tie else float(players[0] == "2")
    if pair == {"1", "0"}:
        wins = hash_of(players, lengths) < 0.85
        return float((players[0] == "1") == wins)
    return p


def too_many_ties(p, players, lengths, draw, judge):
    return 0.5 if hash_of(players, lengths) < 0.7 else p


def loud(p, players, lengths, draw, judge):
    """Judge c says 1 or 0, by itself; the two others say a little, and what is true."""
    if judge != "c":
        return 0.5 + 0.2 * (p - 0.5)
    draw = hash_of(players, lengths)
    return p if draw >= 0.4 else float((draw < 0.2) == (min(players) == players[0]))


DEFECTS = {
    "none": ({}, None),
    "none, of an ensemble": ({"judges": ("a", "b", "c")}, None),
    "none, repeats": ({"repeats": 0.1}, None),
    "none, samples that differ": ({"samples": 3}, None),
    "place": ({"verdict": by_place}, "P(first shown wins) is"),
    "length": ({"verdict": by_length}, "P(longer wins) is"),
    "ties": ({"verdict": too_many_ties}, "tie rate is"),
    "tie convention": (
        {"verdict": with_ties, "names": POLICIES, "prompts": 700, "wins": lambda *_: 0.5},
        "the ranking depends on how",
    ),
    "cycles": ({"wins": ring}, "cycles among players"),
    "few prompts": ({"prompts": 30}, "30 held-out prompts"),
    "clusters": ({"samples": 4, "alike": True}, "verdicts on one prompt agree"),
    "one loud judge": ({"judges": ("a", "b", "c"), "verdict": loud}, "P(one judge of the ensemble overrules"),
    "disconnected": ({"separate": True}, "players that no comparison joins: 0, 1; 2, gold"),
    "unstable": ({"repeats": 0.7}, "agreement with a repeated sample is"),
}


@functools.cache
def judged(name):
    return run(**DEFECTS[name][0])


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_raises_its_own_warning_and_no_other(name):
    expected = DEFECTS[name][1]
    matrix, figures = judged(name)
    found = audit(matrix, figures, QualitySection(), EvaluationSection())
    if expected is None:
        assert found == []
    else:
        (sentence,) = found
        assert sentence.startswith(expected)
        assert len(sentence) < 420
        assert sentence.endswith(".")


def test_limits_of_none_silence():
    silent = EvaluationSection(min_prompts=None, max_design_effect=None)
    for name in ("few prompts", "clusters"):
        matrix, figures = judged(name)
        assert audit(matrix, figures, QualitySection(), silent) == []


def test_a_matrix_of_one_comparison_warns_of_no_more_than_prompts():
    matrix = win_rate_matrix([Row("p", "1", "0", 1.0)], policies=("0", "1"))
    (sentence,) = audit(matrix, {}, QualitySection(), EvaluationSection())
    assert sentence.startswith("1 held-out prompts")
