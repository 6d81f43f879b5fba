import pytest

from dno_jax.annotation.refusals import is_refusal


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, but I can\u2019t assist with that request.",
        "Sorry, I cannot provide instructions for this.",
        "I cannot fulfill this request. It would be harmful.",
        "I'm unable to assist.",
        "I am not able to help you with that.",
        "As an AI language model, I cannot discuss this topic.",
        "Unfortunately, I won't write that.",
    ],
)
def test_refusals_in_words(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sorry seems to be the hardest word, as the song says.",
        "I can help with that.",
        "I'm sorry to hear that you can't sleep. Try to keep regular hours.",
        "I cannot recommend this book enough.",
        "I'm sorry, I can't come on Friday, wrote Ann.",
        "Cats can't help purring.",
        "I'm sorry, but I can't help with the first part. " + "The second is this: " * 30,
    ],
)
def test_answers_that_are_none(text):
    assert not is_refusal(text)
