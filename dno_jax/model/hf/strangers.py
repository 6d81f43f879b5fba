"""What lies where a checkpoint is expected, and is none that can be read: said by its name, with what to do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from dno_jax.errors import DnoError

_POINTER = b"version https://git-lfs"
# What wraps a model when its state is saved unwrapped by nobody: prefix of every name -> who puts it there.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "module.": "DistributedDataParallel or DeepSpeed",
    "base_model.model.": "PEFT",
    "pretrained_model.": "TRL's value head",
}
_SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")


def refuse_pointer(file: Path) -> None:
    """Raise DnoError if a file is what Git puts in the place of a large file that it has not fetched."""
    with file.open("rb") as opened:
        beginning = opened.read(len(_POINTER))
    if beginning == _POINTER:
        raise DnoError(
            f"{file}: a Git LFS pointer of {file.stat().st_size} bytes, not the file itself: the repository was cloned "
            f"without its large files; run `git lfs install && git lfs pull` in {file.parent}"
        )


def refuse_folder(path: Path) -> NoReturn:
    """Raise DnoError for a directory without model.safetensors or its index, saying what it is instead."""
    raise DnoError(f"{path}: neither model.safetensors nor model.safetensors.index.json; {_what_it_is(path)}")


def missing_config(path: Path) -> str:
    """Say what a directory without config.json is."""
    return f"{path / 'config.json'}: no such file; {_what_it_is(path)}"


def _what_it_is(path: Path) -> str:
    names = sorted(file.name for file in path.iterdir())

    def first(*patterns: str) -> str | None:
        return next((name for name in names for pattern in patterns if re.fullmatch(pattern, name)), None)

    if first(r"adapter_config\.json", r"adapter_model\..*"):
        return (
            f"this is a PEFT adapter ({first(r'adapter.*')}), changes to another model and no model itself: merge it "
            "into its base and save that (AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()"
            ".save_pretrained(...), and the tokenizer's save_pretrained), then give that directory; to train it on, "
            "give its base as model.path and this as adapter.path"
        )
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        found = _SHARD.fullmatch(shards[0])
        assert found is not None
        if int(found[1]) == len(shards) == 1:
            return f"the whole model is in {shards[0]}: rename that to model.safetensors"
        return (
            f"{len(shards)} of {int(found[1])} shards are here ({shards[0]}"
            f"{', ...' if len(shards) > 1 else ''}) without the index that says what is in which: fetch the checkpoint "
            "again, all of it"
        )
    if name := first(r".*\.gguf"):
        return f"{name} is llama.cpp's format; give the Hugging Face checkpoint that it was made from (safetensors)"
    if name := first(r"consolidated.*\.(safetensors|pth)", r"params\.json", r"tokenizer\.model\.v\d.*"):
        return f"{name} is of the maker's own layout; give the repository's Hugging Face files (model*.safetensors)"
    if name := first(r"pytorch_model.*\.(bin|json)", r".*\.(bin|pt|pth|ckpt|h5|msgpack)"):
        return (
            f"only safetensors checkpoints can be read, and {name} may run code when it is opened: load it where you "
            "trust it and save it anew (model.save_pretrained writes safetensors)"
        )
    if name := first(r"global_step\d+", r".*\.distcp", r"pytorch_model_fsdp.*", r"checkpoint-\d+", r"zero_to_fp32\.py"):
        return (
            f"{name} is a trainer's state: give the directory of a saved model, or save one (trainer.save_model; "
            "zero_to_fp32.py for DeepSpeed)"
        )
    if name := first(r".*\.safetensors"):
        return f"{name} is none of the names of a whole model; expected model.safetensors, or shards with their index"
    return "only safetensors checkpoints can be read: model.safetensors, or shards with their index"


def wrapper_of(names: Iterable[str]) -> str | None:
    """Say what wrapped the model whose tensors have these names; None where nothing did."""
    names = list(names)
    found = [re.match(r"(?:model\.)?(\S+?\.)(?:model\.)?(?:layers\.\d+|embed_tokens)\.", name) for name in names]
    prefixes = Counter(match[1] for match in found if match is not None)
    if not prefixes:
        return None
    prefix, count = prefixes.most_common(1)[0]
    if count < len(names) / 2 or prefix == "model.":
        return None
    who = _WRAPPERS.get(prefix, "something")
    return (
        f"names of tensors hold {prefix!r} ({names[0]}): {who} was around the model when it was saved. Save the model "
        f"inside (unwrap it, then save_pretrained), or take {prefix!r} out of every name"
    )
