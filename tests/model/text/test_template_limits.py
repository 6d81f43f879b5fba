"""Templates that loop or explode are refused at once and in bounded memory; others read as in transformers."""

import resource
import time

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dno_jax.errors import DnoError
from dno_jax.model.text import template_limits
from dno_jax.model.text.template_limits import TemplateError, apply_template
from dno_jax.model.text.tokenizer import ChatTokenizer

CHAT = [{"role": "system", "content": "Be brief. <b>&"}, {"role": "user", "content": "  Grüße\n'x' 東京 "}]


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "brief": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(autouse=True, scope="module")
def impatient():
    """A process that gives a chat less time than users' does: what never ends is tried often here."""
    template_limits._CHILD.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_limits, "CPU_SECONDS", 0.3)
        yield
        template_limits._CHILD.close()


def nested(body, depth=3):
    for index in range(depth):
        body = f"{{% for i{index} in range(99999) %}}{body}{{% endfor %}}"
    return body


DOUBLED = "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
LISTS = "{% set x = range(99999) | list %}{% for a in x %}{% for b in x %}{{ a - a }}{% endfor %}{% endfor %}"
MACRO = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(400) }}"
ONE_ROLE = "{% for m in messages %}{% if m.role == 'user' %}" + nested("") + "{% endif %}{% endfor %}"
EXPLODING = {
    "a product": "{{ 'a' * 3000000000 }}",
    "a product of lists": "{{ ([0] * 3000000000) | length }}",
    "a format": "{{ '%3000000000d' % 1 }}",
    "a format method": "{{ '{:>3000000000}'.format(1) }}",
    "a filled line": "{{ 'a'.ljust(3000000000) }}",
    "a filter": "{{ 'a' | center(3000000000) }}",
    "a doubled string": DOUBLED,
    "a power": "{{ 9 ** (9 ** 9) }}",
    "loops in loops": nested(""),
    "loops over a list": LISTS,
    "a macro that calls itself": MACRO,
    "too much text": "{% for i in range(99999) %}{{ 'a' * 100 }}{% endfor %}",
    "random text": "{{ lipsum(n=99999999) }}",
    "only where a user speaks": ONE_ROLE,
    "a giant template": "{# " + "x" * 2_000_000 + " #}",
    "deep brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
}


@pytest.mark.parametrize("name", EXPLODING)
def test_what_explodes_or_never_ends_is_refused(tokenizer, name):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(TemplateError) as told:
        apply_template(tokenizer, CHAT, chat_template=EXPLODING[name])
    assert str(told.value)
    assert len(str(told.value)) < 3000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB, of this process
    assert time.process_time() - started < 5
    assert apply_template(tokenizer, CHAT, chat_template="{{ messages[0].role }}", tokenize=False) == "system"


ORDINARY = [
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}",
    "{%- for m in messages -%}{{ m | tojson }}{{ m.content | tojson(indent=2) }}{%- endfor -%}",
    "{{ {'b': 1, 'a': [2, 'é<']} | tojson }}{{ {'b': 1, 'a': none} | tojson(sort_keys=true) }}",
    "{% set n = namespace(last=none) %}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}"
    "{% set n.last = m.role %}{% endfor %}{{ n.last }} {{ n.none }} {{ dict(a=1) }} {{ messages[0]['content'][:4] }}",
    "{% generation %}{{ messages[1].content }}{% endgeneration %}{% if add_generation_prompt %}A:{% endif %}",
    "{% if tools is not none %}tools{% endif %}{% if documents is defined %}d{% endif %}{{ enable_thinking }}",
    "    {% if true %}\n  x\n    {% endif %}\n  y  \n",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages | length) }}{{ range(3) | list }}{{ cycler('a').next() }}",
    "{{ messages | map(attribute='content') | join('|') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
]


@pytest.mark.parametrize("template", ORDINARY)
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True, "enable_thinking": False}])
def test_ordinary_templates_read_as_in_transformers(tokenizer, template, options):
    for tokenize in (True, False):
        expected = tokenizer.apply_chat_template(
            CHAT, chat_template=template, tokenize=tokenize, return_dict=False, **options
        )
        assert apply_template(tokenizer, CHAT, chat_template=template, tokenize=tokenize, **options) == expected


@pytest.mark.parametrize("content", ["It is", "It is ", " It\n"])
@pytest.mark.parametrize("filters", ["", " | trim"])
def test_a_message_is_continued_as_in_transformers(tokenizer, content, filters):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content" + filters + " }}</s>{% endfor %}"
    chat = [*CHAT, {"role": "assistant", "content": content}]
    options = {"chat_template": template, "tokenize": False, "continue_final_message": True}
    assert apply_template(tokenizer, chat, **options) == tokenizer.apply_chat_template(chat, **options)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only users') }}",
        "{{ messages.nothing.more }}",
        "{% for %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set n = namespace(_x=1) %}",
        "{{ 1 / 0 }}",
    ],
)
def test_refusals_have_the_kind_and_words_of_transformers(tokenizer, template):
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever it is
        tokenizer.apply_chat_template(CHAT, chat_template=template)
    with pytest.raises(TemplateError) as told:
        apply_template(tokenizer, CHAT, chat_template=template)
    assert type(told.value).__name__ == type(expected.value).__name__
    if "namespace" not in template:
        assert str(told.value) == str(expected.value)


def test_a_template_file_beyond_any_template_is_not_read(tmp_path):
    for name in ("chat_template.jinja", "mine.jinja"):
        folder = tmp_path / name
        folder.mkdir()
        with (folder / name).open("wb") as file:
            file.truncate(50_000_000_000)  # a hole: it takes no disk, and reading it would take all memory
        with pytest.raises(DnoError, match=rf"{name}: has 50,000,000,000 bytes"):
            ChatTokenizer.load(folder, "tokenizer" if name.startswith("chat") else str(folder / name))


def test_the_process_ends_with_its_owner(tokenizer):
    apply_template(tokenizer, CHAT, chat_template="x")
    assert template_limits._CHILD.close() == 0
    assert apply_template(tokenizer, CHAT, chat_template="x", tokenize=False) == "x"  # and is started again
