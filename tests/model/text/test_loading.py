"""The ids of tokenizer.json are the ids, whatever class is named beside it; and what is said of files that are none."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dno_jax.errors import DnoError
from dno_jax.model.text import loading
from dno_jax.model.text.loading import read_tokenizer
from dno_jax.model.text.tokenizer import ChatTokenizer
from tests.model.tokenizers import CHATML, SENTENCES, user

TEXTS = (
    *SENTENCES,
    "In 1984, 12345 + 67 = 12412.",
    "two  blanks,   three,    four",
    "it's IT'S I'll don't",
    "one\n\ntwo\n\n\nthree\r\n\tfour",
    "if x:\n        return {'a': [1, 2]}  # so",
    "<|end|> after it",
    "<|end|>\n after it",
    "before<|end|>after",
    "a <|user|>b <|user|>  c",
    "<s>So</s> it goes",
)
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|end|>")
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
CL100K += r"|\s+(?!\S)|\s+"


def byte_level(*before):
    """A tokenizer of bytes with some splitting first."""
    tokenizer = Tokenizer(models.BPE())
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not before)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, rest])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}


def metaspace(normalizer=None, pre_tokenizer=None):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, {}


# name -> what the file says, the class that tokenizer_config.json names, the model that config.json names
LAYOUTS = {
    "llama + GPT2Tokenizer, cl100k": (
        lambda: byte_level(pre_tokenizers.Split(Regex(CL100K), "isolated")), "GPT2Tokenizer", "llama"
    ),
    "digits one by one": (
        lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)), "GPT2TokenizerFast", "llama"
    ),
    "qwen2": (
        lambda: byte_level(pre_tokenizers.Split(Regex(r"\p{N}{1,2}|\s+|\w+"), "isolated")), "Qwen2Tokenizer", "qwen2"
    ),
    "metaspace as LlamaTokenizer": (
        lambda: metaspace(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never")), "LlamaTokenizer", "mistral"
    ),
    "first blank as LlamaTokenizerFast": (
        lambda: metaspace(normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])),
        "LlamaTokenizerFast", "llama",
    ),
    "gemma": (
        lambda: metaspace(normalizers.Replace(" ", "\u2581"), pre_tokenizers.Split(" ", "merged_with_previous")),
        "GemmaTokenizer", "gemma2",
    ),
    "lower case": (
        lambda: metaspace(normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()), "CodeLlamaTokenizer", "llama"
    ),
}  # fmt: skip


def write(path: Path, tokenizer: Tokenizer, options: dict, *, kind: str, model: str, **settings) -> Path:
    """Train a tokenizer on a few lines and lay it out as a checkpoint; <|end|> eats the blanks after it, as Phi 3's."""
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL), show_progress=False, **options)
    tokenizer.train_from_iterator([*TEXTS, *(text.upper() for text in TEXTS)], trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=True, normalized=False)])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    # Beside it, an older account of the same tokens, as conversions leave it.
    listed = {
        str(tokenizer.token_to_id(name)): {"content": name, "normalized": True, "special": True} for name in SPECIAL
    }
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tree = {"tokenizer_class": kind, "added_tokens_decoder": listed, **roles, "chat_template": CHATML, **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(tree))
    (path / "config.json").write_text(json.dumps({"model_type": model, "eos_token_id": tokenizer.token_to_id("</s>")}))
    return path


def assert_same(path: Path) -> None:
    theirs, ours = Tokenizer.from_file(str(path / "tokenizer.json")), ChatTokenizer.load(path, "raw")
    for text in TEXTS:
        assert ours._plain_ids(text) == tuple(theirs.encode(text, add_special_tokens=False).ids), text
        assert ours._tokenizer(text)["input_ids"] == theirs.encode(text).ids, text


@pytest.mark.parametrize("name", LAYOUTS)
def test_ids_are_those_of_the_file(tmp_path, name):
    make, kind, model = LAYOUTS[name]
    assert_same(write(tmp_path / "t", *make(), kind=kind, model=model))


@pytest.mark.parametrize("name", ["qwen", "mistral_v1"])
def test_ids_of_real_files(shared_data, tmp_path, name):
    folder = shared_data / "tokenizers" / name
    packed = folder / "tokenizer.json.gz"
    text = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(text)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tekken.json").write_text("{}")  # mistral-common, where it is installed, would read this instead
    assert_same(tmp_path)


def test_tokens_beside_the_file_get_the_ids_that_follow(tmp_path):
    """transformers adds them too; ids that the file has stay as they are."""
    path = write(tmp_path / "t", *byte_level(), kind="GPT2Tokenizer", model="llama")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    count = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
    settings["added_tokens_decoder"][str(count)] = {"content": "<|pad|>", "special": True}
    settings |= {"pad_token": "<|pad|>", "image_token": "<|image|>", "extra_special_tokens": ["<|tool|>"]}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = ChatTokenizer.load(path)
    assert {chat._vocabulary[name] for name in ("<|pad|>", "<|image|>", "<|tool|>")} == {count, count + 1, count + 2}
    assert chat.vocab_size == count + 3
    assert len(chat.control_tokens("a <|pad|> <|tool|> b <|image|>")) == 3
    assert_same(path)


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "a list", "special_tokens_map.json"])
def test_templates_and_names_in_every_place(tmp_path, place):
    path = write(tmp_path / "t", *byte_level(), kind="GPT2Tokenizer", model="llama", chat_template=None)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    if place == "chat_template.jinja":
        (path / place).write_text(CHATML)
    elif place == "chat_template.json":
        (path / place).write_text(json.dumps({"chat_template": CHATML}))
    elif place == "a list":
        settings["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    else:
        settings |= {"chat_template": CHATML}
        for name in ("bos_token", "eos_token", "added_tokens_decoder"):
            del settings[name]
        (path / place).write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ChatTokenizer.load(path).prompt_text(user("hi")) == "<s><|user|>\nhi</s>\n<|assistant|>\n"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:46650be2e0aa\nsize 9085657\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", POINTER, "Git LFS pointer"),
        ("tokenizer_config.json", POINTER, "Git LFS pointer"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [1]}}', "variant"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Neural"}}', "Upgrade tokenizers"),
        ("tokenizer.json", "<html>", "copy the file anew"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[" * 100_000, "not valid JSON"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 7}', "chat_template is 7; expected Jinja text"),
        ("chat_template.jinja", POINTER, "Git LFS pointer"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, said):
    path = write(tmp_path / "t", *byte_level(), kind="GPT2Tokenizer", model="llama")
    (path / name).write_text(content)
    with pytest.raises(DnoError, match=said) as caught:
        ChatTokenizer.load(path)
    assert str(caught.value).startswith(str(path / name))
    assert len(str(caught.value).splitlines()) <= 10


@pytest.mark.parametrize("lacking", [("sentencepiece",), ("google.protobuf",), ("sentencepiece", "google.protobuf")])
def test_a_sentencepiece_model_alone_names_the_extra(tmp_path, monkeypatch, lacking):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    monkeypatch.setattr(loading, "_is_there", lambda module: module not in lacking)
    with pytest.raises(
        DnoError, match=r"tokenizer\.model.*without tokenizer\.json.*dno_jax\[sentencepiece\]"
    ) as caught:
        read_tokenizer(tmp_path)
    assert all(module in str(caught.value) for module in lacking)


def test_a_sentencepiece_model_alone_is_read_by_its_library(shared_data, tmp_path):
    if importlib.util.find_spec("sentencepiece") is None:
        pytest.skip("the extra `sentencepiece` is not installed")
    folder = shared_data / "tokenizers" / "mistral_v1"
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    theirs, ours = ChatTokenizer.load(folder), ChatTokenizer.load(tmp_path)
    for text in TEXTS:
        assert ours.prompt_ids(user(text)) == theirs.prompt_ids(user(text)), text


def test_vocabulary_and_merges_are_read_without_tokenizer_json(tmp_path):
    whole = write(tmp_path / "whole", *byte_level(), kind="GPT2Tokenizer", model="gpt2")
    tree = json.loads((whole / "tokenizer.json").read_text())
    path = tmp_path / "parts"
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps(tree["model"]["vocab"]))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in tree["model"]["merges"]))
    for name in ("tokenizer_config.json", "config.json"):
        (path / name).write_bytes((whole / name).read_bytes())
    theirs, ours = ChatTokenizer.load(whole), ChatTokenizer.load(path)
    for text in TEXTS[:11]:
        assert ours._plain_ids(text) == theirs._plain_ids(text)
