"""Where a stop string ends a response."""

from dno_jax.sampling.stops import stopped


def test_the_text_ends_before_the_first_stop_string_that_is_in_it():
    assert stopped(("b", "ab"), range(1), decode=lambda ids: "xxabab"[: 6 * len(ids)]) == (1, "xx")
    assert stopped(("q",), range(1), decode=lambda ids: "xxabab"[: 6 * len(ids)]) is None


def test_text_up_to_a_stop_string_does_not_depend_on_how_many_ids_come_at_once():
    """The longer string begins earlier and ends later: it is not there yet where the shorter one ends the response."""
    pieces = ["xxa", "b", "c", "d"]

    def cut(count):
        return stopped(("b", "abc"), range(count), decode=lambda ids: "".join(pieces[one] for one in ids))

    assert [cut(count) for count in (1, 2, 3, 4)] == [None, (2, "xxa"), (2, "xxa"), (2, "xxa")]
