"""Tokenizer files to a tokenizer. The ids of tokenizer.json are the ids: no library's class replaces what it says."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dno_jax.errors import DnoError
from dno_jax.model.hf.config_json import TOKENIZER_FILES, read_end_token_ids
from dno_jax.model.hf.strangers import refuse_pointer

_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def read_tokenizer(path: Path) -> Any:
    """Read the tokenizer of a checkpoint directory; nothing is fetched and no code of the checkpoint is run.

    Where there is a tokenizer.json, it is taken as it is, whatever class tokenizer_config.json names: classes bring
    normalisers and pre-tokenizers of their own. From tokenizer_config.json come the names of special tokens, the chat
    template, and tokens that tokenizer.json lacks, which get the ids that follow.

    Raises:
        DnoError: there is no tokenizer, or a file of it cannot be read.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        return _without_tokenizer_json(path)
    from transformers import AddedToken, PreTrainedTokenizerFast

    refuse_pointer(file)
    settings = _settings(path)
    named, extra = _special_tokens(settings)
    template = _chat_template(path, settings)
    try:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(file), chat_template=template, extra_special_tokens=extra, **named
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        raise DnoError(_unreadable(file, error)) from None
    have = tokenizer.get_vocab()
    for token in _added_tokens(path, settings):
        if token["content"] not in have:
            tokenizer.add_tokens([AddedToken(**token)])
    return tokenizer


def _unreadable(file: Path, error: Exception) -> str:
    from tokenizers import __version__

    why = " ".join(str(error).split())[:300]
    return (
        f"{file}: the tokenizers library (version {__version__}) cannot read it: {why}\n"
        "It was written by a newer version of the library, or is damaged. Upgrade tokenizers, copy the file anew from "
        "where the checkpoint comes from, or save the tokenizer again with transformers' save_pretrained"
    )


def _without_tokenizer_json(path: Path) -> Any:
    """Let transformers convert the older files: SentencePiece models, or vocab.json and merges.txt."""
    models = [name for name in _SENTENCEPIECE if (path / name).is_file()]
    for name in models:
        refuse_pointer(path / name)
    lacking = [name for name in ("sentencepiece", "google.protobuf") if not _is_there(name)]
    if models and lacking and not (path / "vocab.json").is_file():
        raise DnoError(
            f"{path}: the tokenizer is a SentencePiece model ({models[0]}) without tokenizer.json, which takes "
            f"{' and '.join(lacking)} to read: pip install 'dno_jax[sentencepiece]', or save the tokenizer with "
            "transformers' save_pretrained, which writes tokenizer.json"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, mistral_format=False
        )
    except Exception as error:  # of three libraries and their converters
        why = " ".join(str(error).split())[:300]
        raise DnoError(
            f"{path}: cannot read a tokenizer: {why or type(error).__name__}; expected tokenizer.json and "
            "tokenizer_config.json, as transformers' save_pretrained writes them"
        ) from None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json; where that lists no tokens of its own, special_tokens_map.json has the last word."""
    settings = _json(path / "tokenizer_config.json")
    return settings if "added_tokens_decoder" in settings else settings | _json(path / "special_tokens_map.json")


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not file.is_file():
        return {}
    refuse_pointer(file)
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DnoError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise DnoError(f"{file}: expected a JSON object, got {type(tree).__name__}")
    return tree


def _special_tokens(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tokens that have a role (bos_token, ...), and further special ones; templates know the former by name."""
    named = {name: content for name in _NAMED if (content := _content(settings.get(name)))}
    further = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extra = [content for token in further if (content := _content(token))] if isinstance(further, list) else []
    by_name = further if isinstance(further, dict) else {}
    by_name = by_name | {name: value for name, value in settings.items() if name.endswith("_token")}
    own = {name: content for name, value in by_name.items() if name not in _NAMED and (content := _content(value))}
    return named | ({"model_specific_special_tokens": own} if own else {}), extra


def _content(token: Any) -> str:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _added_tokens(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens that stand beside tokenizer.json, in order of their ids, as AddedToken takes them."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, dict):
        tokens = [token for _, token in sorted(listed.items(), key=lambda item: int(item[0]))]
        return [
            {"content": content, **{flag: bool(token[flag]) for flag in flags if flag in token}}
            for token in tokens
            if isinstance(token, dict) and (content := _content(token))
        ]
    found = _json(path / "added_tokens.json")
    return [{"content": content, "normalized": False} for content in sorted(found, key=lambda name: int(found[name]))]


def _chat_template(path: Path, settings: dict[str, Any]) -> Any:
    """The template that the tokenizer brings: a file of its own comes before what the settings say."""
    file = path / "chat_template.jinja"
    if file.is_file():
        refuse_pointer(file)
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DnoError(f"{file}: cannot be read ({error}); expected a Jinja template in UTF-8") from None
    template = settings.get("chat_template") or _json(path / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
    if not isinstance(template, str | dict | None):
        raise DnoError(f"{path / 'tokenizer_config.json'}: chat_template is {template!r:.80}; expected Jinja text")
    return template


def choose_template(tokenizer: Any, chat_template: str, *, path: Path) -> str | None:
    """Return the template that a configuration asks for: the tokenizer's, none, or a file's."""
    if chat_template == "raw":
        return None
    if chat_template == "tokenizer":
        if not tokenizer.chat_template:
            raise DnoError(
                f"{path}: the tokenizer brings no chat template; set chat_template to 'raw' (a base model) or to the "
                "path of a Jinja file"
            )
        try:
            return tokenizer.get_chat_template()
        except ValueError as error:  # several templates, none of them the default
            raise DnoError(f"{path}: {error}; set chat_template to the path of a Jinja file") from None
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DnoError(
            f"chat_template {chat_template!r}: expected 'tokenizer', 'raw' or a readable Jinja file ({why})"
        ) from None


def find_end_ids(tokenizer: Any, path: Path) -> tuple[int, ...]:
    """Return the ids that end a response, the tokenizer's own first."""
    own = tokenizer.eos_token_id
    ids: tuple[int, ...] = () if own is None else (own,)
    # Without either file this is a bare tokenizer, and its own end token is all there is.
    if own is None or any((path / name).exists() for name in ("generation_config.json", "config.json")):
        ids += read_end_token_ids(path)
    return tuple(dict.fromkeys(ids))


def check_options(options: Mapping[str, Any], template: str | None) -> None:
    """Refuse options that do nothing, and those that are the chat itself."""
    own = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")
    for name in options:
        if name in own or name.startswith("_") or name.endswith("_token"):
            raise DnoError(
                f"model.template_options.{name}: is given by the run itself; expected an option of the template"
            )
        if template is None:
            raise DnoError(f"model.template_options.{name}: chat_template is raw, and there is no template to read it")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise DnoError(
                f"model.template_options.{name}: the chat template reads no such variable; remove it, or correct its "
                "name (many templates read enable_thinking)"
            )


def digest_of_files(path: Path, template: str | None, date: datetime.date, options: Mapping[str, Any]) -> str:
    """Return sha256 (hex) of everything that decides which ids a chat becomes."""
    digest = hashlib.sha256()
    contents = [(name, (path / name).read_bytes()) for name in TOKENIZER_FILES if (path / name).is_file()]
    contents.append(("template", json.dumps([template, None if template is None else date.isoformat()]).encode()))
    if options:
        contents.append(("options", json.dumps(options, sort_keys=True).encode()))
    for name, content in contents:
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
