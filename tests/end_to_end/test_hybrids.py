"""The whole loop on models most of whose layers do not attend, with chat templates built as their makers' are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dno_jax import iteration
from dno_jax.config import RunConfig, parse_config
from dno_jax.data.prompts import load_prompts
from dno_jax.model import hf
from dno_jax.model.hf.config_json import parse_config as parse_model
from dno_jax.model.params import abstract_params
from dno_jax.model.text.templates import lint
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.records import Rollout
from dno_jax.run_dir import RunDir
from dno_jax.training.checkpoint import policy_fingerprint
from tests.configured import deep_merge
from tests.model.checkpoints import torch_logits
from tests.model.conftest import run
from tests.model.test_peft import QUIET, by_peft
from tests.model.test_peft import TOKEN as PEFT_TOKEN
from tests.model.test_towers import TOWERS, tensors_of, their_logits
from tests.running import export
from tests.small import WORDS, small_tree, write_prompts

pytestmark = pytest.mark.soak  # each run compiles for half a minute

TURN = "{{- '<|im_start|>' + m.role + '\\n' + CONTENT + '<|im_end|>\\n' }}"
# As Qwen 3.5's: the thought of every answer after the last question stands in the chat, an empty one where it brings
# none; those before are left out. A prompt opens a thought, or closes an empty one at once.
QWEN = """{%- set last = namespace(index=messages|length - 1) %}
{%- for m in messages[::-1] %}
    {%- if m.role == 'user' and last.index == messages|length - 1 %}
        {%- set last.index = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set said = m.content|trim %}
    {%- if m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in said %}
            {%- set thought = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > last.index %}
            {%- set said = '<think>\\n' + thought|trim + '\\n</think>\\n\\n' + said %}
        {%- endif %}
    {%- endif %}
    TURN
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}""".replace("TURN", TURN.replace("CONTENT", "said"))
# As LFM2's: every text begins with a token of its own, and thoughts of earlier answers are left out.
LFM2 = """{{- bos_token }}
{%- for m in messages %}
    {%- set said = m.content %}
    {%- if m.role == 'assistant' and not loop.last and '</think>' in said %}
        {%- set said = said.split('</think>')[-1]|trim %}
    {%- endif %}
    TURN
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""".replace(
    "TURN", TURN.replace("CONTENT", "said")
)
SPECIAL = ("<|pad|>", "<|startoftext|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 3,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        "architectures": ["Qwen3_5ForCausalLM"],
        **SIZES,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    },
    "lfm2": {
        "model_type": "lfm2",
        "architectures": ["Lfm2ForCausalLM"],
        **{key: value for key, value in SIZES.items() if key != "intermediate_size"},
        "num_hidden_layers": 2,
        "bos_token_id": 1,
        "norm_eps": 1e-5,
        "block_ff_dim": 72,
        "block_multiple_of": 8,
        "full_attn_idxs": [1],
        "rope_theta": 10000.0,
    },
}
TEMPLATES = {"qwen3_5": QWEN, "lfm2": LFM2}
# What is run: a model, and what its template is told.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("lfm2", {}),
    "qwen3_5 that answers at once": ("qwen3_5", {"enable_thinking": False}),
    "qwen3_5 that thinks": ("qwen3_5", {}),
}


def write_model(path: Path, name: str) -> Path:
    """Write a checkpoint of random weights that makes peaked distributions, and a tokenizer that keeps every blank."""
    source = path.parent / f"{name}-source"
    source.mkdir()
    words = [part + word for part in ("", " ") for word in (*WORDS, "system", "user", "assistant", ".")]
    names = [*SPECIAL, "<unk>", "\n", " ", "<think>", "</think>", *words]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[a-z]+| ?\.| "), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    tokenizer.save(str(source / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    settings |= {"unk_token": "<unk>", "chat_template": TEMPLATES[name]}
    if name == "lfm2":
        settings["bos_token"] = "<|startoftext|>"
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    tree = {**MODELS[name], "vocab_size": len(names)}
    (source / "config.json").write_text(json.dumps(tree))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    config = parse_model(tree, place=name)
    random = np.random.default_rng(0)

    def draw(at: Any, leaf: Any) -> np.ndarray:  # much as tests/small.py, and compiles nothing
        kind = at[-1].key
        if leaf.ndim < 3 and kind != "embed":  # norms, and numbers of each head
            return np.full(leaf.shape, kind in ("delta_norm", "delta_shift") or 1.0 - config.norm_offset, np.float32)
        scale = 0.24 if kind == "embed" else 0.1
        return (scale * random.standard_normal(leaf.shape)).astype(np.float32)

    params = jax.tree.map_with_path(draw, abstract_params(config))
    params["embed"][[names.index(end) for end in ("<|im_end|>", "</think>")]] *= 1.5  # texts and thoughts do end
    hf.save(path, config, params, source=source)
    return path


def put_beside_a_tower(path: Path) -> None:
    """Lay a Qwen 3.5 out as it is published: inside of a model that sees, beside a head for further tokens."""
    pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = json.loads((path / "config.json").read_text())
    vision = TOWERS["qwen3_5"]["vision_config"] | {"out_hidden_size": text["hidden_size"]}
    tree = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text}
    tree |= {"vision_config": vision, "tie_word_embeddings": True}
    tree |= {f"{what}_token_id": number for number, what in enumerate(("image", "video", "vision_start"))}
    (path / "config.json").write_text(json.dumps(tree))
    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**tree)).state_dict()
    tensors = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors_of(path).items()}
    tensors |= {name: tensor.numpy() for name, tensor in whole.items() if name.startswith("model.visual.")}
    tensors["mtp.fc.weight"] = np.ones((4, 8), np.float16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def config_of(folder: Path, form: str, **changes: Any) -> RunConfig:
    """A configuration of the whole loop, over a model, prompts and gold responses that this writes."""
    name, options = FORMS[form]
    write_model(folder / "checkpoint", name)
    if form.endswith("that thinks"):
        put_beside_a_tower(folder / "checkpoint")
    for file, count, seed in (("prompts", 8, 0), ("held_out", 4, 1)):
        path = write_prompts(folder / f"{file}.jsonl", count, seed=seed)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if form.endswith("that thinks"):
            rows = [{**row, "gold": f"<think>\nbam fon\n</think>\n\n{row['gold']}"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {
        "iterations": 1,
        "model": {"chat_template": "tokenizer", "template_options": options, "remat": "none"},
        "prompts": {"max_length": 32},
        "sampling": {"max_new_tokens": 32},
    }
    return parse_config(RunConfig, deep_merge(deep_merge(small_tree(folder), small), changes), place="test")


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_loop(tmp_path, form):
    """Samples are what the trainer scores, training moves the policy, and transformers computes what was trained."""
    config = config_of(tmp_path, form)
    tokenizer = ChatTokenizer.load(config.model.path, options=config.model.template_options)
    assert [finding.text for finding in lint(tokenizer) if finding.level == "error"] == []
    iteration.run(config)
    run_dir = RunDir(config.run_dir)
    rows = list(run_dir.stage("sample", 0).read(Rollout))
    opening = "<think>\n" if form.endswith("that thinks") else ""  # the prompt's end, which a gold response repeats
    assert {row.text.removeprefix(opening) for row in rows} == {tokenizer.decode(row.token_ids) for row in rows}
    prompts = load_prompts(config.prompts.path)
    thinks = [tokenizer.opens_thought(tokenizer.prompt_ids(prompt.messages)) for prompt in prompts]
    assert set(thinks) == {form.endswith("that thinks")}
    steps = [row for row in run_dir.read_metrics() if row["stage"] == "train"]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert policy_fingerprint(run_dir.policy(0)) != policy_fingerprint(run_dir.policy(1))
    assert 0 < run_dir.stage("sample", 0).require().details["audit"]["error"] < 1e-5
    token = np.random.default_rng(0).integers(5, 60, size=(2, 24))
    out = tmp_path / "out"  # the export of the run is of the best policy, which may be the first
    export(config, policy=1, path=str(out))
    model, params = hf.load(out)
    base = hf.load(config.model.path)[1]
    ours = run(model, params, token)
    assert np.abs(ours - run(model, base, token)).max() > 1e-3
    carried = {name for name in tensors_of(out) if name.startswith(("model.visual.", "mtp."))}
    assert bool(carried) == form.endswith("that thinks")
    theirs = their_logits(out, token) if carried else torch_logits(out, token)
    np.testing.assert_allclose(theirs, ours, atol=2e-5)
    for name in carried:
        assert tensors_of(out)[name].tobytes() == tensors_of(Path(config.model.path))[name].tobytes()


@QUIET
@pytest.mark.parametrize(
    ("form", "targets"),
    [("qwen3_5 that answers at once", "all"), ("lfm2", ["in_proj", "out_proj", "w2", "q_proj"])],
)
def test_a_run_that_trains_adapters_gives_peft_its_own(tmp_path, form, targets):
    config = config_of(tmp_path, form, adapter={"rank": 4, "alpha": 8, "targets": targets})
    iteration.run(config)
    run_dir, out = RunDir(config.run_dir), tmp_path / "out"
    steps = [row for row in run_dir.read_metrics() if row["stage"] == "train"]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert 0 < run_dir.stage("sample", 0).require().details["audit"]["error"] < 1e-5
    export(config, policy=1, path=str(out))
    merged = torch_logits(out, PEFT_TOKEN)
    assert np.abs(merged - torch_logits(config.model.path, PEFT_TOKEN)).max() > 1e-3
    np.testing.assert_allclose(by_peft(config.model.path, out / "adapter"), merged, atol=1e-4)
