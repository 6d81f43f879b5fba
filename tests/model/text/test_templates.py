"""What the lint finds in a template, hostile templates, prefixes, control tokens, dates; and 19 real templates."""

from __future__ import annotations

import datetime
import functools
import gzip
import json
from pathlib import Path

import pytest

from dno_jax.errors import DnoError
from dno_jax.model.text.templates import lint
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.model.text.truncation import shorten_chat
from dno_jax.training.batches import TrainingRow, make_batch
from tests.batches import response_tokens
from tests.model.tokenizers import CHATML, SENTENCES, make_tokenizer, turns, user

HEADER = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML
ONE_TURN = "{% if messages | length > 2 %}{{ raise_exception('One turn only') }}{% endif %}" + CHATML
SILENT_BEFORE = CHATML.replace("m['content']", "m['content'] * (loop.index != 2 or loop.last)")
MERGING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% elif m.role == 'system' %}{{ m.content + '\n' }}{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)


@pytest.fixture
def load(tmp_path):
    """Make a small tokenizer with a template from a Jinja file (or raw) and load it."""
    made = []

    def make(template, *, date=None, ends=None, **tokens) -> ChatTokenizer:
        made.append(template)
        path = make_tokenizer(tmp_path / f"t{len(made)}", template=None, **tokens)
        if ends:
            (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        if template is None:
            return ChatTokenizer.load(path, "raw")
        file = path / "chat.jinja"
        file.write_text(template)
        return ChatTokenizer.load(path, str(file), **({"date": date} if date else {}))

    return make


def levels(tokenizer):
    return {(finding.level, finding.name): finding.text for finding in lint(tokenizer)}


@pytest.mark.parametrize("template", [CHATML, MERGING])
def test_a_good_template_has_neither_errors_nor_warnings(load, template):
    special = ("<|user|>", "<|assistant|>", "<|system|>") if template == CHATML else ()
    found = levels(load(template, special=special))
    assert {level for level, _ in found} == {"note"}
    assert {name for _, name in found} >= {"BOS", "concatenation", "end", "system", "prefix", "round trip"}
    assert ("turn of its own" in found["note", "system"]) == (template == CHATML)
    assert "what follows is cut" in found["note", "end"] or template == MERGING


@pytest.mark.parametrize(
    ("template", "level", "name", "said"),
    [
        ("{{ bos_token }}" + CHATML, "error", "BOS", "2 begin tokens '<s>'"),
        ("x" + CHATML, "error", "BOS", "stands at token 1, not 0"),
        (CHATML.replace("{{ bos_token }}", ""), "warning", "BOS", "the template does not"),
        (CHATML.replace(HEADER, HEADER.replace("\n{%", "\nWell{%")), "error", "concatenation", "they part at token"),
        (CHATML.replace("{{ eos_token }}", "<|stop|>"), "error", "end", "'<|stop|>' (id 259), which ends nothing"),
        (CHATML.replace("{{ eos_token }}", ""), "warning", "end", "'</s>' is put there"),
        (REFUSES_SYSTEM, "warning", "system", "No system role"),
        (MERGING.replace("{{ m.content + '\n' }}", ""), "warning", "system", "left out"),
        (ONE_TURN, "warning", "turns", "One turn only"),
        (CHATML.replace("<|{{", "{{ bos_token if loop.index == 3 }}<|{{"), "warning", "turns", "2 begin tokens"),
        (SILENT_BEFORE, "warning", "turns", "is not in the text"),
        (CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"), "warning", "contents", "<think>"),
        (TRIMMING, "note", "contents", "trimmed"),
        (TRIMMING, "note", "prefix", "is kept"),
        (CHATML + "{{ '<|odd|>' if not add_generation_prompt }}", "warning", "tokens", "'<|odd|>'"),
        (CHATML.replace("<s>", "") + "{{ raise_exception('never') }}", "error", "question", "never"),
    ],
)  # fmt: skip
def test_what_the_lint_finds(load, template, level, name, said):
    found = levels(load(template, special=("<|stop|>", "<|user|>", "<|assistant|>", "<|system|>")))
    assert said in found[level, name]


def test_a_raw_base_model_is_fine_as_it_is(load):
    found = levels(load(None))
    assert {level for level, _ in found} == {"note"}
    assert "'</s>' is put there" in found["note", "end"]


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__['os'].system('true') }}",
    "{{ lipsum.__globals__['os'].environ }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__[1]}'.format(messages) | length }}{{ namespace(__class__=1) }}",
    "{{ messages.append(messages[0]) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
]
BROKEN = [
    "{% if %}",
    "{{ 1 / 0 }}",
    "{{ messages[7].content }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]


@pytest.mark.parametrize("template", [*ATTACKS, *BROKEN])
def test_a_hostile_or_broken_template_is_refused(load, template):
    """Transformers renders in Jinja's ImmutableSandboxedEnvironment: nothing of Python can be reached."""
    chat = load(template + CHATML)
    with pytest.raises(DnoError, match=r"chat\.jinja: the chat template refuses a chat of roles \(user\): \S"):
        chat.prompt_ids(user("hi"))
    assert [finding.level for finding in lint(chat)] == ["error"]


DATED = "{{ bos_token }}{{ strftime_now('%d %B %Y, %-m') }}\n" + CHATML.replace("{{ bos_token }}", "")
DATE_STRING = "{{ bos_token }}{{ date_string }}\n" + CHATML.replace("{{ bos_token }}", "")


def test_today_is_a_day_of_the_configuration(load):
    day = datetime.date(2031, 3, 9)
    assert load(DATED, date=day).prompt_text(user("hi")).startswith("<s>09 March 2031, 3\n<|user|>")
    assert load(DATE_STRING, date=day).prompt_text(user("hi")).startswith("<s>09 Mar 2031\n<|user|>")
    assert "26 Jul 2024" in load(DATE_STRING).prompt_text(user("hi"))
    for template in (DATED, DATE_STRING):
        chat = load(template)
        assert "2024-07-26 throughout" in levels(chat)["warning", "date"]
        assert chat.digest != ChatTokenizer.load(chat.path, str(chat.template_place), date=day).digest
    assert ("warning", "date") not in levels(load(CHATML))


def test_pinning_the_date_changes_nothing_else(load):
    """Blanks and line breaks at the very start are the template's own, with or without the macro before it."""
    for start in ("", "\n", "\n\n  ", "  {% if true %}\n  a{% endif %}\n", "{#- c #}\n x"):
        undated, dated = start + CHATML, start + CHATML + "{% if false %}{{ strftime_now('%d') }}{% endif %}"
        assert load(dated).prompt_text(user("hi")) == load(undated).prompt_text(user("hi"))


def test_every_special_token_is_control_and_words_are_not(load):
    special, plain = ("<|user|>", "<|pad|>"), ("<think>", "<|assistant|>", "<tool>")
    chat = load(CHATML, special=special, plain=plain)
    # <|assistant|> is no special token here, but the template writes it; <think> is a word that a model may say.
    names = {"<s>", "</s>", "<|user|>", "<|pad|>", "<|assistant|>"}
    assert set(chat.strip(sorted(chat.control_ids))) == names
    for name in sorted(names):
        assert chat.control_tokens("well", f"so {name}{name}") == [name, name]
        with pytest.raises(DnoError, match="spells the control token"):
            chat.response_ids(user("hi"), f"well {name} then", end_id=1)
    for text in ("<think> hm </think>", "< s>", "<tool>", "|user|>"):
        assert not chat.control_tokens(text)
        assert text in chat.decode(chat.response_ids(user("hi"), text, end_id=1))


def test_the_unknown_token_is_no_control_token(tmp_path):
    from tests.small import write_checkpoint

    chat = ChatTokenizer.load(write_checkpoint(tmp_path / "words"), "raw")
    assert chat.strip(chat.prompt_ids(user("qwertz bam"))) == ["<s>", "<unk>", "bam"]
    assert not chat.control_tokens("qwertz")
    assert chat.control_tokens("bam </s>") == ["</s>"]


@pytest.mark.parametrize("template", [CHATML, MERGING, None])
def test_a_response_goes_on_after_the_assistants_prefix(load, template):
    chat = load(template)
    for prefix in ("Sure,", "```python\n", "Well. "):
        prompt = chat.prompt_ids(user("hi"), prefix)
        response = chat.response_ids(user("hi"), " here it is", end_id=1, assistant_prefix=prefix)
        whole = chat.chat_ids(user("hi"), prefix + " here it is")
        assert (prompt + response)[: len(whole)] == whole[: len(prompt + response)]
        assert prompt[: len(chat.prompt_ids(user("hi")))] == chat.prompt_ids(user("hi"))
        assert chat.decode(prompt).endswith(prefix)
        assert chat.decode(response) == " here it is"
        assert (response[-1], response.count(1), (prompt + response).count(0)) == (1, 1, 1)
        assert chat.prompt_text(user("hi"), prefix).endswith(prefix)


def test_prefixes_that_cannot_be_kept_are_refused(load):
    with pytest.raises(DnoError, match=r"does not keep the assistant prefix 'Well\. '"):
        load(TRIMMING).prompt_ids(user("hi"), "Well. ")
    silent = CHATML.replace("m['content']", "m['content'] if m['role'] == 'user' else ''")
    with pytest.raises(DnoError, match=r"refuses a chat of roles \(user, assistant\)"):
        load(silent).prompt_ids(user("hi"), "Sure,")
    # "h" + "e" is one token: with the prefix "h" no continuation can contain it.
    with pytest.raises(DnoError, match="they part at token"):
        load(CHATML).response_ids(user("hi"), "ere", end_id=1, assistant_prefix="h")
    raw = load(None)
    assert raw.strip(raw.response_ids(user("a"), "ere", end_id=1, assistant_prefix="h")) == ["e", "r", "e", "</s>"]


def test_truncation_cuts_old_turns_then_the_last_question_from_its_left(load):
    chat = load(CHATML, special=("<|user|>", "<|assistant|>", "<|system|>"))
    messages = turns(
        "First question.", "An answer.", "Second one?", "Yes.", "The last question 🙂 of all.", system="Be brief."
    )
    prefix = "Sure,"

    def count(left):
        return len(chat.prompt_ids(left, prefix))

    def shorten(limit):
        return shorten_chat(messages, max_length=limit, count=count)

    full, least = count(messages), count([messages[0], *user(".")])
    head, tail = chat.prompt_ids(messages[:1])[:2], chat.prompt_ids(user("x"), prefix)[-len(b"<\nSure,") :]
    assert shorten(full) == tuple(messages)
    assert shorten(full - 1) == (messages[0], *messages[3:])
    lengths = set()
    for limit in range(least, full):
        left = shorten(limit)
        ids = chat.prompt_ids(left, prefix)
        assert len(ids) <= limit
        assert (left[0], left[-1].role) == (messages[0], "user")
        assert left[-1].content.strip()
        assert messages[-1].content.endswith(left[-1].content)
        assert left[1:-1] in [(), tuple(messages[3:-1])]
        assert (ids[:2], ids[-len(tail) :], ids.count(0)) == (head, tail, 1)
        lengths.add(len(ids))
    assert len(lengths) > 20
    assert shorten(least - 1) is None


def test_truncation_without_a_question_or_with_a_raw_text(load):
    raw = load(None)

    def count(left):
        return len(raw.prompt_ids(left))

    assert shorten_chat(user("abcdef"), max_length=4, count=count) == tuple(user("def"))
    only = turns(system="abcdef")
    assert shorten_chat(only, max_length=3, count=lambda left: len(left[0].content))[0].content == "def"


def test_one_end_token_is_trained_where_padding_is_the_end_token(load):
    """Positions, not ids, say what is padding, so the mask covers the one end id even if padding looks like it."""
    chat = load(CHATML, ends=[260, 0], special=("<|x|>", "<|end|>"))
    assert chat.end_ids == (1, 260, 0)
    prompt = chat.prompt_ids(user("hi"))
    whole = chat.response_ids(user("hi"), "yes", end_id=1)
    ended = (*chat.response_ids(user("hi"), "no", end_id=1)[:-1], 0)  # as if sampled: another end id, and the pad id
    cut = whole[:-1]  # finish == "length"
    batch = make_batch([TrainingRow((prompt, prompt), (whole, ended)), TrainingRow((prompt, prompt), (cut, whole))],
                       batch_size=4, max_length=64)  # fmt: skip
    trained = [[response_tokens(batch, p, c).tolist() for c in range(2)] for p in range(2)]
    assert trained == [[list(whole), list(ended)], [list(cut), list(whole)]]
    ends = [[sum(token in chat.end_ids for token in row) for row in pair] for pair in trained]
    assert ends == [[1, 1], [0, 1]]
    assert not batch.num_tokens[0, 2:].any()


# The real templates, each with a tokenizer that has the tokens it writes: (name, tokenizer, what comes of it).
#   fits: prompt and response ids concatenate to the whole chat's.    parts: they do not, and the tool says where.
#   thinks: they do where the response carries the thought that the prompt opens; without it, it is refused.
#   late BOS: they do, but stray line breaks stand before BOS: the lint refuses.    refuses: wants tools.
REAL = [
    ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "hermes", "refuses"),
    ("Qwen-Qwen2.5-7B-Instruct", "qwen", "fits"),
    ("chujiezheng-chatml", "hermes", "parts"),
    ("chujiezheng-llama-2-chat", "mistral", "late BOS"),
    ("chujiezheng-mistral-instruct", "mistral", "late BOS"),
    ("chujiezheng-vicuna", "mistral", "parts"),
    ("chujiezheng-zephyr", "zephyr", "parts"),
    ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "r1", "thinks"),
    ("google-gemma-2-2b-it", "gemma", "fits"),
    ("meta-llama-Llama-3.1-8B-Instruct", "llama3", "fits"),
    ("meta-llama-Llama-3.2-3B-Instruct", "llama3", "fits"),
    ("microsoft-Phi-3.5-mini-instruct", "phi3", "fits"),
    ("mistral-common-v1_spm", "mistral", "fits"),
    ("mistral-common-v2_spm", "mistral", "fits"),
    ("mistral-common-v3_spm", "mistral", "fits"),
    ("mistralai-Mistral-Nemo-Instruct-2407", "nemo", "fits"),
    ("trl-llama3", "llama3", "fits"),
    ("trl-qwen3", "qwen", "fits"),
    ("trl-qwen3_training", "qwen", "fits"),
]
_BAR, _GAP = "\uff5c", "\u2581"
_R1 = [f"<{_BAR}begin{_GAP}of{_GAP}sentence{_BAR}>", f"<{_BAR}end{_GAP}of{_GAP}sentence{_BAR}>"]
_R1 += [f"<{_BAR}User{_BAR}>", f"<{_BAR}Assistant{_BAR}>"]
_ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
# base, begin token, end token, tokens that the base lacks
FAMILIES = {
    "mistral": ("mistral", "<s>", "</s>", []),
    "zephyr": ("mistral", "<s>", "</s>", _ROLES),
    "nemo": ("qwen", "<s>", "</s>", ["<s>", "</s>", "[INST]", "[/INST]"]),
    "qwen": ("qwen", None, "<|im_end|>", []),
    "hermes": ("qwen", "<|begin_of_text|>", "<|im_end|>", ["<|begin_of_text|>"]),
    "llama3": ("qwen", "<|begin_of_text|>", "<|eot_id|>",
               ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]),
    "gemma": ("qwen", "<bos>", "<end_of_turn>", ["<bos>", "<start_of_turn>", "<end_of_turn>"]),
    "phi3": ("qwen", None, "<|end|>", [*_ROLES, "<|end|>"]),
    "r1": ("qwen", _R1[0], _R1[1], _R1),
}  # fmt: skip


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory):
    """Directories of real tokenizers, one a family of templates, made once."""
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}

    def make(family: str) -> Path:
        if family not in made:
            base, bos, eos, added = FAMILIES[family]
            source = shared_data / "tokenizers" / ("mistral_v1" if base == "mistral" else base)
            packed = source / "tokenizer.json.gz"
            text = gzip.decompress(packed.read_bytes()) if packed.exists() else (source / "tokenizer.json").read_bytes()
            tree = json.loads(text)
            config = json.loads((source / "tokenizer_config.json").read_text())
            first = 1 + max(*tree["model"]["vocab"].values(), *(token["id"] for token in tree["added_tokens"]))
            for number, content in enumerate(added, first):
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
                tree["added_tokens"].append({"id": number, "content": content, **flags})
                config.setdefault("added_tokens_decoder", {})[str(number)] = {"content": content, **flags}
            if added:  # else the tokenizer is left as it came
                config |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": bos}
            made[family] = folder / family
            made[family].mkdir()
            (made[family] / "tokenizer.json").write_text(json.dumps(tree))
            (made[family] / "tokenizer_config.json").write_text(json.dumps(config))
        return made[family]

    return make


@pytest.fixture(scope="module")
def load_real(shared_data, real):
    """(template, family) -> that tokenizer with that template, read once: a vocabulary of 150,000 takes a second."""

    @functools.cache
    def read(name: str, family: str) -> ChatTokenizer:
        return ChatTokenizer.load(real(family), str(shared_data / "tokenizers" / "templates" / f"{name}.jinja"))

    return read


CHATS = [
    *[user(text) for text in SENTENCES],
    turns("And before?", "It was **green**.", "And now?"),
    turns("One?", "Two.", "Three?", "Four.", "Five?"),
]


def test_all_19_templates_are_in_the_table(shared_data):
    files = {path.stem for path in (shared_data / "tokenizers" / "templates").glob("*.jinja")}
    assert files == {name for name, _, _ in REAL}
    assert len(REAL) == 19


@pytest.mark.parametrize(("name", "family", "verdict"), REAL)
def test_real_templates(load_real, name, family, verdict):
    chat = load_real(name, family)
    errors = {finding.name: finding.text for finding in lint(chat) if finding.level == "error"}
    assert bool(errors) == (verdict not in ("fits", "thinks")), errors
    if verdict == "refuses":
        assert "refuses a chat of roles (user)" in errors["question"]
        return
    for messages in CHATS:
        prompt = chat.prompt_ids(messages)
        dicts = [message.model_dump() for message in messages]
        options = {"chat_template": chat.template, "date_string": "26 Jul 2024", "return_dict": False}
        assert list(prompt) == chat._tokenizer.apply_chat_template(dicts, add_generation_prompt=True, **options)
        questions = 1 + len(messages) // 2
        bos = 0 if chat.bos_id is None else prompt.count(chat.bos_id)
        assert bos <= (questions if name == "chujiezheng-llama-2-chat" else 1)  # one a turn is that format
        if verdict != "late BOS" and verdict != "parts" and bos:
            assert prompt[0] == chat.bos_id
        for answer in ("A plain answer.", "def f(a):\n    return a ** 2  # so", "Größe, 東京, 🙂"):
            if verdict == "parts":
                with pytest.raises(DnoError, match=r"they part at token \d+: the prompt has .*, the chat "):
                    chat.response_ids(messages, answer, end_id=chat.end_ids[0])
                continue
            if verdict == "thinks":
                with pytest.raises(DnoError, match="the prompt opens a thought, and the response has none"):
                    chat.response_ids(messages, answer, end_id=chat.end_ids[0])
                thought = f"Hm.\n</think>\n\n{answer}"
                response = chat.response_ids(messages, thought, end_id=chat.end_ids[0])
                assert response == chat.response_ids(messages, f"<think>\n{thought}", end_id=chat.end_ids[0])
                assert chat.spelled(prompt + response) == chat.prompt_text(messages) + thought + _R1[1]
                continue
            response = chat.response_ids(messages, answer, end_id=chat.end_ids[0])
            whole = chat._tokenizer.apply_chat_template([*dicts, {"role": "assistant", "content": answer}], **options)
            assert list(prompt + response) == whole[: len(prompt + response)]
            assert (response[-1], sum(i in chat.end_ids for i in response)) == (chat.end_ids[0], 1)
            assert answer in chat.decode(response)
            # Sampled ids -> text -> ids: what the template adds on its own (Qwen3's empty <think>) is left out.
            said = chat.decode(response)
            if said.strip() == answer:
                assert chat.response_ids(messages, said, end_id=chat.end_ids[0]) == response
    if verdict == "late BOS":
        assert "stands at token" in errors["BOS"]
    if verdict == "parts":
        assert "they part at token" in errors["concatenation"]


@pytest.mark.parametrize(("name", "family"), [(name, family) for name, family, verdict in REAL if verdict == "fits"])
def test_real_templates_with_a_prefix_and_cut_to_a_length(load_real, name, family):
    chat = load_real(name, family)
    messages = turns("And before?", "It was **green**.", "Tell me a long story about the red fox and the sea.")
    prompt = chat.prompt_ids(messages, "Once upon")
    response = chat.response_ids(messages, " a time.", end_id=chat.end_ids[0], assistant_prefix="Once upon")
    assert prompt + response == chat.chat_ids(messages, "Once upon a time.")[: len(prompt + response)]
    assert chat.decode(response).strip() == "a time."
    limit = len(chat.prompt_ids(user("x"))) + 5
    left = shorten_chat(messages, max_length=limit, count=lambda chat_: len(chat.prompt_ids(chat_)))
    ids, header = chat.prompt_ids(left), chat.prompt_text(user("[x]")).rpartition("[x]")[2]
    assert len(left) == 1
    assert limit - 2 <= len(ids) <= limit
    # As text: a tokenizer may merge the question's full stop with a header that is no special token.
    assert header
    assert chat.prompt_text(left).endswith(left[0].content.strip() + header)
    assert chat.bos_id is None or (ids[0], ids.count(chat.bos_id)) == (chat.bos_id, 1)
    assert messages[-1].content.endswith(left[0].content)


def test_what_the_lint_says_of_real_templates(load_real):
    def found(name):
        return levels(load_real(name, next(family for known, family, _ in REAL if known == name)))

    assert "System role not supported" in found("google-gemma-2-2b-it")["warning", "system"]
    assert ("warning", "date") in found("meta-llama-Llama-3.1-8B-Instruct")
    assert ("warning", "date") in found("meta-llama-Llama-3.2-3B-Instruct")
    assert "with a system message" in found("mistralai-Mistral-Nemo-Instruct-2407")["warning", "concatenation"]
    assert "reasoning (<think>) of earlier turns" in found("trl-qwen3")["note", "turns"]
    assert "<think>" in found("trl-qwen3")["warning", "round trip"]
    assert "must carry theirs" in found("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B")["note", "thinking"]
    assert "with an empty thought before them" in found("trl-qwen3")["warning", "thinking"]
    assert "A line break before" in found("Qwen-Qwen2.5-7B-Instruct")["warning", "concatenation"]


def vectors(shared_data, name):
    folder = shared_data / "tokenizers" / "vectors"
    texts = (folder / f"{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [tuple(map(int, line.split())) for line in (folder / f"{name}.out").read_text().splitlines()]
    assert len(ids) > 40
    return list(zip(texts[: len(ids)], ids, strict=True))


def test_qwen2_vectors(shared_data, real):
    chat = ChatTokenizer.load(real("qwen"), "raw")
    for text, ids in vectors(shared_data, "qwen2"):
        assert chat.text_ids(text) == ids, text
        assert chat.decode(ids) == text
        prompt = chat.prompt_ids(user(text))
        assert prompt == ids


def test_texts_of_the_llama_vectors_round_trip_through_sentencepiece(shared_data, real):
    """Their ids are Llama 2's, whose vocabulary is not at hand: Mistral's has the same kind and other numbers."""
    chat = ChatTokenizer.load(real("mistral"), "raw")
    for text in filter(None, (text for text, _ in vectors(shared_data, "llama-spm"))):
        ids = chat.text_ids(text)
        assert ids[0] == chat.bos_id
        assert chat.decode(ids) == text
    # A response that follows a prompt gets no blank of its own, and keeps the one it has.
    prompt, said = chat.prompt_ids(user("Once upon")), chat.prompt_ids(user("a time"))[1:]
    assert (chat.decode(said), chat.decode(said, after=prompt)) == ("a time", " a time")
    response = chat.response_ids(user("Once upon a ti"), "me", end_id=2)
    assert chat.strip(response) == ["me", "</s>"]
