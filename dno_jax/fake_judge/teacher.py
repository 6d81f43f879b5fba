"""Answers to plain chats: words of the question in sentences that say nothing, other ones with another seed."""

from __future__ import annotations

from dno_jax.annotation.oracles import STOP_WORDS, words
from dno_jax.fake_judge.behaviour import Behaviour, uniform

_SENTENCES = (
    "The {} and the {} belong together.",
    "First comes the {}, and after it the {}.",
    "Nobody who has seen the {} forgets the {}.",
    "What matters about the {} is its {}.",
    "Without a {} there would be no {} at all.",
    "Some begin with the {}; most end with the {}.",
)
_NUM_SENTENCES = 4


def teach(prompt: str, *, behaviour: Behaviour, name: str) -> str:
    """Answer a prompt; where texts are marked with their worth, with a mark in the better half."""
    topic = list(dict.fromkeys(word for word in words(prompt) if word not in STOP_WORDS)) or ["matter", "answer"]

    def draw(*what: object) -> float:
        return uniform(behaviour.seed, "teacher", name, *what)

    sentences = []
    for place in range(_NUM_SENTENCES):
        sentence = _SENTENCES[int(len(_SENTENCES) * draw(place))]
        first, second = (topic[int(len(topic) * draw(place, blank))] for blank in (1, 2))
        sentences.append(sentence.format(first, second))
    if behaviour.prefers == "marker":
        sentences.append(f"q={0.5 + 0.5 * draw('mark'):.2f}")
    return " ".join(sentences)
