"""Tokenizers made on the spot: byte-level, with BOS 0, EOS 1, one merge, and whatever tokens a test adds."""

from __future__ import annotations

import json
from pathlib import Path

from dno_jax.records import Message

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SENTENCES = (
    "Tell me a story about a red fox.",
    "What is 17 + 25? Say only the number.",
    "  leading and trailing spaces  ",
    "tabs\tand\n\nblank lines\n",
    "Größe, naïve, 東京, 🙂 and \u200b zero width",
    "x",
    "def f(a):\n    return a ** 2  # comment",
)


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def turns(*contents: str, system: str = "") -> list[Message]:
    """User and assistant in turns, after a system message where one is given."""
    head = [Message(role="system", content=system)] if system else []
    return head + [Message(role="assistant" if i % 2 else "user", content=text) for i, text in enumerate(contents)]


def make_tokenizer(
    path: Path,
    *,
    template: str | None,
    begins: bool = True,
    eos_after: bool = False,
    special: tuple[str, ...] = (),
    plain: tuple[str, ...] = (),
    **settings: str | None,
) -> Path:
    """Write a tokenizer in the form of a checkpoint.

    Args:
        begins, eos_after: whether it begins and ends texts of its own accord.
        special, plain: added tokens, special or not, with ids from 259 on.
        settings: of tokenizer_config.json, such as bos_token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    vocab["he"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e")]))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", *special)])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in plain])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    single = "<s> " * begins + "$A" + " </s>" * eos_after
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
