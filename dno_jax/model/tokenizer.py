"""Text to token ids and back, through one path, so that a prompt and its response concatenate to the whole chat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dno_jax.errors import DnoError
from dno_jax.model.hf.config_json import TOKENIZER_FILES, read_end_token_ids
from dno_jax.records import Message


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with the way in which chats become one text.

    Attributes:
        path: directory it was read from.
        template: the Jinja text of the chat template; None means raw: contents concatenated, for base models.
        end_ids: ids that end a response: the tokenizer's own first, then those of the checkpoint's eos_token_id.
        bos_id: id that begins a text, or None.
        vocab_size: number of tokens, added ones included.
        digest: sha256 (hex) of the tokenizer's files and the template: equal digests give equal ids.
    """

    path: Path
    template: str | None
    end_ids: tuple[int, ...]
    bos_id: int | None
    vocab_size: int
    digest: str
    _tokenizer: Any = field(repr=False, compare=False)

    @classmethod
    def load(cls, path: str | Path, chat_template: str = "tokenizer") -> ChatTokenizer:
        """Read a tokenizer from a directory; nothing is fetched and no code of the checkpoint is run.

        Args:
            path: directory with tokenizer files.
            chat_template: "tokenizer" (the template it brings), "raw" (none), or the path of a Jinja file.

        Raises:
            DnoError: the directory holds no tokenizer, it brings no template, the template's file is missing, or no end
                id is known.
        """
        path = Path(path)
        if not path.is_dir():
            raise DnoError(f"{path}: no such directory; expected a Hugging Face checkpoint with tokenizer files")
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise DnoError(f"{path}: cannot read a tokenizer: {error}") from None
        template = _template(tokenizer, chat_template, path=path)
        end_ids = _end_ids(tokenizer, path)
        return cls(
            path=path,
            template=template,
            end_ids=end_ids,
            bos_id=tokenizer.bos_token_id,
            vocab_size=len(tokenizer),
            digest=_digest(path, template),
            _tokenizer=tokenizer,
        )

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the ids after which a response begins: the chat so far, and the header of the assistant's turn.

        Raises:
            DnoError: the template refuses the messages, or raw is asked to render more than one user message.
        """
        if self.template is None:
            return self._raw_ids(_raw_text(messages))
        return self._chat_ids(messages, add_generation_prompt=True)

    def response_ids(self, messages: Sequence[Message], response: str, *, end_id: int) -> tuple[int, ...]:
        """Return the ids of a response after `prompt_ids(messages)`, closed by exactly one end id.

        Prompt and response together are the ids of the whole chat, so the ids are those that a model would have had to
        sample. What a template writes after the end id, such as a newline, is cut.

        Args:
            end_id: closes the response where the template writes no end id of its own.

        Raises:
            DnoError: the response spells an end or begin token, or the whole chat does not begin with the prompt's ids.
        """
        self._refuse_control(response)
        prompt = self.prompt_ids(messages)
        if self.template is None:
            whole = self._raw_ids(_raw_text(messages) + response)
            if whole[: len(prompt)] == prompt:
                return (*whole[len(prompt) :], end_id)
            # The last token of the prompt merges with the response's first: a model would never have sampled that.
            return (*self._plain_ids(response), end_id)
        whole = self._chat_ids([*messages, Message(role="assistant", content=response)], add_generation_prompt=False)
        if whole[: len(prompt)] != prompt:
            self._say_where_they_part(prompt, whole)
        tail = whole[len(prompt) :]
        for index, token in enumerate(tail):
            if token in self.end_ids:
                return tail[: index + 1]
        return (*tail, end_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Return text without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def strip(self, ids: Sequence[int]) -> list[str]:
        """Return each id's token as the vocabulary spells it, for inspection."""
        return [str(token) for token in self._tokenizer.convert_ids_to_tokens(list(ids))]

    def _chat_ids(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> tuple[int, ...]:
        from jinja2 import TemplateError

        try:
            # Ids directly, never text that is tokenised again: that doubles the BOS which the template wrote.
            ids = self._tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                chat_template=self.template,
                tokenize=True,
                add_generation_prompt=add_generation_prompt,
                return_dict=False,
            )
        except (TemplateError, TypeError) as error:  # TypeError: the template asks for tools or the like
            roles = ", ".join(message.role for message in messages)
            raise DnoError(f"{self.path}: the chat template refuses a chat of roles ({roles}): {error}") from None
        return tuple(ids)

    def _raw_ids(self, text: str) -> tuple[int, ...]:
        ids = tuple(self._tokenizer(text)["input_ids"])
        plain = self._plain_ids(text)
        # Keep what the tokenizer puts before a text (BOS), drop what it puts after (EOS).
        for extra in range(len(ids) - len(plain) + 1):
            if ids[extra : extra + len(plain)] == plain:
                return ids[: extra + len(plain)]
        return ids

    def _plain_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _refuse_control(self, response: str) -> None:
        for token in self._plain_ids(response):
            if token in self.end_ids or token == self.bos_id:
                name = self.strip([token])[0]
                raise DnoError(
                    f"the response spells the control token {name!r} (id {token}): {_shorten(response)}; "
                    "it would end or restart the text there; remove it from the data"
                )

    def _say_where_they_part(self, prompt: tuple[int, ...], whole: tuple[int, ...]) -> None:
        at = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
        )
        window = slice(max(0, at - 3), at + 4)
        raise DnoError(
            f"{self.path}: with this chat template a chat does not begin with the ids of its prompt; they part at "
            f"token {at}: the prompt has {self.strip(prompt[window])}, the chat {self.strip(whole[window])}. Use a "
            "template whose generation prompt is what it also writes before the assistant's words"
        )


@dataclass(frozen=True)
class TemplateStrip:
    """One chat as the model sees it, and the part the loss covers.

    Attributes:
        ids: prompt and response.
        tokens: the same, as the vocabulary spells them.
        loss_start, loss_end: the loss covers ids[loss_start:loss_end].
        bos_count: begin tokens in `ids`; more than one is a fault of the template.
        end_trained: whether the last id under the loss ends a response, so that the model learns to stop.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    loss_start: int
    loss_end: int
    bos_count: int
    end_trained: bool


def template_strip(tokenizer: ChatTokenizer, messages: Sequence[Message], response: str) -> TemplateStrip:
    """Lay out one chat for `dno inspect`.

    Raises:
        DnoError: as ChatTokenizer.response_ids.
    """
    prompt = tokenizer.prompt_ids(messages)
    ids = prompt + tokenizer.response_ids(messages, response, end_id=tokenizer.end_ids[0])
    return TemplateStrip(
        ids=ids,
        tokens=tuple(tokenizer.strip(ids)),
        loss_start=len(prompt),
        loss_end=len(ids),
        bos_count=0 if tokenizer.bos_id is None else ids.count(tokenizer.bos_id),
        end_trained=ids[-1] in tokenizer.end_ids,
    )


def _template(tokenizer: Any, chat_template: str, *, path: Path) -> str | None:
    if chat_template == "raw":
        return None
    if chat_template == "tokenizer":
        if not tokenizer.chat_template:
            raise DnoError(
                f"{path}: the tokenizer brings no chat template; set chat_template to 'raw' (a base model) or to the "
                "path of a Jinja file"
            )
        return tokenizer.get_chat_template()
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise DnoError(
            f"chat_template {chat_template!r}: expected 'tokenizer', 'raw' or a readable Jinja file ({error.strerror})"
        ) from None


def _end_ids(tokenizer: Any, path: Path) -> tuple[int, ...]:
    own = tokenizer.eos_token_id
    ids: tuple[int, ...] = () if own is None else (own,)
    # Without either file this is a bare tokenizer, and its own end token is all there is.
    if own is None or any((path / name).exists() for name in ("generation_config.json", "config.json")):
        ids += read_end_token_ids(path)
    return tuple(dict.fromkeys(ids))


def _digest(path: Path, template: str | None) -> str:
    digest = hashlib.sha256()
    contents = [(name, (path / name).read_bytes()) for name in TOKENIZER_FILES if (path / name).is_file()]
    contents.append(("template", b"raw" if template is None else b"jinja" + template.encode()))
    for name, content in contents:
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _raw_text(messages: Sequence[Message]) -> str:
    roles = [message.role for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise DnoError(
            f"chat_template 'raw' renders one user message, after a system message or none; got roles {roles}; "
            "give a chat template"
        )
    return "".join(message.content for message in messages)


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
