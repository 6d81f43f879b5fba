import json

import pytest

from dno_jax.errors import DnoError
from dno_jax.stages.prompts import TokenizedPrompt, load_prompts, split_prompts, tokenize_prompts


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
    prompts = load_prompts(write(tmp_path / "p.jsonl", 4))

    def encode(messages):
        return tuple(range(5 + 20 * messages[0].content.endswith("3")))

    with pytest.raises(DnoError, match=r"has 25 tokens, prompts\.max_length is 16"):
        tokenize_prompts(prompts, encode=encode, section=config.prompts)
    section = config.prompts.model_copy(update={"too_long": "drop"})
    kept, dropped = tokenize_prompts(prompts, encode=encode, section=section)
    assert len(kept) == 3
    assert dropped == {"prompt too long": 1}


def test_names_of_prompts_are_stable(tmp_path):
    prompt = load_prompts(write(tmp_path / "p.jsonl", 1))[0].model_copy(update={"prompt_id": "p"})
    # The first 4 bytes of sha256("p"): part of every sampler key, so it must never change.
    assert TokenizedPrompt(prompt, (1,)).name == 0x148DE9C5
