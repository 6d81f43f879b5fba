from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from dno_jax.errors import DnoError
from dno_jax.model.text.templates import template_strip
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.records import Message
from tests.model.tokenizers import CHATML, SENTENCES, make_tokenizer, user

NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501


@pytest.fixture
def chat(tmp_path) -> ChatTokenizer:
    return ChatTokenizer.load(make_tokenizer(tmp_path / "chat", template=CHATML))


def test_prompt_and_response_are_the_whole_chat(chat):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(chat.path)
    for question in SENTENCES:
        for answer in SENTENCES:
            messages = [Message(role="system", content="Be brief."), *user(question)]
            prompt = chat.prompt_ids(messages)
            response = chat.response_ids(messages, answer, end_id=1)
            dicts = [{"role": m.role, "content": m.content} for m in messages]
            assert list(prompt) == reference.apply_chat_template(dicts, add_generation_prompt=True)["input_ids"]
            dicts.append({"role": "assistant", "content": answer})
            whole = reference.apply_chat_template(dicts)["input_ids"]
            assert list(prompt + response) == whole[: len(prompt + response)]
            assert reference.decode(whole[len(prompt + response) :]) == "\n"  # what the template adds after the end
            assert (prompt + response).count(chat.bos_id) == 1
            assert response.count(1) == 1
            assert response[-1] == 1
            assert chat.decode(response) == answer


def test_a_template_without_end_token_gets_one(tmp_path):
    chat = ChatTokenizer.load(make_tokenizer(tmp_path / "t", template=NO_END))
    response = chat.response_ids(user("hi"), "yes", end_id=1)
    assert response[-1] == 1
    assert response.count(1) == 1
    assert chat.prompt_ids(user("hi")).count(0) == 0  # the template wrote no BOS, so there is none


def test_text_that_is_tokenised_by_itself_gets_the_begin_token_that_the_template_writes(chat):
    from transformers import AutoTokenizer

    peer = AutoTokenizer.from_pretrained(chat.path)
    for question in SENTENCES:
        text = chat.prompt_text(user(question), "Well").removeprefix("<s>")
        assert chat.text_ids(text) == tuple(peer(text)["input_ids"]) == chat.prompt_ids(user(question), "Well")


@pytest.mark.parametrize("eos_after", [False, True])
def test_raw_concatenates_contents(tmp_path, eos_after):
    raw = ChatTokenizer.load(make_tokenizer(tmp_path / "t", template=None, eos_after=eos_after), "raw")
    messages = [Message(role="system", content="A. "), *user("So")]
    prompt = raw.prompt_ids(messages)
    assert prompt[0] == 0
    assert 1 not in prompt
    assert raw.decode(prompt) == "A. So"
    response = raw.response_ids(messages, " be it", end_id=1)
    assert raw.decode(response) == " be it"
    assert response[-1] == 1
    assert (prompt + response).count(0) == (prompt + response).count(1) == 1
    # "h" + "e" would merge into a token that no continuation of the prompt can contain.
    assert raw.strip(raw.response_ids(user("h"), "e", end_id=1)) == ["e", "</s>"]
    assert raw.strip(raw.prompt_ids(user("h"))) == ["<s>", "h"]
    with pytest.raises(DnoError, match="one user message"):
        raw.prompt_ids([*user("a"), Message(role="assistant", content="b"), *user("c")])


def test_control_tokens_in_a_response_are_refused(chat):
    for word in ("</s>", "<s>"):
        with pytest.raises(DnoError, match=f"control token '{word}'"):
            chat.response_ids(user("hi"), f"well {word} then", end_id=1)


def test_a_chat_that_does_not_begin_with_its_prompt_is_refused(tmp_path):
    begun = CHATML.replace("<|assistant|>\n{% endif %}", "<|assistant|>\nWell{% endif %}")
    chat = ChatTokenizer.load(make_tokenizer(tmp_path / "t", template=begun))
    with pytest.raises(DnoError, match=r"they part at token \d+"):
        chat.response_ids(user("hi"), "yes", end_id=1)


def test_templates_from_files_and_their_errors(tmp_path):
    path = make_tokenizer(tmp_path / "t", template=None)
    with pytest.raises(DnoError, match="brings no chat template; set chat_template to 'raw'"):
        ChatTokenizer.load(path)
    with pytest.raises(DnoError, match="expected 'tokenizer', 'raw' or a readable Jinja file"):
        ChatTokenizer.load(path, str(tmp_path / "absent.jinja"))
    with pytest.raises(DnoError, match="no such directory"):
        ChatTokenizer.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DnoError, match="cannot read a tokenizer"):
        ChatTokenizer.load(tmp_path / "empty")
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    from_file = ChatTokenizer.load(path, str(file))
    own = ChatTokenizer.load(make_tokenizer(tmp_path / "own", template=CHATML))
    assert from_file.prompt_ids(user("hi")) == own.prompt_ids(user("hi"))
    file.write_text("{{ raise_exception('no system') }}")
    with pytest.raises(DnoError, match=r"refuses a chat of roles \(user\): no system"):
        ChatTokenizer.load(path, str(file)).prompt_ids(user("hi"))


def test_digest_follows_files_and_template(tmp_path, chat):
    assert chat.digest == ChatTokenizer.load(chat.path).digest
    assert chat.digest != ChatTokenizer.load(chat.path, "raw").digest
    file = tmp_path / "other.jinja"
    file.write_text(CHATML + " ")
    assert chat.digest != ChatTokenizer.load(chat.path, str(file)).digest
    copy = shutil.copytree(chat.path, tmp_path / "copy")
    assert ChatTokenizer.load(copy).digest == chat.digest
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    assert ChatTokenizer.load(copy).digest != chat.digest


def test_end_ids_join_tokenizer_and_checkpoint(chat):
    assert chat.end_ids == (1,)
    (chat.path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 1]}))
    again = ChatTokenizer.load(chat.path)
    assert again.end_ids == (1, 5)
    assert (again.bos_id, again.vocab_size) == (0, 259)


def test_template_strip_shows_the_loss(chat):
    strip = template_strip(chat, user("hi"), "the")
    assert strip.tokens[strip.loss_start : strip.loss_end] == ("t", "he", "</s>")
    assert strip.ids[: strip.loss_start] == chat.prompt_ids(user("hi"))
    assert len(strip.ids) == len(strip.tokens) == strip.loss_end
    assert strip.bos_count == 1
    assert strip.end_trained


@pytest.fixture(scope="session")
def mistral(shared_data) -> Path:
    return shared_data / "tokenizers" / "mistral_v1"


def test_mistral_sample_ids(mistral):
    """Ids published with the tokenizer, for a chat of four user turns."""
    chat = ChatTokenizer.load(mistral)
    sample = json.loads((mistral / "samples" / "sample.json").read_text())["messages"]
    messages = [Message(role=m["role"], content=m["content"]) for m in sample]
    ids = tuple(json.loads((mistral / "samples" / "tokens_v1.json").read_text())["tokens"])
    assert chat.prompt_ids(messages) == ids
    # Every turn of the assistant, cut out as a response.
    at = 0
    for index, message in enumerate(messages):
        if message.role == "assistant":
            prompt = chat.prompt_ids(messages[:index])
            response = chat.response_ids(messages[:index], message.content, end_id=2)
            assert ids[: len(prompt + response)] == prompt + response
            assert len(prompt) > at
            at = len(prompt + response)
    assert chat.text_ids(chat.prompt_text(messages).removeprefix("<s>")) == ids


@pytest.mark.parametrize("name", ["mistral-common-v1_spm", "mistral-common-v3_spm", "meta-llama-Llama-3.1-8B-Instruct"])
def test_real_templates_on_a_sentencepiece_tokenizer(mistral, name):
    chat = ChatTokenizer.load(mistral, str(mistral.parent / "templates" / f"{name}.jinja"))
    for question in SENTENCES:
        for answer in SENTENCES[:3]:
            strip = template_strip(chat, user(question), answer)
            assert strip.bos_count == 1
            assert strip.ids.index(chat.bos_id) == 0
            assert strip.end_trained
            assert strip.ids.count(2) == 1


@pytest.mark.parametrize("name", ["Qwen-Qwen2.5-7B-Instruct", "chujiezheng-chatml", "trl-qwen3_training"])
def test_real_templates_on_a_byte_tokenizer(tmp_path, shared_data, name):
    folder = shared_data / "tokenizers" / "qwen"
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress((folder / "tokenizer.json.gz").read_bytes()))
    shutil.copyfile(folder / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    chat = ChatTokenizer.load(tmp_path, str(shared_data / "tokenizers" / "templates" / f"{name}.jinja"))
    end = "<|im_end|>"
    chat_ends = end in chat.strip(chat.end_ids)
    if name == "chujiezheng-chatml":
        # Written for a renderer that drops indentation and newlines: rendered as it stands, prompt and chat differ.
        with pytest.raises(DnoError, match="they part at token"):
            chat.response_ids(user("hi"), "yes", end_id=chat.end_ids[0])
        return
    for question in SENTENCES:
        prompt = chat.prompt_ids(user(question))
        assert chat.text_ids(chat.prompt_text(user(question))) == prompt
        response = chat.response_ids(user(question), "A plain answer.", end_id=chat.end_ids[0])
        tokens = chat.strip(prompt + response)
        assert chat.bos_id is None or (prompt + response).count(chat.bos_id) <= 1
        assert response[-1] in chat.end_ids
        assert sum(i in chat.end_ids for i in response) == 1
        assert chat_ends == (tokens[-1] == end)
        assert "A plain answer." in chat.decode(response)


def test_tiny_llama_raw(shared_data):
    raw = ChatTokenizer.load(shared_data / "tiny_llama", "raw")
    assert raw.end_ids == (2, 1)
    prompt = raw.prompt_ids(user("Once upon a time"))
    response = raw.response_ids(user("Once upon a time"), ", there was a fox.", end_id=1)
    assert raw.decode(prompt + response) == "Once upon a time, there was a fox."
    assert prompt[0] == 1
    assert 1 not in prompt[1:] + response[:-1]
    assert response[-1] == 1
