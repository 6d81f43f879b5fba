"""Tokenizers laid out as models are published: one token may begin, end and pad, and blanks may be tokens."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from dno_jax.errors import DnoError
from dno_jax.model.text.templates import lint
from dno_jax.model.text.tokenizer import ChatTokenizer
from tests.model.text.test_templates import REAL
from tests.model.tokenizers import CHATML, make_tokenizer, turns, user

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
IM = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>")
GRANITE = IM.replace("<|im_start|>", "<|role|>").replace("<|im_end|>", "<|end_of_text|>")
PHI4 = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content + eos_token }}"
    "{{ '\n' if not loop.last }}{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
END = "<|end_of_text|>"
ALL = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
# name -> template, special tokens, roles, end ids of generation_config.json
PUBLISHED = {
    "SmolLM2": (IM, MARKS, {"bos_token": MARKS[0], "eos_token": MARKS[1], "pad_token": MARKS[1]}, []),
    "setup_chat_format": (IM, MARKS, {"bos_token": MARKS[0], "eos_token": MARKS[1], "pad_token": MARKS[0]}, []),
    "OLMo 2": (OLMO, (END, "<|pad|>"), ALL | {"pad_token": "<|pad|>"}, []),
    "Granite": (GRANITE, (END, "<|role|>"), ALL, []),
    "Phi 4 mini": (PHI4, (END, "<|end|>", *ROLES), ALL, [260]),
    "Qwen 2.5": (IM, MARKS, {"bos_token": None, "eos_token": MARKS[1], "pad_token": "</s>"}, []),
    "a template for each": (CHATML, ROLES, {}, []),
}  # fmt: skip


@pytest.fixture
def load(tmp_path):
    """Make a small tokenizer with these tokens that brings this template, and load it."""
    made = []

    def make(template, special=(), *, plain=(), ends=(), begins=False, num_rows=None, **roles) -> ChatTokenizer:
        made.append(template)
        path = make_tokenizer(
            tmp_path / f"t{len(made)}", template=template, begins=begins, special=special, plain=plain, **roles
        )
        if ends:
            (path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}))
        return ChatTokenizer.load(path, num_rows=num_rows)

    return make


def found(chat, *levels):
    return {finding.name: finding.text for finding in lint(chat) if finding.level in levels}


@pytest.mark.parametrize("name", PUBLISHED)
def test_how_models_are_published_is_no_fault(load, name):
    template, special, roles, ends = PUBLISHED[name]
    chat = load(template, special, ends=ends, begins=name == "a template for each", **roles)
    assert found(chat, "error", "warning") == {}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_faults_are_found_however_it_is_laid_out(load, name):
    template, special, roles, ends = PUBLISHED[name]
    options = {"special": (*special, "<|odd|>"), "ends": ends, **roles}

    def errors(changed):
        return found(load(changed, **options), "error")

    if roles.get("bos_token", "<s>") is not None:
        begun = "{{ bos_token }}" * (1 if "bos_token" in template or name in ("SmolLM2", "setup_chat_format") else 2)
        assert "2 begin tokens" in errors(begun + template)["BOS"]
        late = "\n{{ bos_token }}" + template.replace("{{ bos_token }}", "")
        assert {"BOS"} <= set(errors(late))
    header = template.replace("add_generation_prompt %}", "add_generation_prompt %}Well ")
    assert "they part at token" in errors(header)["concatenation"]
    closing = template.replace("{{ eos_token }}", "<|odd|>").replace("content + eos_token", "content + '<|odd|>'")
    closing = closing.replace("<|im_end|>", "<|odd|>").replace("<|end|>", "<|odd|>").replace(END, "<|odd|>")
    assert "'<|odd|>'" in errors(closing)["end"]


def test_a_begin_token_before_each_question_is_told_where_it_only_begins(load):
    llama2 = "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[{{ m.content }}]{% else %}{{ m.content }}"
    llama2 += "{{ eos_token }}{% endif %}{% endfor %}"
    assert "2 begin tokens in a chat of two questions" in found(load(llama2), "warning")["turns"]
    assert "turns" not in found(load(llama2, bos_token="</s>"), "warning")
    without = found(load(llama2.replace("{{ bos_token }}", ""), begins=True), "warning")
    assert "begins a text with '<s>', the template does not" in without["BOS"]


OPENERS = {
    "mistral": "[INST]", "nemo": "[INST]", "zephyr": "<|user|>", "phi3": "<|user|>", "qwen": "<|im_start|>",
    "hermes": "<|im_start|>", "llama3": "<|start_header_id|>", "gemma": "<start_of_turn>", "r1": "<\uff5cUser\uff5c>",
}  # fmt: skip
ENDS = {
    "mistral": "</s>", "nemo": "</s>", "zephyr": "</s>", "phi3": "<|end|>", "qwen": "<|im_end|>",
    "hermes": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>",
    "r1": "<\uff5cend\u2581of\u2581sentence\uff5c>",
}  # fmt: skip
FURTHER = {
    "mistral": ("[/INST]",), "nemo": ("[/INST]",), "zephyr": ROLES, "phi3": ROLES, "llama3": ("<|end_header_id|>",),
    "r1": ("<\uff5cAssistant\uff5c>",),
}  # fmt: skip
# Their templates add something to bos_token, which is nothing where the tokenizer has none.
NEED_BEGIN = ("chujiezheng-llama-2-chat", "chujiezheng-mistral-instruct", "chujiezheng-vicuna", "trl-llama3")


@pytest.mark.parametrize(("name", "family", "verdict"), REAL)
def test_real_templates_on_every_layout(shared_data, tmp_path, name, family, verdict):
    file = shared_data / "tokenizers" / "templates" / f"{name}.jinja"
    opener, end = OPENERS[family], ENDS[family]
    special = tuple(dict.fromkeys((opener, end, *FURTHER.get(family, ()))))
    layouts = {
        "bos = eos": {"bos_token": end},
        "all one": dict.fromkeys(("bos_token", "unk_token", "pad_token"), end),
        "bos = opener": {"bos_token": opener},
        "no bos": {"bos_token": None},
    }
    for number, (layout, roles) in enumerate(layouts.items()):
        path = make_tokenizer(
            tmp_path / str(number), template=None, begins=False, special=special, **{"eos_token": end, **roles}
        )
        chat = ChatTokenizer.load(path, str(file))
        errors = found(chat, "error")
        if verdict == "refuses" or (layout == "no bos" and name in NEED_BEGIN):
            assert set(errors) == {"question"}, layout
            assert verdict == "refuses" or "the tokenizer has no begin token" in errors["question"]
        elif verdict == "parts":
            assert "they part at token" in errors["concatenation"], layout
        elif verdict == "late BOS":
            assert set(errors) == {"BOS"}, layout
        elif layout == "bos = opener" and _begins_twice(file.read_text()):
            assert "2 begin tokens" in errors["BOS"], layout
            assert set(errors) == {"BOS"}
        else:
            assert errors == {}, layout
            assert not {"BOS", "turns"} & set(found(chat, "warning")), layout


def _begins_twice(template: str) -> bool:
    """Whether a template writes bos_token right before what opens a turn; Mistral's v1 has a blank between."""
    return "bos_token" in template and "' [INST] '" not in template


def test_blanks_are_never_control_tokens(load):
    """Gemma's line breaks and runs of blanks are added tokens, and its template writes the former."""
    blanks = ("\n", "\n\n", "\u2581\u2581", "\t", "  ", "<0x0A>")
    for places in ({"plain": blanks}, {"special": (*ROLES, *blanks)}):
        chat = load(CHATML, **({"special": ROLES} | places))
        for text in ("one\ntwo", "a\n\nb", "x  y\tz", "\n", "a <0x0A> b"):
            assert not chat.control_tokens(text)
        ids = chat.response_ids(user("q\n\nr"), "one\ntwo\n\nthree  four", end_id=1)
        assert chat.decode(ids) == "one\ntwo\n\nthree  four"
        assert chat.control_tokens("<|user|>") == ["<|user|>"]


def test_words_that_the_template_writes_are_no_control_tokens(load):
    """Added words, numbers and signs stand in role names and system prompts; marks around turns are control tokens."""
    prompt = "{{ bos_token }}You are Chemistry-GPT 4.\n" + IM.replace("<|im_start|>", "USER:")
    words = ("assistant", "user", "Chemistry", "4", ".", "-", "Chemistry-GPT")
    chat = load(prompt, ("<|im_end|>",), plain=(*words, "USER:"))
    assert not chat.control_tokens("the user asks an assistant of Chemistry-GPT 4.")
    assert chat.control_tokens("x USER: y <|im_end|>") == ["USER:", "<|im_end|>"]
    # What a preamble tells the model to say is no mark: a system message takes its place.
    preamble = "{% if messages[0].role != 'system' %}Think, then write <answer>.\n{% endif %}"
    chat = load(CHATML.replace("{{ bos_token }}", "{{ bos_token }}" + preamble), ROLES, plain=("<answer>",))
    assert not chat.control_tokens("<answer>4")
    assert chat.decode(chat.response_ids(user("q"), "<answer>4", end_id=1)) == "<answer>4"
    # A system turn's mark is one too, though a plain question has none.
    chat = load(CHATML, plain=ROLES)
    assert chat.control_tokens("<|system|><|assistant|>") == ["<|system|>", "<|assistant|>"]
    one = "{% if messages | length > 2 %}{{ raise_exception('One turn only') }}{% endif %}"
    assert load(one + CHATML, plain=ROLES).control_tokens("<|user|>") == ["<|user|>"]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("tags", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_a_model_may_say_its_thoughts(load, tags, special):
    """Some tokenizers call the tags special; they are kept in the text, where its thought is told from its answer."""
    opening = f"{{% if add_generation_prompt %}}<|assistant|>\n{tags[0]}{{% endif %}}"
    template = CHATML.replace("{% if add_generation_prompt %}<|assistant|>\n{% endif %}", opening)
    chat = load(template, (*ROLES, *tags) if special else ROLES, plain=() if special else tags)
    text = f"Hm.{tags[1]}So."
    assert not chat.control_tokens(text)
    ids = chat.response_ids(user("q"), text, end_id=1)
    assert chat.strip(ids)[3:] == [tags[1], "S", "o", ".", "</s>"]
    assert chat.decode(ids) == text
    assert chat.opens_thought(chat.prompt_ids(user("q")))


def test_the_unknown_token_is_a_control_token_where_it_ends_too(load):
    """Where unk = eos, a user's <|endoftext|> would end the text, and gold would be cut where it spells it."""
    for role in ("bos_token", "eos_token", "pad_token"):
        chat = load(CHATML, ("<|endoftext|>", *ROLES), unk_token="<|endoftext|>", **{role: "<|endoftext|>"})
        assert chat.control_tokens("so <|endoftext|> it") == ["<|endoftext|>"]
        with pytest.raises(DnoError, match="spells the control token"):
            chat.response_ids(user("q"), "so <|endoftext|> it", end_id=1)
    chat = load(CHATML, ("<|endoftext|>", *ROLES), unk_token="<|endoftext|>")
    assert not chat.control_tokens("so <|endoftext|> it")


def test_a_given_response_that_spells_an_end_is_never_cut(load):
    """An end token of blanks is no control token of prompts; a response that holds it would end there."""
    chat = load(CHATML, ROLES, plain=("\n\n",), ends=[1, 262])
    assert chat.end_ids == (1, 262)
    assert not chat.control_tokens("a\n\nb")
    with pytest.raises(DnoError, match="spells the control token"):
        chat.response_ids(user("a\n\nb"), "a\n\nb", end_id=1)
    assert chat.decode(chat.response_ids(user("a\n\nb"), "a\nb", end_id=1)) == "a\nb"


@pytest.mark.parametrize("special", [True, False])
def test_tokens_without_an_embedding_are_named_and_their_texts_refused(load, special):
    names = ("<image>", "<|pad|>")
    chat = load(CHATML, (*ROLES, *names) if special else ROLES, plain=() if special else names, num_rows=262)
    assert chat.rowless_ids == {262, 263}
    assert found(chat, "error") == {}
    said = found(chat, "warning")["vocabulary"]
    assert "(262 rows) for '<image>', '<|pad|>': texts that hold one are dropped" in said
    assert chat.rowless_tokens("see <image> here") == ["<image>"]
    assert not chat.rowless_tokens("see here")
    with pytest.raises(DnoError, match="'<image>'"):
        chat.response_ids(user("q"), "see <image> here", end_id=1)


def test_tokens_that_the_template_or_words_need_must_have_an_embedding(load):
    chat = load(CHATML, ROLES, num_rows=260)
    assert "the template writes '<|user|>', '<|assistant|>'" in found(chat, "error")["vocabulary"]
    assert "vocabulary" in found(replace(chat, num_rows=100), "error")
    assert "vocabulary" not in found(replace(chat, num_rows=262), "error", "warning")
    raw = ChatTokenizer.load(chat.path, "raw", num_rows=250)
    assert "262 ids of the tokenizer, 250 rows" in found(raw, "error")["vocabulary"]


def test_texts_are_dropped_by_what_they_hold(load):
    from dno_jax.config import RunConfig, parse_config
    from dno_jax.data.prompts import tokenize_prompts
    from dno_jax.records import Prompt

    chat = load(CHATML, ROLES, plain=("\n", "<image>"), num_rows=263)
    texts = ("plain", "two\nlines", "an <image>", "an </s>", "  <|user|>")
    prompts = [Prompt(prompt_id=str(i), messages=tuple(user(text))) for i, text in enumerate(texts)]
    tree = {"run_dir": "run", "model": {"path": "base"}, "pairing": {"rule": "all", "reward": "win_rate"}}
    tree["prompts"] = {"path": "rows.jsonl", "max_length": 64}
    config = parse_config(RunConfig, tree, place="test")
    kept, dropped = tokenize_prompts(prompts, tokenizer=chat, config=config)
    assert {item.prompt.prompt_id for item in kept} == {"0", "1"}
    assert dropped == {"prompt holds a token without an embedding": 1, "prompt spells a control token": 2}
    assert chat.rowless_tokens(*(message.content for message in turns("a", "b<image>"))) == ["<image>"]


@pytest.mark.parametrize("untrained", ["near zero", "all equal", "equal to one that is not written"])
def test_rows_that_no_training_has_touched(tmp_path, untrained):
    """A chat template on a base model: its own tokens have rows, and no meaning."""
    from safetensors.numpy import save_file

    from dno_jax.model.hf import untrained_rows

    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(264, 16)).astype(np.float32)
    special = ("<|im_start|>", "<|im_end|>", "<|reserved|>")
    chat = ChatTokenizer.load(make_tokenizer(tmp_path / "t", template="{{ bos_token }}" + IM, special=special))
    marks = chat.control_ids & chat.written_ids
    assert marks == {0, 259, 260}
    save_file({"model.embed_tokens.weight": embedding}, tmp_path / "t" / "model.safetensors")
    assert untrained_rows(chat.path, marks, added=chat.added_ids) == frozenset()
    if untrained == "near zero":
        embedding[259:262] = 1e-6 * rng.normal(size=(3, 16))
    elif untrained == "all equal":
        embedding[259:262] = embedding[5] * 0.3
    else:
        embedding[260] = embedding[259] = embedding[261]
    save_file({"model.embed_tokens.weight": embedding}, tmp_path / "t" / "model.safetensors")
    assert untrained_rows(chat.path, marks, added=chat.added_ids) == {259, 260}
    findings = {finding.name: finding for finding in lint(chat, untrained={259, 260})}
    assert findings["rows"].level == "warning"
    assert "'<|im_start|>', '<|im_end|>', whose rows of the embedding no training has touched" in findings["rows"].text
    assert findings["end"].level == "error"
    assert "eos_token_id" not in findings["end"].text
    assert "eos_token_id" in found(chat, "error")["end"]
    assert untrained_rows(tmp_path, marks, added=chat.added_ids) == frozenset()
