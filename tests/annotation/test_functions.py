"""Preference functions: planted preferences come back in whatever order, and only answers become numbers."""

from __future__ import annotations

import itertools
import json
import math
import random

import numpy as np
import pytest

from dno_jax.annotation.judges.functions import Ensemble, ListWise, PairWise, build_function
from dno_jax.annotation.judges.schedules import num_questions
from dno_jax.annotation.pool import Candidate, Pool, presentation_order
from dno_jax.annotation.question import Reply, Unparsable, Verdict
from dno_jax.config import AnnotationSection, OpenAISection
from dno_jax.errors import DnoError
from dno_jax.preferences import ScoredCandidate, check_preference_matrix, verdict_pairs
from tests.annotation.planted import answer, decided, graded, pool_of, run, run_with, weighed

LISTWISE = OpenAISection()
PAIRWISE = OpenAISection(form="pairwise")
LOGPROB = OpenAISection(form="logprob")
TOURNAMENT = OpenAISection(form="pairwise", schedule="tournament")


def judge(section, *, seed=0):
    return build_function(AnnotationSection(kind="openai", openai=section), seed=seed)


def worth(text):
    """What a planted judge goes by: the number in the text."""
    return int(text.split("#")[1])


def noiseless(prompt, candidates, question):
    """Says what is planted, in whichever form it is asked."""
    values = [worth(text) for text in candidates]
    if question.asked.form == "listwise":
        return graded([1 + value for value in values])
    first, second = values
    if question.asked.form == "pairwise":
        return decided("first" if first > second else "second" if second > first else "tie")
    return weighed(1.0 / (1.0 + math.exp(second - first)))


def always_first(prompt, candidates, question):
    if question.asked.form == "listwise":
        return graded([6] + [3] * (len(candidates) - 1))
    return decided("first") if question.asked.form == "pairwise" else weighed(1.0)


def pools(count, size=6):
    """Pools whose candidates are worth 0 .. size - 1, in random order."""
    for number in range(count):
        values = random.Random(number).sample(range(size), size)
        yield (
            values,
            pool_of([f"answer #{value}" for value in values], prompt_id=f"p{number}", prompt=f"What is {number}?"),
        )


def pairs_of(judgement):
    candidates = [ScoredCandidate(name, reward=0.0) for name in judgement.candidate_ids]
    return verdict_pairs(candidates, np.asarray(judgement.wins), keep_ties=False)[0]


# Planted preferences.


def test_listwise_scores_are_the_planted_ones_for_every_prompt():
    function, orders = judge(LISTWISE), set()
    for values, pool in pools(1000):
        judgement, ((question,),) = run(function, pool, noiseless)
        assert judgement.state == "ok"
        assert judgement.scores == tuple(1.0 + value for value in values)
        assert judgement.wins is None
        assert [(one.order, one.state) for one in judgement.answers] == [(question.order, "ok")]
        assert judgement.answers[0].scores == tuple(1.0 + values[index] for index in question.order)
        orders.add(question.order)
    assert len(orders) > 500  # of 720: the places are drawn


@pytest.mark.parametrize(
    ("section", "count"),
    [
        pytest.param(PAIRWISE, 30, id="pairwise"),
        pytest.param(LOGPROB, 30, id="logprob"),
        pytest.param(PAIRWISE, 1000, id="pairwise, 1,000 prompts", marks=pytest.mark.slow),
        pytest.param(LOGPROB, 1000, id="logprob, 1,000 prompts", marks=pytest.mark.slow),
    ],
)
def test_every_pair_comes_out_as_planted_for_every_prompt(section, count):
    function = judge(section)
    for values, pool in pools(count):
        judgement, (questions,) = run(function, pool, noiseless)
        assert len(questions) == num_questions(section, num_candidates=6) == len(judgement.answers)
        wins = check_preference_matrix(np.asarray(judgement.wins))
        assert np.array_equal(wins > 0.5, np.greater.outer(values, values))
        if section is LOGPROB:
            np.testing.assert_allclose(wins, 1 / (1 + np.exp(-np.subtract.outer(values, values))), atol=1e-12)


def test_a_tournament_finds_the_best_and_states_nothing_false():
    function, stated = judge(TOURNAMENT), []
    for values, pool in pools(60):
        judgement, rounds = run(function, pool, noiseless)
        assert [len(questions) for questions in rounds] == [6, 2, 2]  # 3, 1, 1 pairs, in both orders
        wins = np.asarray(judgement.wins)
        best = values.index(5)
        assert (np.delete(wins[best], best) == 1.0).all()
        assert not ((wins > 0.5) & ~np.greater.outer(values, values)).any()
        stated.append(int((wins > 0.5).sum()))
    # Of 15: the champion's 5, and what follows for those whom it met, in its own branch or in the other.
    assert set(stated) == {7, 9}


def test_equal_candidates_tie():
    for section in (PAIRWISE, LOGPROB, TOURNAMENT):
        judgement, _ = run(judge(section), pool_of(["a #1", "b #1", "c #1"]), noiseless)
        assert judgement.state == "ok"
        assert {answer.state for answer in judgement.answers} == {"tie"}
        assert judgement.wins == ((0.5,) * 3,) * 3
        assert not pairs_of(judgement)


# Order.


@pytest.mark.parametrize("section", [PAIRWISE, LOGPROB, TOURNAMENT], ids=["pairwise", "logprob", "tournament"])
def test_a_judge_that_always_says_first_yields_ties_and_no_pairs(section):
    for _, pool in pools(10):
        judgement, _ = run(judge(section), pool, always_first)
        assert judgement.wins == ((0.5,) * 6,) * 6
        assert not pairs_of(judgement)
        assert {answer.scores for answer in judgement.answers} == {(1.0, 0.0)}  # its bias stays to be seen


@pytest.mark.parametrize("num_orders", [6, 12])
def test_over_whole_turns_a_place_is_worth_nothing_in_points(num_orders):
    for _, pool in pools(10):
        judgement, _ = run(judge(OpenAISection(num_orders=num_orders)), pool, always_first)
        assert len({answer.order for answer in judgement.answers}) == num_orders
        assert judgement.scores == (3.5,) * 6  # no margin, hence no pair


def test_over_many_orders_a_place_is_worth_nothing_in_points():
    points = np.zeros(6)
    function = judge(OpenAISection(num_orders=2))
    for _, pool in pools(200):
        judgement, _ = run(function, pool, always_first)
        assert set(judgement.scores) <= {3.0, 4.5, 6.0}
        points += judgement.scores
    # 3 more for one in six: a mean of 3.5, give or take 0.08.
    assert np.abs(points / 200 - 3.5).max() < 0.25


def biased(prompt, candidates, question):
    """Of equals, says "first" in 60 of 100 cases; a better candidate has the odds on its side."""
    first, second = (worth(text) for text in candidates)
    chance = 1 / (1 + (40 / 60) * math.exp(0.5 * (second - first)))
    return decided("first" if random.Random(question.key).random() < chance else "second")


@pytest.mark.parametrize("both_orders", [True, False], ids=["both orders", "one order"])
def test_a_judge_with_a_60_to_40_bias_recovers_the_order_on_average(both_orders):
    function = judge(OpenAISection(form="pairwise", both_orders=both_orders))
    total, firsts, asked, count = np.zeros((6, 6)), 0.0, 0, 320
    for values, pool in pools(count):
        judgement, _ = run(function, pool, biased)
        place = np.argsort(values)
        total += np.asarray(judgement.wins)[np.ix_(place, place)]
        firsts += sum(answer.scores[0] for answer in judgement.answers)
        asked += len(judgement.answers)
    mean = total / count
    assert (mean[np.tril_indices(6, -1)] > 0.5).all()  # row better than column
    rates = mean.mean(axis=1)
    # Neighbours are 0.09 apart or more, give or take 0.017 in one order.
    assert (np.diff(rates) > 0.05).all()
    assert 0.53 < firsts / asked < 0.61  # and the bias shows in the answers: 0.572 is expected


def test_the_order_is_drawn_by_ids_not_by_place():
    texts = [f"answer #{value}" for value in range(4)]
    pool = pool_of(texts)
    turned = Pool(pool.prompt, pool.candidates[::-1])
    for section in (LISTWISE, PAIRWISE, LOGPROB, TOURNAMENT, OpenAISection(form="pairwise", both_orders=False)):
        keys = [
            {question.key for question in itertools.chain(*run(judge(section), own, noiseless)[1])}
            for own in (pool, turned)
        ]
        assert keys[0] == keys[1]


def test_orders_of_a_list_differ_and_the_first_is_the_only_one_of_before():
    (pool,) = (pool for _, pool in pools(1))
    one = run(judge(LISTWISE, seed=7), pool, noiseless)[1][0]
    three = run(judge(OpenAISection(num_orders=3), seed=7), pool, noiseless)[1][0]
    assert one[0].order == presentation_order(pool, seed=7) == three[0].order
    assert one[0].key == three[0].key
    assert len({question.order for question in three}) == 3
    pair = pool_of(["a #0", "b #1"])
    both = run(judge(OpenAISection(num_orders=9)), pair, noiseless)[1][0]
    assert sorted(question.order for question in both) == [(0, 1), (1, 0)]
    other = run(judge(LISTWISE, seed=8), pool, noiseless)[1][0]
    assert other[0].order not in {question.order for question in three}


def test_points_are_averaged_over_orders():
    pool = pool_of(["a #0", "b #1", "c #2"])
    judgement, ((first, second),) = run(
        judge(OpenAISection(num_orders=2)), pool, lambda p, shown, q: graded([1 + 2 * i for i in range(3)])
    )
    expected = [(first.order.index(i) + second.order.index(i)) * 1.0 + 1.0 for i in range(3)]
    assert judgement.scores == tuple(expected)
    assert json.loads(judgement.raw) == [graded([1, 3, 5])] * 2


def test_one_order_shows_each_candidate_first_half_the_time():
    function = judge(OpenAISection(form="pairwise", both_orders=False))
    shown_first = np.zeros(6)
    for _, pool in pools(40):
        _, (questions,) = run(function, pool, noiseless)
        assert len(questions) == 15
        for question in questions:
            shown_first[question.order[0]] += 1
    assert np.abs(shown_first / 40 - 2.5).max() < 0.5  # 0.18 would be one deviation


# What is asked.


def test_what_a_request_holds():
    pool = pool_of(["a #0", "b #1"])
    body = run(judge(LISTWISE), pool, noiseless)[1][0][0].body
    assert set(body) == {"model", "messages", "max_tokens", "temperature", "seed"}
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("gpt-4.1-mini", 2048, 0.0)
    assert isinstance(body["seed"], int)
    assert 0 <= body["seed"] < 2**31
    plain = OpenAISection(temperature=None, send_seed=False, max_tokens_field="max_completion_tokens", max_tokens=9)
    assert set(run(judge(plain), pool, noiseless)[1][0][0].body) == {"model", "messages", "max_completion_tokens"}
    token = run(judge(OpenAISection(form="logprob", max_tokens=99)), pool, noiseless)[1][0][0]
    assert token.body["max_tokens"] == 1
    assert token.body["logprobs"] is True
    assert token.body["top_logprobs"] == 5
    assert token.schema is None
    json.dumps(token.body)


def test_schemas_demand_the_whole_reply_and_reasons_first():
    pool = pool_of(["a #0", "b #1", "c #2"])
    (question,) = run(judge(LISTWISE), pool, noiseless)[1][0]
    entry = {
        "type": "object",
        "properties": {"justification": {"type": "string"}, "score": {"type": "integer", "enum": [1, 2, 3, 4, 5, 6]}},
        "required": ["justification", "score"],
        "additionalProperties": False,
    }
    names = ["1", "2", "3"]
    assert question.schema == {
        "type": "object",
        "properties": dict.fromkeys(names, entry),
        "required": names,
        "additionalProperties": False,
    }
    assert list(question.schema["properties"]["1"]["properties"]) == ["justification", "score"]
    pair = run(judge(PAIRWISE), pool, noiseless)[1][0][0].schema
    assert list(pair["properties"]) == pair["required"] == ["justification", "verdict"]
    assert pair["properties"]["verdict"] == {"type": "string", "enum": ["first", "second", "tie"]}
    assert pair["additionalProperties"] is False


def keys_of(section, pool, *, seed=0, repeat=0):
    _, rounds = run(judge(section, seed=seed), pool, noiseless, repeat=repeat)
    return [question.key for question in itertools.chain(*rounds)]


def test_keys_are_the_same_in_every_run_and_differ_where_answers_may():
    (pool,) = (pool for _, pool in pools(1, size=3))
    base = keys_of(PAIRWISE, pool)
    assert len(set(base)) == 6
    assert keys_of(PAIRWISE, pool) == base
    changes = [
        {"model": "other"},
        {"temperature": 0.5},
        {"max_tokens": 99},
        {"send_seed": False},
        {"form": "logprob"},
        {"form": "listwise"},
    ]
    for change in changes:
        assert not set(base) & set(keys_of(PAIRWISE.model_copy(update=change), pool)), change
    assert not set(base) & set(keys_of(PAIRWISE, pool, repeat=1))
    assert not set(base) & set(keys_of(PAIRWISE, pool, seed=1))  # sent with each request
    unseeded = OpenAISection(form="pairwise", send_seed=False)
    assert keys_of(unseeded, pool) == keys_of(unseeded, pool, seed=1)  # the order stands in the request
    assert not set(keys_of(unseeded, pool)) & set(keys_of(unseeded, pool, repeat=1))
    for change in ({"base_url": "http://there/v1"}, {"max_concurrency": 1}, {"max_tries": 1}, {"structured": "none"}):
        assert keys_of(PAIRWISE.model_copy(update=change), pool) == base, change


def test_a_verdict_on_the_same_pair_in_the_same_order_serves_every_schedule():
    (pool,) = (pool for _, pool in pools(1))
    everything = set(keys_of(PAIRWISE, pool))
    assert set(keys_of(TOURNAMENT, pool)) < everything
    assert set(keys_of(OpenAISection(form="pairwise", both_orders=False), pool)) < everything
    fewer = Pool(pool.prompt, pool.candidates[1:4])
    assert set(keys_of(PAIRWISE, fewer)) < everything


def test_the_identity_says_what_changes_a_judgement():
    base = judge(PAIRWISE).identity
    for part in ("gpt-4.1-mini", "pairwise", "pairwise_verdict@1#", "temperature=0.0", "max_tokens=2048", "all_pairs"):
        assert part in base
    changes = [
        {"model": "other"},
        {"temperature": None},
        {"max_tokens": 9},
        {"both_orders": False},
        {"schedule": "tournament"},
        {"send_seed": False},
    ]
    others = {judge(PAIRWISE.model_copy(update=change)).identity for change in changes}
    others |= {judge(PAIRWISE, seed=1).identity, judge(LOGPROB).identity, judge(LISTWISE).identity}
    others |= {judge(OpenAISection(num_orders=2)).identity}
    assert len(others - {base}) == len(changes) + 4
    assert judge(PAIRWISE.model_copy(update={"base_url": "http://there", "batch": True})).identity == base


# No answer.


def broken(state, where=lambda question: True):
    def verdict(question):
        if where(question):
            return Verdict(state, raw="what it said", detail=f"why {state}")
        return Verdict("ok", scores=(1.0,) * len(question.order))

    return verdict


OTHERS = TOURNAMENT.model_copy(update={"model": "another"})
ENSEMBLE = AnnotationSection(kind="ensemble", ensemble=(LISTWISE, PAIRWISE, OTHERS))


@pytest.mark.parametrize(
    "change",
    [{"base_url": "http://there"}, {"schedule": "tournament"}, {"batch": True}, {"rubric": "pairwise_verdict"}],
    ids=lambda change: next(iter(change)),
)
def test_an_ensemble_does_not_count_one_verdict_twice(change):
    again = PAIRWISE.model_copy(update=change)
    with pytest.raises(ValueError, match=r"ensemble: 1 and 2 ask 'gpt-4.1-mini' the same.*--served-model-name"):
        AnnotationSection(kind="ensemble", ensemble=(LISTWISE, PAIRWISE, again))
    for other in ({"temperature": 0.5}, {"max_tokens": 7}, {"send_seed": False}, {"model": "another"}):
        AnnotationSection(kind="ensemble", ensemble=(LISTWISE, PAIRWISE, again.model_copy(update=other)))


@pytest.mark.parametrize("state", ["refused", "unparsable", "failed", "over budget"])
@pytest.mark.parametrize(
    "section",
    [*(AnnotationSection(openai=own, kind="openai") for own in (LISTWISE, PAIRWISE, LOGPROB, TOURNAMENT)), ENSEMBLE],
    ids=["listwise", "pairwise", "logprob", "tournament", "ensemble"],
)
def test_without_an_answer_there_is_a_state_and_no_number(section, state):
    function = build_function(section, seed=0)
    (pool,) = (pool for _, pool in pools(1))
    judgement, rounds = run_with(function, pool, broken(state))
    assert (judgement.state, judgement.detail) == (state, f"why {state}")
    assert judgement.scores is judgement.wins is None
    assert len(rounds) == 1
    assert {answer.state for answer in judgement.answers} == {state}
    # One question of many is enough.
    last = rounds[0][-1].key
    judgement, rounds = run_with(function, pool, broken(state, lambda question: question.key == last))
    assert judgement.state == state
    assert judgement.scores is judgement.wins is None
    assert [one.state for one in judgement.answers] == [
        state if question.key == last else "ok" for question in rounds[0]
    ]


def test_of_several_reasons_the_one_that_is_least_the_judges_is_told():
    states = ["refused", "unparsable", "over budget", "failed"]
    pool = pool_of(["a", "b", "c"])
    keys = [question.key for question in run_with(judge(PAIRWISE), pool, broken("failed"))[1][0]]
    for worst in range(1, 4):
        planted = {key: states[number % (worst + 1)] for number, key in enumerate(keys)}
        judgement, _ = run_with(
            judge(PAIRWISE), pool, lambda question, own=planted: broken(own[question.key])(question)
        )
        assert (judgement.state, judgement.detail) == (states[worst], f"why {states[worst]}")


def test_a_tournament_without_its_final_is_no_judgement():
    (pool,) = (pool for _, pool in pools(1))
    final = {question.key for question in run(judge(TOURNAMENT), pool, noiseless)[1][-1]}

    def verdict(question):
        return broken("failed")(question) if question.key in final else answer(question, noiseless)

    judgement, rounds = run_with(judge(TOURNAMENT), pool, verdict)
    assert [len(questions) for questions in rounds] == [6, 2, 2]
    assert judgement.state == "failed"
    assert judgement.wins is None
    assert [one.state for one in judgement.answers] == ["ok"] * 8 + ["failed"] * 2


def test_a_reply_that_was_cut_is_no_answer():
    pool = pool_of(["a #0", "b #1"])
    for section, text in ((LISTWISE, graded([1, 2])), (PAIRWISE, decided("first"))):
        question = run(judge(section), pool, noiseless)[1][0][0]
        assert question.read(Reply(text=text, finish="stop"))
        with pytest.raises(Unparsable, match="cut"):
            question.read(Reply(text=text, finish="length"))
        with pytest.raises(Unparsable):
            question.read(Reply(text=None, finish="stop"))
    question = run(judge(LOGPROB), pool, noiseless)[1][0][0]
    with pytest.raises(Unparsable, match="form=logprob needs an endpoint"):
        question.read(Reply(text="m", finish="length"))


# Several judges.


def test_an_ensemble_is_the_mean_of_its_members():
    sections = (LISTWISE, PAIRWISE, OpenAISection(form="pairwise", model="contrary"))
    ensemble = build_function(AnnotationSection(kind="ensemble", ensemble=sections), seed=0)
    assert isinstance(ensemble, Ensemble)

    def mind(prompt, candidates, question):
        if question.asked.model != "contrary":
            return noiseless(prompt, candidates, question)
        return noiseless(prompt, candidates[::-1], question)

    for values, pool in pools(10, size=4):
        judgement, (questions,) = run(ensemble, pool, mind)
        assert len(questions) == 1 + 12 + 12 == len(judgement.answers)
        assert len({answer.judge for answer in judgement.answers}) == 3
        assert len(json.loads(judgement.raw)) == 25
        better = np.greater.outer(values, values)
        expected = np.where(better, 2 / 3, 1 / 3)
        np.fill_diagonal(expected, 0.5)
        np.testing.assert_allclose(check_preference_matrix(np.asarray(judgement.wins)), expected)
        assert judgement.scores is None


def test_members_of_an_ensemble_may_take_several_rounds():
    for values, pool in pools(5):
        judgement, rounds = run(build_function(ENSEMBLE, seed=0), pool, noiseless)
        assert [len(questions) for questions in rounds] == [1 + 30 + 6, 2, 2]
        alone = [
            run(build_function(AnnotationSection(kind="openai", openai=own), seed=0), pool, noiseless)[0]
            for own in ENSEMBLE.ensemble
        ]
        by_points = 0.5 * (1 + np.sign(np.subtract.outer(values, values)))
        expected = np.mean([by_points, *(own.wins for own in alone[1:])], axis=0)
        np.testing.assert_allclose(judgement.wins, expected)
        best = values.index(5)
        assert (np.delete(np.asarray(judgement.wins)[best], best) == 1.0).all()


def test_equal_points_are_half_a_win_each_in_an_ensemble():
    sections = (LISTWISE, OpenAISection(model="other"))
    ensemble = build_function(AnnotationSection(kind="ensemble", ensemble=sections), seed=0)
    judgement, _ = run(ensemble, pool_of(["a #1", "b #1", "c #0"]), noiseless)
    assert judgement.wins == ((0.5, 0.5, 1.0), (0.5, 0.5, 1.0), (0.0, 0.0, 0.5))


# What is built.


def test_the_configuration_says_what_is_built():
    assert isinstance(judge(LISTWISE), ListWise)
    assert all(isinstance(judge(section), PairWise) for section in (PAIRWISE, LOGPROB, TOURNAMENT))
    with pytest.raises(DnoError, match="kind=oracle: asks no language model"):
        build_function(AnnotationSection(), seed=0)


@pytest.mark.parametrize(
    ("form", "rubric", "needed"),
    [
        ("listwise", "pairwise_verdict", "It is a pairwise rubric; needed here is a list-wise one"),
        ("listwise", "additive_5point", "It is a point-wise rubric"),
        ("pairwise", "listwise_6point", "It is a list-wise rubric; needed here is a pairwise one"),
        ("pairwise", "pairwise_token", "It is a one-token rubric; needed here is a pairwise one"),
        ("logprob", "pairwise_verdict", "It is a pairwise rubric; needed here is a one-token one"),
        ("logprob", "nonesuch", "cannot be read"),
    ],
)
def test_a_rubric_of_another_form_is_refused_by_name(form, rubric, needed):
    with pytest.raises(DnoError, match=needed) as caught:
        judge(OpenAISection(form=form, rubric=rubric))
    assert f"annotation.openai.rubric {rubric!r}" in str(caught.value)
    sections = (LISTWISE, OpenAISection(form=form, rubric=rubric))
    with pytest.raises(DnoError, match=r"annotation\.ensemble\.1\.rubric"):
        build_function(AnnotationSection(kind="ensemble", ensemble=sections), seed=0)


def test_the_prefix_that_a_candidate_continues_is_shown_with_it():
    pool = pool_of(["a #0", "b #1"])
    prefixed = Pool(pool.prompt, tuple(Candidate(own.candidate_id, "Well: " + own.text) for own in pool.candidates))
    seen = []
    run(judge(PAIRWISE), prefixed, lambda p, shown, q: seen.append(shown) or decided("first"))
    assert seen == [["Well: a #0", "Well: b #1"], ["Well: b #1", "Well: a #0"]]
