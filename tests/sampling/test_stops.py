"""Where a stop string ends a response."""

import itertools

import pytest
from tokenizers import decoders

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


@pytest.mark.parametrize("length", [3, 5])
def test_a_byte_that_is_no_text_takes_no_stop_string_back(length):
    """A tokenizer that falls back on bytes makes U+FFFD of a whole run of them, of the newline before the other too."""
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    pieces = ["a", "<0x0A>", "<0xFF>", "<0xC3>", "<0xA9>"]

    def decode(ids):
        return decoder.decode([pieces[one] for one in ids])

    assert (decode([0, 1]), decode([0, 1, 2])) == ("a\n", "a\ufffd\ufffd")
    for ids in itertools.product(range(len(pieces)), repeat=length):
        texts = [decode(ids[:count]) for count in range(1, length + 1)]
        first = next((count for count, text in enumerate(texts, 1) if "\n" in text), None)
        expected = first and (first, texts[first - 1].split("\n")[0])
        for count in range(1, length + 1):
            found = stopped(("\n",), ids[:count], decode=decode)
            assert found == (expected if first is not None and count >= first else None)


def test_what_is_not_read_to_its_end_is_not_decoded_again_from_its_start():
    """The last character of a chunk may be there in part."""
    asked = []

    def decode(ids):
        asked.append(len(ids))
        return bytes(ids).decode(errors="replace")

    assert stopped(("q",), "some text, and 語".encode()[:-1], decode=decode) is None
    assert asked == [17, 16, 15]
    asked.clear()
    assert stopped(("q",), "some text, and 語".encode(), decode=decode) is None
    assert asked == [18]
