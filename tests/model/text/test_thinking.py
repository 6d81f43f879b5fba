"""Templates that open a thought, close an empty one, or write one that nobody asked for; and what they are told."""

from __future__ import annotations

import pytest

from dno_jax.config import RunConfig, parse_config, stage_digest
from dno_jax.errors import DnoError
from dno_jax.model.text.templates import lint
from dno_jax.model.text.tokenizer import ChatTokenizer
from tests.model.tokenizers import CHATML, make_tokenizer, turns, user

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TAGS = ("<think>", "</think>")
HEADER = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
ANSWER = "m['content'].split('</think>')[-1] | trim('\\n')"
TURNS = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ CONTENT }}{{ eos_token }}\n{% endfor %}"
# As DeepSeek R1's: prompts open a thought, chats leave thoughts out.
OPENS = TURNS.replace("CONTENT", ANSWER) + HEADER.replace("{% endif", "<think>\n{% endif")
# As Qwen 3's: the last answer has a thought, an empty one where it brings none, and so have prompts when they are told.
THOUGHT = (
    "{{ '<think>\n' + (m.content.split('</think>')[0].split('<think>')[-1] | trim('\n') if '</think>' in m.content"
)
THOUGHT += " else '') + '\n</think>\n\n' if m.role == 'assistant' and loop.last }}"
HYBRID = TURNS.replace("{{ CONTENT }}", THOUGHT + "{{ CONTENT }}").replace("CONTENT", ANSWER)
HYBRID += "{% if add_generation_prompt %}<|assistant|>\n{% if enable_thinking is defined and not enable_thinking %}"
HYBRID += "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
# As Qwen 3 Thinking's: prompts open the thought that the last answer has.
ALWAYS = HYBRID.partition("{% if add_generation_prompt %}")[0] + HEADER.replace("{% endif", "<think>\n{% endif")
# As SmolLM 3's: told not to think, prompts have an empty thought, and chats have none.
CLOSED = TURNS.replace("CONTENT", "m.content") + HEADER.replace("{% endif", "{{ '<think>\n\n</think>\n' }}{% endif")


@pytest.fixture
def load(tmp_path):
    made = []

    def make(template, **options) -> ChatTokenizer:
        made.append(template)
        path = make_tokenizer(tmp_path / f"t{len(made)}", template=template, special=ROLES, plain=TAGS)
        return ChatTokenizer.load(path, options=options)

    return make


def found(chat, *levels):
    return {finding.name: finding.text for finding in lint(chat) if finding.level in levels}


@pytest.mark.parametrize("template", [OPENS, ALWAYS])
@pytest.mark.parametrize("chat", [user("Why?"), turns("A?", "B.", "Why?", system="Be brief.")])
def test_a_response_carries_the_thought_that_its_prompt_opens(load, template, chat):
    tokenizer = load(template)
    assert found(tokenizer, "error", "warning") == {}
    assert "must carry theirs" in found(tokenizer, "note")["thinking"]
    prompt = tokenizer.prompt_ids(chat)
    assert tokenizer.opens_thought(prompt)
    for said in ("Hm.\n\nSo.\n</think>\n\nBlue.", "</think>Blue.", "Hm.</think>  A <think> is a tag."):
        ids = tokenizer.response_ids(chat, said, end_id=1)
        assert tokenizer.spelled(prompt + ids) == tokenizer.prompt_text(chat) + said + "</s>"
        assert (ids[-1], ids.count(1)) == (1, 1)
        assert tokenizer.decode(ids) == said
        for opening in ("<think>\n", "\n<think>\n"):  # which the prompt has written
            assert tokenizer.response_ids(chat, opening + said, end_id=1) == ids


@pytest.mark.parametrize("said", ["Blue.", "<think>\nHm. Blue.", "Hm.</think>\n", ""])
@pytest.mark.parametrize("template", [OPENS, ALWAYS])
def test_a_response_without_the_thought_or_cut_in_it_is_refused(load, template, said):
    with pytest.raises(DnoError, match="opens a thought, and the response has none before its answer") as caught:
        load(template).response_ids(user("Why?"), said, end_id=1)
    assert "enable_thinking: false" in str(caught.value)


def test_an_untold_empty_thought_is_a_finding(load):
    """Samples would think, and gold be trained with an empty thought."""
    tokenizer = load(HYBRID)
    assert "with an empty thought before them" in found(tokenizer, "warning")["thinking"]
    assert "enable_thinking: false" in found(tokenizer, "warning")["thinking"]
    response = tokenizer.response_ids(user("Why?"), "Blue.", end_id=1)
    assert tokenizer.decode(response) == "<think>\n\n</think>\n\nBlue."
    with_its_own = tokenizer.response_ids(user("Why?"), "<think>\nHm.\n</think>\n\nBlue.", end_id=1)
    assert tokenizer.decode(with_its_own) == "<think>\nHm.\n</think>\n\nBlue."
    for other in (OPENS, ALWAYS, CLOSED, CHATML):
        assert "thinking" not in found(load(other), "error", "warning")


def test_an_option_has_the_prompt_write_the_empty_thought(load):
    tokenizer = load(HYBRID, enable_thinking=False)
    assert found(tokenizer, "error", "warning") == {}
    assert "answer at once" in found(tokenizer, "note")["thinking"]
    prompt, response = tokenizer.prompt_ids(user("Why?")), tokenizer.response_ids(user("Why?"), "Blue.", end_id=1)
    assert tokenizer.spelled(prompt).endswith("<|assistant|>\n<think>\n\n</think>\n\n")
    assert not tokenizer.opens_thought(prompt)
    assert tokenizer.decode(response) == "Blue."
    assert prompt + response == tokenizer.chat_ids(user("Why?"), "Blue.")[: len(prompt + response)]
    assert load(HYBRID, enable_thinking=True).prompt_ids(user("Why?")) == load(HYBRID).prompt_ids(user("Why?"))


def test_an_empty_thought_that_chats_have_not_is_no_fault(load):
    tokenizer = load(CLOSED)
    assert found(tokenizer, "error", "warning") == {}
    prompt, response = tokenizer.prompt_ids(user("Why?")), tokenizer.response_ids(user("Why?"), "Blue.", end_id=1)
    assert tokenizer.spelled(prompt + response).endswith("<|assistant|>\n<think>\n\n</think>\nBlue.</s>")
    with pytest.raises(DnoError, match="they part at token"):  # it would think after all
        tokenizer.response_ids(user("Why?"), "<think>Hm.</think>Blue.", end_id=1)
    for fault in ("Well", "<|assistant|>"):
        other = CLOSED.replace("<|assistant|>\n{{ '<think>", f"<|assistant|>\n{fault}{{{{ '<think>")
        assert "they part at token" in found(load(other), "error")["concatenation"]


def test_options_are_part_of_the_digest_and_must_do_something(load):
    plain, told = load(HYBRID), load(HYBRID, enable_thinking=False)
    assert len({plain.digest, told.digest, load(HYBRID, enable_thinking=True).digest}) == 3
    assert plain.digest == load(HYBRID).digest
    assert ChatTokenizer.load(plain.path).digest == plain.digest
    for name, said in [
        ("enable_thinkin", "reads no such variable"),
        ("add_generation_prompt", "given by the run itself"),
        ("bos_token", "given by the run itself"),
    ]:
        with pytest.raises(DnoError, match=rf"model\.template_options\.{name}: .*{said}"):
            load(HYBRID, **{name: False})
    with pytest.raises(DnoError, match="chat_template is raw"):
        ChatTokenizer.load(plain.path, "raw", options={"enable_thinking": False})


def test_options_decide_what_is_sampled_and_stand_in_the_model_card(tmp_path):
    from dno_jax.model.hf.card import ExportFacts, model_card

    tree = {
        "run_dir": "run",
        "model": {"path": "base"},
        "prompts": {"path": "rows.jsonl"},
        "pairing": {"rule": "all", "reward": "win_rate"},
    }
    plain = parse_config(RunConfig, tree, place="test")
    options = {"enable_thinking": False, "reasoning_effort": "low", "thinking_budget": 512}
    told = parse_config(RunConfig, {**tree, "model": {**tree["model"], "template_options": options}}, place="test")
    assert told.model.template_options == options
    assert stage_digest(plain, "sample") != stage_digest(told, "sample")
    assert stage_digest(plain, "train") == stage_digest(told, "train")
    card = model_card(tmp_path, facts=ExportFacts("x", "dno", template_options=options))
    assert "apply_chat_template(..., enable_thinking=False, reasoning_effort='low', thinking_budget=512)" in card
    assert "apply_chat_template" not in model_card(tmp_path, facts=ExportFacts("x", "dno"))
