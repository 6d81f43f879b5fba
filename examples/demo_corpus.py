"""Write the demo's material: a tiny instruction domain, its tokenizer and the shape of its model.

    python examples/demo_corpus.py OUTDIR [--seed 0]

writes OUTDIR/{sft,prompts,held_out}.jsonl and OUTDIR/policy/{config,generation_config,tokenizer,tokenizer_config}.json.
configs/demo holds what seed 0 gives, but for sft.jsonl, which only the training of the demo's policy 0 needs.

A prompt asks for a few sentences about a subject with an object at a place. The responses to learn from are of *mixed*
quality, on purpose: policy 0 must leave room for improvement, and must do at times what DNO is to make it do always.
Their faults are drawn independently of each other (strays from the topic, repeats itself, says too little or too much,
breaks off), so that criteria such as relevance, variety and brevity disagree about which of two responses is better.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_TRAIN, NUM_HELD_OUT, NUM_SFT = 600, 80, 4000  # prompts
RESPONSES_PER_SFT_PROMPT = 2
VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<system>", "<user>", "<assistant>")  # ids 0, 1, 2, ...

TOPICS = {
    "adjective": "red small brave old quiet grey clever happy tall shy gentle proud lazy white hungry young",
    "subject": "fox bear rabbit owl cat dog mouse horse duck frog wolf deer goat hen otter crow turtle sheep girl boy",
    "object": "lamp key bell book map boat drum coin rope basket hat kite spoon mirror ladder letter",
    "place": "forest river village garden mountain harbour meadow bridge market castle island cave farm valley beach "
    "mill",
}

REQUESTS = (
    "Tell me about {a_subject} with a {object} at the {place}.",
    "Write a short story about {a_subject} that finds a {object} near the {place}.",
    "What does {a_subject} do with a {object} by the {place}?",
    "Please tell a tale of {a_subject} who needs a {object} near the {place}.",
    "Describe {a_subject} and a {object} at the {place}.",
    "Say how {a_subject} lost a {object} by the {place}.",
)

OPENINGS = (
    "{A_subject} lives near the {place}.",
    "At the {place} there is {a_subject}.",
    "One day {a_subject} walks to the {place}.",
    "By the {place} sits {a_subject}.",
    "All at the {place} know the {subject}.",
    "Once {a_subject} came to the {place}.",
)
MIDDLES = (
    "It finds a {object} under the leaves.",
    "It carries a {object} for its friends.",
    "It lost its {object} in the rain.",
    "It needs a {object} to cross the sea.",
    "It hides the {object} behind a stone.",
    "It sells the {object} for bread and tea.",
    "With a {object} it helps the others.",
    "A friend gave it a new {object}.",
)
ASIDES = (
    "The wind smells of salt.",
    "Birds sing in the green trees.",
    "Snow falls on every roof.",
    "A friend brings warm bread.",
    "Two kind girls laugh and play.",
    "Stars shine over the dark hills.",
    "They share the bread and tea.",
    "Bees hum from tree to tree.",
    "Cold rain falls all day.",
    "No one hears the song.",
    "An hour later the sun is back.",
)
CLOSINGS = (
    "Then it goes home to rest.",
    "At night they sing under the stars.",
    "In the end all are happy.",
    "So it smiles and rests.",
    "Then all of them go home.",
    "That is why we love it.",
)
DULL = ("It is good.", "It is very very good.", "It runs and it runs and it runs.", "It is there and it is there.")
CURT = ("Yes.", "It is good.", "We love it.", "The end.")


@dataclass(frozen=True)
class Topic:
    """What a prompt asks about."""

    adjective: str
    subject: str
    object: str
    place: str

    def fill(self, template: str) -> str:
        """Put the topic into a template's slots."""
        subject = f"{self.adjective} {self.subject}"
        article = "an" if subject[0] in "aeiou" else "a"
        return template.format(
            subject=subject,
            a_subject=f"{article} {subject}",
            A_subject=f"{article.title()} {subject}",
            object=self.object,
            place=self.place,
        )


@dataclass(frozen=True)
class Style:
    """How a response is made; every field is a fault that the others do not depend on.

    Attributes:
        focus: probability that a slot holds the prompt's word, not another of its kind.
        num_sentences: how much it says.
        dullness: probability that a sentence is an empty phrase or repeats the one before.
        cut: words taken from the end; 0 leaves the last sentence finished.
    """

    focus: float
    num_sentences: int
    dullness: float
    cut: int = 0


def draw_topic(rng: random.Random) -> Topic:
    return Topic(**{part: rng.choice(words.split()) for part, words in TOPICS.items()})


def draw_style(rng: random.Random) -> Style:
    """Draw the style of one supervised response."""
    return Style(
        # Two levels: a response is on the topic or not, so that policy 0 learns both to copy and to choose whether to.
        focus=rng.choice((0.2, 1.0)),
        num_sentences=rng.choice((1, 2, 2, 3, 3, 4)),
        dullness=rng.choice((0.0, 0.0, 0.25, 0.6)),
        cut=rng.choice((0, 0, 0, 0, 1, 2)),
    )


def draw_gold_style(rng: random.Random) -> Style:
    """Draw the style of a teacher's response: finished and mostly to the point, yet not perfect by any criterion."""
    return Style(focus=0.9, num_sentences=rng.choice((2, 3, 4)), dullness=0.1)


def draw_response(rng: random.Random, topic: Topic, style: Style) -> str:
    """Write a response: an opening, then sentences about the object, asides or dull ones, then perhaps a closing."""
    if style.num_sentences == 1 and rng.random() < 0.3:
        return rng.choice(CURT)
    said = _stray(rng, topic, style.focus)
    sentences = [said.fill(rng.choice(OPENINGS))]
    while len(sentences) < style.num_sentences:
        last = len(sentences) == style.num_sentences - 1
        if rng.random() < style.dullness:
            sentence = rng.choice((*DULL, sentences[-1], sentences[-1]))
        elif len(sentences) == 1:
            sentence = said.fill(rng.choice(MIDDLES))
        else:
            sentence = rng.choice(CLOSINGS if last and rng.random() < 0.6 else ASIDES)
        sentences.append(sentence)
    told = " ".join(sentences).split(" ")
    return " ".join(told[: max(1, len(told) - style.cut)])


def _stray(rng: random.Random, topic: Topic, focus: float) -> Topic:
    """Keep each part of the topic with probability `focus`."""
    other = draw_topic(rng)
    return Topic(**{part: getattr(topic if rng.random() < focus else other, part) for part in TOPICS})


def draw_prompts(rng: random.Random, count: int, *, taken: set[str]) -> list[tuple[str, Topic]]:
    """Draw `count` prompts with their topics, none in `taken`, and add them to `taken`."""
    drawn: list[tuple[str, Topic]] = []
    while len(drawn) < count:
        topic = draw_topic(rng)
        text = topic.fill(rng.choice(REQUESTS))
        if text not in taken:
            taken.add(text)
            drawn.append((text, topic))
    return drawn


def make_rows(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Make the rows of every JSONL file, by file name; the three files have no prompt in common."""
    # One generator a file: a change to one file's numbers leaves the others as they are.
    rngs = {name: random.Random(f"{seed}/{name}") for name in ("held_out", "prompts", "sft")}
    taken: set[str] = set()
    drawn = {
        name: draw_prompts(rngs[name], count, taken=taken)
        for name, count in (("held_out", NUM_HELD_OUT), ("prompts", NUM_TRAIN), ("sft", NUM_SFT))
    }
    rows: dict[str, list[dict[str, Any]]] = {"sft.jsonl": [], "prompts.jsonl": [], "held_out.jsonl": []}
    for name, prefix in (("prompts", "train"), ("held_out", "held-out")):
        rng = rngs[name]
        for index, (text, topic) in enumerate(drawn[name]):
            gold = draw_response(rng, topic, draw_gold_style(rng))
            rows[f"{name}.jsonl"].append({**_prompt(f"{prefix}-{index:03d}", text), "gold": gold})
    rng = rngs["sft"]
    for index, (text, topic) in enumerate(drawn["sft"]):
        for _ in range(RESPONSES_PER_SFT_PROMPT):
            response = draw_response(rng, topic, draw_style(rng))
            rows["sft.jsonl"].append({**_prompt(f"sft-{index:04d}", text), "response": response})
    rng.shuffle(rows["sft.jsonl"])
    return rows


def _prompt(prompt_id: str, text: str) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "messages": [{"role": "user", "content": text}]}


# Nothing but special tokens stands between the turns: a space there would be one token at the end of a prompt, and part
# of the first word's token in a whole chat, so that the chat's ids would not begin with the prompt's.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> dict[str, Any]:
    """Train a byte-pair tokenizer and return the content of its tokenizer.json.

    The alphabet is letters, digits and common punctuation, not all 256 bytes: that leaves more of the small vocabulary
    to whole words, and a policy of one token a word cannot misspell. Other characters become <unk>.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[0]))
    # ByteLevel keeps the spaces, so that decoding gives exactly the text that was encoded.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = ["Ġ", "Ċ", *string.ascii_letters, *string.digits, *".,!?;:'\"()-"]  # the first two: space, line end
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())


def tokenizer_config() -> dict[str, Any]:
    unk, bos, eos, pad, *turns = SPECIAL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "additional_special_tokens": turns,
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def model_config() -> dict[str, Any]:
    """The shape of policy 0: 217,664 parameters, the embedding shared with the head."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
        **_token_ids(),
    }


def _token_ids() -> dict[str, int]:
    named = {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"}
    return {name: SPECIAL_TOKENS.index(token) for name, token in named.items()}


def make_files(seed: int) -> dict[str, str]:
    """Make every file's content, by path under the output directory."""
    rows = make_rows(seed)
    texts = [row["messages"][0]["content"] for row in rows["sft.jsonl"]] + [
        row["response"] for row in rows["sft.jsonl"]
    ]
    trees = {
        "config": model_config(),
        "generation_config": {"do_sample": True, **_token_ids()},
        "tokenizer": train_tokenizer(texts),
        "tokenizer_config": tokenizer_config(),
    }
    files = {name: "".join(json.dumps(row) + "\n" for row in listed) for name, listed in rows.items()}
    for name, tree in trees.items():
        files[f"policy/{name}.json"] = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, content in make_files(arguments.seed).items():
        path = arguments.outdir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        print(f"{path}: {len(content.encode()):,} bytes")


if __name__ == "__main__":
    main()
