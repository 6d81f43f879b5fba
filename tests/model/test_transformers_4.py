"""Exports as transformers 4 and llama.cpp's converter read them, in an environment of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from dno_jax.model import hf
from dno_jax.model.hf.rewritten import config_text, write_tokenizer
from tests.model.families import CASES, SHORT, SIZES
from tests.model.test_families import stir, torch_logits, torch_model
from tests.model.test_moe_models import COMMON
from tests.model.test_moe_models import FAMILIES as MIXTURES
from tests.model.test_towers import config_json
from tests.model.tokenizers import make_tokenizer

pytestmark = [pytest.mark.soak, pytest.mark.slow]
READ = """
import json, sys, numpy as np, torch, transformers
from gguf.vocab import SpecialVocab
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
models, tokenizers, out = json.loads(sys.stdin.read())
for name, path in models.items():
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        np.save(f"{out}/{name}.npy", model(torch.tensor(np.load(f"{out}/tokens.npy"))).logits.numpy())
found = {}
for name, (path, texts, chat) in tokenizers.items():
    tokenizer = AutoTokenizer.from_pretrained(path)
    found[name] = {
        "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "names": sorted(tokenizer("x")),
        "chat": tokenizer.apply_chat_template(chat, tokenize=False),
        "gguf": SpecialVocab(Path(path), load_merges=False).chat_template,
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def python_4() -> str:
    """An interpreter with transformers 4.57: DNO_TRANSFORMERS_4 names its environment, or it is made where it lacks."""
    from importlib.metadata import version

    folder = Path(os.environ.get("DNO_TRANSFORMERS_4") or Path(tempfile.gettempdir(), "dno-transformers-4"))
    python = folder / "bin" / "python"
    wanted = [f"torch=={version('torch').split('+')[0]}", "transformers==4.57.*", "safetensors", "gguf"]
    check = [str(python), "-c", "import torch, gguf, transformers as t; assert t.__version__.startswith('4.57')"]
    if not python.exists() or subprocess.run(check, capture_output=True, check=False).returncode:
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", "--retries", "1", *wanted],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no environment with {', '.join(wanted)}: {done.stderr.strip()[-300:]}")
    return str(python)


def read(python: str, models: dict[str, str], tokenizers: dict, out: Path) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", READ],
        input=json.dumps([models, tokenizers, str(out)]),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# It has no Ministral 3 and no Qwen 3.5.
ALL = {name: case.config_json for name, case in CASES.items() if name not in ("ministral3", "qwen3_5", "qwen3_5_odd")}
ALL |= {name: {**COMMON, **tree} for name, tree in MIXTURES.items()}
ALL["gemma3 that sees"] = config_json("gemma3")


def test_every_family_computes_the_same(tmp_path, python_4):
    """Logits of transformers 5 before and after config.json is written anew, and those of transformers 4 after it."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    token = np.random.default_rng(0).integers(SIZES["vocab_size"], size=(2, SHORT))
    np.save(tmp_path / "tokens.npy", token)
    expected, paths = {}, {}
    for seed, (name, tree) in enumerate(sorted(ALL.items())):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tree), attn_implementation="eager")
        stir(model, seed)
        path = tmp_path / name
        model.save_pretrained(path)
        expected[name] = torch_logits(torch_model(path), token)
        text = config_text(hf.read_config(path), source=path, dtype=None)
        (path / "config.json").write_text(text)
        assert config_text(hf.read_config(path), source=path, dtype=None) == text
        np.testing.assert_array_equal(torch_logits(torch_model(path), token), expected[name])
        paths[name] = str(path)
    read(python_4, paths, {}, tmp_path)
    differ = {name: float(np.abs(np.load(tmp_path / f"{name}.npy") - expected[name]).max()) for name in paths}
    # 5e-6: as test_families.py; rotations made by other sums may round apart.
    assert {name: found for name, found in differ.items() if found > 5e-6} == {}


TEXTS = ["Hello  world 12345\n\n  x\ty", "def f(x):\n    return  x+1 # c", "don't  stop </s> after", "Größe 東京 🙂"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}{# trained #}"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]


def tokenizers_of(folder: Path) -> dict[str, tuple[Path, str | None]]:
    """Source folders as others write them, each with the template that was trained with (None: its own)."""
    edits = {
        "named": {"tokenizer_class": "GPT2Tokenizer"},
        "written by transformers 5": {
            "tokenizer_class": "TokenizersBackend",
            "backend": "tokenizers",
            "extra_special_tokens": ["<|x|>"],
        },
        "code": {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}},
        "several": {"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]},
        "in a file": {"chat_template": "other"},
    }
    found = {}
    for name, edit in edits.items():
        path = make_tokenizer(folder / name, template="own {{ messages[0]['content'] }}", special=("<|x|>",))
        config = path / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **edit}))
        found[name] = path, TEMPLATE
    (folder / "in a file" / "chat_template.jinja").write_text(TEMPLATE)
    found["in a file"] = folder / "in a file", None
    return found


def test_tokenizers_and_templates_are_read_the_same(tmp_path, python_4):
    """The ids of tokenizer.json and the template that was trained with; llama.cpp's converter takes that one too."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    wanted = {}
    for name, (source, template) in tokenizers_of(tmp_path).items():
        target = tmp_path / f"{name}, exported"
        shutil.copytree(source, target)
        write_tokenizer(source, target, chat_template=template)
        wanted[name] = (str(target), TEXTS, CHAT)
    found = read(python_4, {}, wanted, tmp_path)
    for name, (path, texts, chat) in wanted.items():
        plain, five = Tokenizer.from_file(f"{path}/tokenizer.json"), AutoTokenizer.from_pretrained(path)
        ids = [plain.encode(text, add_special_tokens=False).ids for text in texts]
        assert found[name]["ids"] == ids == [five(text, add_special_tokens=False)["input_ids"] for text in texts], name
        assert found[name]["chat"] == five.apply_chat_template(chat, tokenize=False) == "Hi</s>yes</s>", name
        if name in ("named", "written by transformers 5"):
            assert found[name]["names"] == ["attention_mask", "input_ids"], name
        converted = found[name]["gguf"]
        if isinstance(converted, list):
            converted = next(one["template"] for one in converted if one["name"] == "default")
        assert converted == TEMPLATE, name
