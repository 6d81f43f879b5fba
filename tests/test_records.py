import pytest
from pydantic import ValidationError

from dno_jax.records import Judgement


def judgement(**changes):
    row = {"prompt_id": "p", "candidate_ids": ("a", "b"), "judge": "j", "state": "ok", "scores": (5.0, 2.0)}
    return Judgement(**(row | changes))


def test_only_an_answer_carries_numbers():
    assert judgement().scores == (5.0, 2.0)
    for state in ("refused", "unparsable", "failed"):
        assert judgement(state=state, scores=None).scores is None
        with pytest.raises(ValidationError, match="no answer"):
            judgement(state=state)


@pytest.mark.parametrize(
    "changes",
    [
        {"scores": None},
        {"scores": (1.0,)},
        {"scores": None, "wins": ((0.5, 1.0),)},
        {"wins": ((0.5, 1.0), (0.0, 0.5))},
        {"candidate_ids": ("a", "a")},
        {"candidate_ids": ("a",), "scores": (1.0,)},
    ],
)
def test_half_answers_are_refused(changes):
    with pytest.raises(ValidationError):
        judgement(**changes)


def test_records_are_frozen():
    with pytest.raises(ValidationError):
        judgement().state = "failed"
