"""Too many missing answers stop a stage, and say why and what to do."""

from __future__ import annotations

from collections import Counter

import pytest

from dno_jax.annotation.shortfall import refuse_shortfall
from dno_jax.errors import DnoError

REASONS = Counter({"failed: HTTP 500": 3, "refused: no": 2, "unparsable: not JSON": 1, "failed: odd": 1})


def refuse(reasons=REASONS, *, total=70, max_failed=0.0):
    words = {"missing": "pools have no verdict", "remedy": "Run again."}
    refuse_shortfall("run/annotate", reasons, total=total, max_failed=max_failed, **words)


def test_the_most_common_reasons_are_named_first():
    said = (
        r"^run/annotate: 7 of 70 pools have no verdict "
        r"\(3 x failed: HTTP 500; 2 x refused: no; 1 x unparsable: not JSON\)\. Run again\.$"
    )
    with pytest.raises(DnoError, match=said):
        refuse()


@pytest.mark.parametrize(
    ("reasons", "total", "max_failed", "refused"),
    [
        (REASONS, 70, 0.0, True),
        (REASONS, 70, 0.099, True),
        (REASONS, 70, 0.1, False),
        (REASONS, 70, 1.0, False),
        (Counter(), 70, 0.0, False),
        (Counter(), 0, 0.0, False),
    ],
)
def test_just_the_share_that_may_be_missing_passes(reasons, total, max_failed, refused):
    try:
        refuse(reasons, total=total, max_failed=max_failed)
    except DnoError:
        assert refused
    else:
        assert not refused
