"""Text to token ids and back, through one path, so that a prompt and its response concatenate to the whole chat."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dno_jax.errors import DnoError
from dno_jax.model.hf.config_json import TOKENIZER_FILES, read_end_token_ids
from dno_jax.model.text.template_limits import apply_template, refuse_giants
from dno_jax.records import Message

# The day that templates take for today. Any would do, so long as it stays: this is the one that Llama 3's fall back on.
TEMPLATE_DATE = datetime.date(2024, 7, 26)

# Templates ask `strftime_now` for today. A macro of the same name hides it and answers with the pinned day.
# Its line break is eaten (trim_blocks), so that the template itself still begins at the start of a line.
_PINNED_NOW = (
    "{%- macro strftime_now(format) -%}{%- set found = namespace(text=format) -%}"
    "{%- for code, value in pinned_date.items() -%}{%- set found.text = found.text.replace(code, value) -%}"
    "{%- endfor -%}{{- found.text -}}{%- endmacro %}\n"
)
_DATE_CODES = ("%-d", "%-m", "%d", "%e", "%b", "%B", "%m", "%y", "%Y", "%a", "%A", "%j", "%H", "%I", "%M", "%S", "%p")


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with the way in which chats become one text.

    Attributes:
        path: directory it was read from.
        template: the Jinja text of the chat template; None means raw: contents concatenated, for base models.
        template_place: the file the template came from, for messages.
        date: the day that the template takes for today.
        end_ids: ids that end a response: the tokenizer's own first, then those of the checkpoint's eos_token_id.
        bos_id: id that begins a text, or None.
        vocab_size: one more than the largest id, added tokens included.
        digest: sha256 (hex) of the tokenizer's files, the template and the date: equal digests give equal ids.
    """

    path: Path
    template: str | None
    template_place: Path
    date: datetime.date
    end_ids: tuple[int, ...]
    bos_id: int | None
    vocab_size: int
    digest: str
    _tokenizer: Any = field(repr=False, compare=False)

    @classmethod
    def load(
        cls, path: str | Path, chat_template: str = "tokenizer", *, date: datetime.date = TEMPLATE_DATE
    ) -> ChatTokenizer:
        """Read a tokenizer from a directory; nothing is fetched and no code of the checkpoint is run.

        Args:
            path: directory with tokenizer files.
            chat_template: "tokenizer" (the template it brings), "raw" (none), or the path of a Jinja file.
            date: the date given to a template that writes today's.

        Raises:
            DnoError: the directory holds no tokenizer, it brings no template, the template's file is missing, or no end
                id is known.
        """
        path = Path(path)
        if not path.is_dir():
            raise DnoError(f"{path}: no such directory; expected a Hugging Face checkpoint with tokenizer files")
        refuse_giants(path / "chat_template.jinja", Path(chat_template))
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
            template_place=path if chat_template in ("tokenizer", "raw") else Path(chat_template),
            date=date,
            end_ids=end_ids,
            bos_id=tokenizer.bos_token_id,
            vocab_size=1 + max(tokenizer.get_vocab().values()),
            digest=_digest(path, template, date),
            _tokenizer=tokenizer,
        )

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that structure a text and that no message may spell.

        They are the tokens that the tokenizer marks as special (but not "unknown", which any word may be), begin and
        end ids, and the added tokens that the template writes around a question. Other added tokens, such as <think>,
        are words that a model may say.
        """
        added = self._tokenizer.added_tokens_decoder
        control = {i for i, token in added.items() if token.special}
        control |= {*self._tokenizer.all_special_ids, *self.end_ids, self.bos_id}
        with contextlib.suppress(DnoError):  # a template that refuses a question: whoever asks one is told
            control |= {i for i in self.prompt_ids([Message(role="user", content="x")]) if i in added}
        return frozenset(control - {None, self._tokenizer.unk_token_id})

    def control_tokens(self, *texts: str) -> list[str]:
        """Return the control tokens that the tokenizer would make of these texts, which would pass for structure."""
        return self.strip([i for text in texts for i in self._plain_ids(text) if i in self.control_ids])

    def prompt_ids(self, messages: Sequence[Message], assistant_prefix: str = "") -> tuple[int, ...]:
        """Return the ids after which a response begins: the chat so far, and the header of the assistant's turn.

        Args:
            assistant_prefix: words that the assistant has begun with, which the response continues.

        Raises:
            DnoError: the template refuses the messages or alters the prefix, or raw is asked to render more than one
                user message.
        """
        if self.template is None:
            return self._raw_ids(_raw_text(messages) + assistant_prefix)
        if not assistant_prefix:
            return self._apply(messages, add_generation_prompt=True)
        text = self.prompt_text(messages, assistant_prefix)
        if not text.endswith(assistant_prefix):
            raise DnoError(
                f"{self.template_place}: the chat template does not keep the assistant prefix {assistant_prefix!r}: "
                f"the prompt ends with {_shorten(text[-40:])}; give one without blanks at its ends, or another template"
            )
        return self._apply([*messages, _assistant(assistant_prefix)], continue_final_message=True)

    def prompt_text(self, messages: Sequence[Message], assistant_prefix: str = "") -> str:
        """Return the text whose ids are `prompt_ids`, for inspection; raises as it does."""
        if self.template is None:
            return _raw_text(messages) + assistant_prefix
        if not assistant_prefix:
            return self._apply(messages, tokenize=False, add_generation_prompt=True)
        return self._apply([*messages, _assistant(assistant_prefix)], tokenize=False, continue_final_message=True)

    def chat_ids(self, messages: Sequence[Message], response: str) -> tuple[int, ...]:
        """Return the ids of the whole chat as the template writes it, with what it writes after the response."""
        if self.template is None:
            return self._raw_ids(_raw_text(messages) + response)
        return self._apply([*messages, _assistant(response)])

    def chat_text(self, messages: Sequence[Message], response: str) -> str:
        """Return the text whose ids are `chat_ids`, for inspection."""
        if self.template is None:
            return _raw_text(messages) + response
        return self._apply([*messages, _assistant(response)], tokenize=False)

    def response_ids(
        self, messages: Sequence[Message], response: str, *, end_id: int, assistant_prefix: str = ""
    ) -> tuple[int, ...]:
        """Return the ids of a response after `prompt_ids(messages, assistant_prefix)`, closed by exactly one end id.

        Prompt and response together are the ids of the whole chat, so the ids are those that a model would have had to
        sample. What a template writes after the end id, such as a newline, is cut.

        Args:
            end_id: closes the response where the template writes no end id of its own.

        Raises:
            DnoError: the response spells a control token, or the whole chat does not begin with the prompt's ids.
        """
        self._refuse_control(response)
        prompt = self.prompt_ids(messages, assistant_prefix)
        whole = self.chat_ids(messages, assistant_prefix + response)
        if whole[: len(prompt)] != prompt:
            if self.template is not None:
                self._say_where_they_part(prompt, whole)
            # The last token of the prompt merges with the response's first: a model would never have sampled that.
            return (*self._following_ids(response), end_id)
        tail = whole[len(prompt) :]
        for index, token in enumerate(tail):
            if token in self.end_ids:
                return tail[: index + 1]
        return (*tail, end_id)

    def decode(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """Return text without special tokens.

        Args:
            after: ids that the text continues: a blank between them belongs to it, which SentencePiece would swallow
                at the beginning of a text.
        """

        def text(ids: Sequence[int]) -> str:
            return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

        head = text(after) if after else ""
        whole = text([*after, *ids])
        return whole[len(head) :] if whole.startswith(head) else text(ids)

    def strip(self, ids: Sequence[int]) -> list[str]:
        """Return each id's token as the vocabulary spells it, for inspection."""
        return [str(token) for token in self._tokenizer.convert_ids_to_tokens(list(ids))]

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Return what the tokenizer makes of a text of its own accord: with its begin token, if it has one."""
        return self._raw_ids(text)

    def num_tokens(self, text: str) -> int:
        """Return how many tokens a text has by itself, however long it is: it need not be one for this model."""
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def has_token(self, text: str) -> bool:
        """Return whether the vocabulary holds a text as one token."""
        return self._tokenizer.convert_tokens_to_ids(text) not in (None, self._tokenizer.unk_token_id)

    def _apply(self, messages: Sequence[Message], *, tokenize: bool = True, **options: bool) -> Any:
        """Render a chat: ids or, with tokenize=False, text; in Jinja's immutable sandbox, within limits."""
        chat = [{"role": message.role, "content": message.content} for message in messages]
        dated: dict[str, Any] = {"date_string": self.date.strftime("%d %b %Y")}
        template = self.template or ""
        if "strftime_now" in template:
            template = _PINNED_NOW + template
            dated["pinned_date"] = {code: self.date.strftime(code) for code in _DATE_CODES}
        try:
            # Ids directly, never text that is tokenised again: that doubles the BOS which the template wrote.
            made = apply_template(self._tokenizer, chat, chat_template=template, tokenize=tokenize, **options, **dated)
        except Exception as error:  # the template is a program of somebody else's: it may raise anything
            roles = ", ".join(message.role for message in messages)
            kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
            raise DnoError(
                f"{self.template_place}: the chat template refuses a chat of roles ({roles}): {kind}{error}"
            ) from None
        return tuple(made) if tokenize else made

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

    def _following_ids(self, text: str) -> tuple[int, ...]:
        """Tokenise a text that does not begin the line: SentencePiece puts a blank before one that does."""
        anchor, ids = self._plain_ids("\n"), self._plain_ids("\n" + text)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._plain_ids(text)

    def _refuse_control(self, response: str) -> None:
        for name in self.control_tokens(response):
            raise DnoError(
                f"the response spells the control token {name!r}: {_shorten(response)}; it would pass for the "
                "structure of the chat; remove it from the data"
            )

    def _say_where_they_part(self, prompt: tuple[int, ...], whole: tuple[int, ...]) -> None:
        at = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
        )
        window = slice(max(0, at - 3), at + 4)
        raise DnoError(
            f"{self.template_place}: with this chat template a chat does not begin with the ids of its prompt; they "
            f"part at token {at}: the prompt has {self.strip(prompt[window])}, the chat {self.strip(whole[window])}. "
            "Use a template whose generation prompt is what it also writes before the assistant's words"
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


def _end_ids(tokenizer: Any, path: Path) -> tuple[int, ...]:
    own = tokenizer.eos_token_id
    ids: tuple[int, ...] = () if own is None else (own,)
    # Without either file this is a bare tokenizer, and its own end token is all there is.
    if own is None or any((path / name).exists() for name in ("generation_config.json", "config.json")):
        ids += read_end_token_ids(path)
    return tuple(dict.fromkeys(ids))


def _assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


def _digest(path: Path, template: str | None, date: datetime.date) -> str:
    digest = hashlib.sha256()
    contents = [(name, (path / name).read_bytes()) for name in TOKENIZER_FILES if (path / name).is_file()]
    contents.append(("template", json.dumps([template, None if template is None else date.isoformat()]).encode()))
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
