import json

import pytest

from dno_jax.data.prompts import TokenizedPrompt, load_prompts, split_prompts, tokenize_prompts
from dno_jax.data.sources import read_rows
from dno_jax.errors import DnoError
from dno_jax.runtime.runtime import load_tokenizer


def write(path, count):
    path.write_text("".join(json.dumps({"prompt": f"bam {i}"}) + "\n" for i in range(count)))
    return str(path)


def test_short_and_long_rows_are_read(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "bam", "gold": "dom"}\n\n'
        '{"prompt_id": "x", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}\n'
    )
    first, second = load_prompts(str(path))
    assert (first.messages[0].content, first.gold, len(first.prompt_id)) == ("bam", "dom", 16)
    assert (second.prompt_id, second.gold, len(second.messages)) == ("x", None, 2)
    assert load_prompts(str(path))[0].prompt_id == first.prompt_id


def test_disjoint_parts_cover_everything_once(make_config, tmp_path):
    path = write(tmp_path / "p.jsonl", 11)
    config = make_config(iterations=3, prompts={"path": path, "held_out": 2, "held_out_path": None})
    split = split_prompts(config)
    ids = [prompt.prompt_id for part in (*split.training, split.held_out) for prompt in part]
    assert len(ids) == len(set(ids)) == 11
    assert [len(part) for part in split.training] == [3, 3, 3]
    assert split_prompts(config) == split
    assert split_prompts(config.model_copy(update={"seed": 4})).held_out != split.held_out


def test_shared_prompts_are_the_same_in_every_iteration(make_config, tmp_path):
    path = write(tmp_path / "p.jsonl", 5)
    config = make_config(iterations=3, prompts={"path": path, "held_out": 1, "held_out_path": None, "split": "shared"})
    split = split_prompts(config)
    assert split.training[0] == split.training[1] == split.training[2]
    assert len(split.training[0]) == 4


def test_too_long_prompts_are_an_error_or_dropped_and_counted(make_config, tmp_path):
    config = make_config()
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": "bam " * count}) + "\n" for count in (3, 4, 24, 5)))
    prompts, tokenizer = load_prompts(str(path)), load_tokenizer(config.model)
    with pytest.raises(DnoError, match=r"has 25 tokens, prompts\.max_length is 16"):
        tokenize_prompts(prompts, tokenizer=tokenizer, config=config)

    def tokenized(too_long, total=None):
        section = config.prompts.model_copy(update={"too_long": too_long})
        sampling = config.sampling.model_copy(update={"max_total_tokens": total})
        changed = config.model_copy(update={"prompts": section, "sampling": sampling})
        return tokenize_prompts(prompts, tokenizer=tokenizer, config=changed)

    kept, dropped = tokenized("drop")
    assert [len(item.token_ids) for item in kept] == [4, 5, 6]
    assert dropped == {"prompt too long": 1}
    # A response needs a token of the total.
    kept, dropped = tokenized("drop", total=6)
    assert [len(item.token_ids) for item in kept] == [4, 5]
    assert dropped == {"prompt too long": 2}
    with pytest.raises(DnoError, match=r"has 6 tokens, sampling\.max_total_tokens is 6, of which a response needs one"):
        tokenize_prompts(
            prompts[3:],
            tokenizer=tokenizer,
            config=config.model_copy(update={"sampling": config.sampling.model_copy(update={"max_total_tokens": 6})}),
        )
    assert [len(item.token_ids) for item in tokenized("truncate", total=6)[0]] == [4, 5, 5, 5]
    kept, dropped = tokenized("truncate")
    assert [(len(item.token_ids), item.truncated) for item in kept] == [(4, False), (5, False), (6, False), (16, True)]
    assert (kept[-1].token_ids[0], not dropped) == (1, True)
    assert tokenizer.prompt_ids(kept[-1].prompt.messages) == kept[-1].token_ids


def test_prompts_that_spell_control_tokens_are_dropped_and_counted(make_config, tmp_path):
    config = make_config()
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "bam dom"}\n{"prompt": "bam </s> dom"}\n{"prompt": "bam", "assistant_prefix": "<s>"}\n')
    kept, dropped = tokenize_prompts(load_prompts(str(path)), tokenizer=load_tokenizer(config.model), config=config)
    assert [item.prompt.messages[0].content for item in kept] == ["bam dom"]
    assert dropped == {"prompt spells a control token": 2}


def test_prompts_may_hold_separators_that_are_no_line_breaks(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes('{"prompt": "a\u2028b"}\r\n{"prompt": "c\u2029d\x85e"}\n'.encode())
    assert [prompt.messages[0].content for prompt in load_prompts(str(path))] == ["a\u2028b", "c\u2029d\x85e"]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (r'{"messages": [{"role": "user", "content": "bam \udc00"}]}', "messages"),
        (r'{"prompt": "bam", "assistant_prefix": "\ud83d"}', "assistant_prefix"),
        (r'{"prompt": "bam", "gold": "\ude00\ud83d"}', "gold"),
        (r'{"prompt": "bam", "candidates": [{"text": "dom"}, {"text": "\ud83d dom"}]}', "candidates"),
        (r'{"prompt": "bam", "response": "\ud83d"}', "response"),
        (r'{"prompt": "bam", "\ud83d": "dom"}', "a name"),
    ],
)
def test_half_of_a_character_is_named_in_every_text(tmp_path, row, field):
    path = tmp_path / "p.jsonl"
    path.write_text(r'{"prompt": "\ud83d\ude00"}' + "\n" + row)
    with pytest.raises(DnoError, match=rf"p\.jsonl:2: {field}: '.*' holds '\\ud[89a-f].*', half of a surrogate pair"):
        list(read_rows(str(path)))
    path.write_text(r'{"prompt": "\ud83d\ude00"}')
    assert load_prompts(str(path))[0].messages[0].content == "\U0001f600"


def test_names_of_prompts_are_stable(tmp_path):
    prompt = load_prompts(write(tmp_path / "p.jsonl", 1))[0].model_copy(update={"prompt_id": "p"})
    # The first 4 bytes of sha256("p"): part of every sampler key, so it must never change.
    assert TokenizedPrompt(prompt, (1,)).name == 0x148DE9C5


@pytest.mark.parametrize(
    ("rows", "held_out"),
    [
        ('{"prompt": "Is it so?"}\n{"prompt": "b"}\n{"prompt": "c"}\n', '{"prompt": "x"}\n{"prompt": "is it SO"}\n'),
        ('{"prompt": "a"}\n{"prompt": "b"}\n', '{"instruction": "a", "output": "c"}\n'),
        ('{"prompt_id": "p", "prompt": "a"}\n{"prompt": "b"}\n', '{"prompt_id": "p", "prompt": "c"}\n'),
    ],
    ids=["words", "another-form", "id"],
)
def test_held_out_prompts_that_are_trained_on_are_refused(make_config, tmp_path, rows, held_out):
    (tmp_path / "p.jsonl").write_text(rows)
    (tmp_path / "h.jsonl").write_text(held_out)
    paths = {"path": str(tmp_path / "p.jsonl"), "held_out_path": str(tmp_path / "h.jsonl")}
    with pytest.raises(DnoError, match=r"h\.jsonl: held-out prompt '.*', is also in .*p\.jsonl, as '"):
        split_prompts(make_config(prompts=paths))


def test_prompts_set_aside_from_a_file_with_repetitions_leak_none(make_config, tmp_path):
    rows = [{"prompt": text} for text in ("One?", "one", "Two?", "two", "Three?", "four", "five")]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = split_prompts(make_config(prompts={"path": str(path), "held_out": 2, "held_out_path": None}))
    assert len(split.held_out) + sum(map(len, split.training)) == 5
    assert "left out: 2 x repeats another's words" in split.lines[0]
    path.write_text("".join(json.dumps(row | {"prompt_id": str(i)}) + "\n" for i, row in enumerate(rows[:2])))
    with pytest.raises(DnoError, match="is also in"):  # kept apart by name, and each on one side
        split_prompts(make_config(iterations=1, prompts={"path": str(path), "held_out": 1, "held_out_path": None}))
