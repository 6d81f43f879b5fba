"""Text to token ids and back, through one path, so that a prompt and its response concatenate to the whole chat."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dno_jax.errors import DnoError
from dno_jax.model.text.control import STAND_IN, between_messages, is_blank, is_mark, is_said
from dno_jax.model.text.dates import TEMPLATE_DATE, pinned
from dno_jax.model.text.loading import check_options, choose_template, digest_of_files, find_end_ids, read_tokenizer
from dno_jax.model.text.template_limits import apply_template, refuse_giants
from dno_jax.reasoning import after_opening, opens_thought, split_thought, without_thought_at_end
from dno_jax.records import Message


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
        digest: sha256 (hex) of the tokenizer's files, the template, its date and options: equal digests give equal ids.
        num_rows: rows of the model's embedding; None where no model is known, so that every id has one.
        options: what the template is told besides, such as enable_thinking.
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
    num_rows: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        path: str | Path,
        chat_template: str = "tokenizer",
        *,
        date: datetime.date = TEMPLATE_DATE,
        options: Mapping[str, Any] | None = None,
        num_rows: int | None = None,
    ) -> ChatTokenizer:
        """Read a tokenizer from a directory; nothing is fetched and no code of the checkpoint is run.

        Args:
            path: directory with tokenizer files.
            chat_template: "tokenizer" (the template it brings), "raw" (none), or the path of a Jinja file.
            date: the date given to a template that writes today's.
            options: further variables of the template.
            num_rows: rows of the model's embedding, where it is known.

        Raises:
            DnoError: the directory holds no tokenizer, it brings no template, the template's file is missing, or no end
                id is known.
        """
        path = Path(path)
        if not path.is_dir():
            raise DnoError(f"{path}: no such directory; expected a Hugging Face checkpoint with tokenizer files")
        refuse_giants(path / "chat_template.jinja", Path(chat_template))
        tokenizer = read_tokenizer(path)
        template = choose_template(tokenizer, chat_template, path=path)
        check_options(options or {}, template)
        end_ids = find_end_ids(tokenizer, path)
        return cls(
            path=path,
            template=template,
            template_place=path if chat_template in ("tokenizer", "raw") else Path(chat_template),
            date=date,
            end_ids=end_ids,
            bos_id=tokenizer.bos_token_id,
            vocab_size=1 + max(tokenizer.get_vocab().values()),
            digest=digest_of_files(path, template, date, options or {}),
            _tokenizer=tokenizer,
            num_rows=num_rows,
            options=dict(options or {}),
        )

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that structure a text and that no message may spell.

        They are the tokens that the tokenizer marks as special, begin and end ids, and the added tokens by which the
        template could end or open a turn. Left out are blanks, what a model may say (<think>, plain words), and the
        unknown token, which any word may be, unless it begins, ends or pads too.
        """
        between = {i for piece in between_messages(self.prompt_text) for i in self._plain_ids(piece)}
        written = {i for i in between if i in self._added and is_mark(self._spelling(i))}
        needed = {i for i in (self.bos_id, *self.end_ids) if i is not None and not is_blank(self._spelling(i))}
        unknown = {self._tokenizer.unk_token_id} - needed - {self._tokenizer.pad_token_id}
        return frozenset((self._special_ids | written | needed) - unknown)

    @cached_property
    def rowless_ids(self) -> frozenset[int]:
        """Ids of the tokenizer for which the model's embedding has no row."""
        rows = self.vocab_size if self.num_rows is None else self.num_rows
        return frozenset(i for i in self._vocabulary.values() if i >= rows)

    @property
    def added_ids(self) -> frozenset[int]:
        """Ids of the tokens that were added to the vocabulary of words."""
        return frozenset(self._added)

    @property
    def pad_id(self) -> int | None:
        """The id that fills rows up, or None."""
        return self._tokenizer.pad_token_id

    def control_tokens(self, *texts: str) -> list[str]:
        """Return the control tokens that the tokenizer would make of these texts, which would pass for structure."""
        return self.strip([i for text in texts for i in self._plain_ids(text) if i in self.control_ids])

    def rowless_tokens(self, *texts: str) -> list[str]:
        """Return the tokens in these texts that the model has no embedding of."""
        if not self.rowless_ids:
            return []
        return self.strip([i for text in texts for i in self._plain_ids(text) if i in self.rowless_ids])

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    @cached_property
    def _added(self) -> dict[int, Any]:
        return self._tokenizer.added_tokens_decoder

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """Ids that the tokenizer calls special, but for what a model may say: they are no part of a text."""
        special = {i for i, token in self._added.items() if token.special} | {*self._tokenizer.all_special_ids}
        return frozenset(i for i in special if not is_said(self._spelling(i)))

    def _spelling(self, token_id: int) -> str:
        return self._added[token_id].content if token_id in self._added else self.spelled([token_id])

    @cached_property
    def written_ids(self) -> frozenset[int]:
        """Ids that the template writes around a question, a system message and an answer."""
        question, system = Message(role="user", content="x"), Message(role="system", content="x")
        found: set[int] = set()
        for chat in ([question], [system, question], [question, _assistant("x"), question]):
            with contextlib.suppress(DnoError):  # a template that refuses it: whoever asks is told
                found.update(self.prompt_ids(chat))
        with contextlib.suppress(DnoError):
            found.update(self.chat_ids([question], "x"))
        return frozenset(found)

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether a prompt ends inside a thought, in which the response then begins."""
        return opens_thought(self.spelled(prompt_ids[-32:]))

    @property
    def bos_only_begins(self) -> bool:
        """Whether the begin token is that and nothing else: no end, padding or unknown token too."""
        others = (*self.end_ids, self._tokenizer.pad_token_id, self._tokenizer.unk_token_id)
        return self.bos_id is not None and self.bos_id not in others

    def around_begins(self, messages: Sequence[Message]) -> list[str]:
        """Return a prompt's text cut wherever the template asks for `bos_token`, which a turn's opener does not."""
        if self.template is None:
            return [_raw_text(messages)]
        return self._apply(messages, tokenize=False, add_generation_prompt=True, bos_token=STAND_IN).split(STAND_IN)

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

        A prompt that opens a thought is continued by a response that carries it: templates take thoughts out of
        answers, so prompt, response and what the template writes after one are then tokenised as they follow.

        Args:
            end_id: closes the response where the template writes no end id of its own.

        Raises:
            DnoError: the response spells a control token, the whole chat does not begin with the prompt's ids, or the
                prompt opens a thought that the response does not have.
        """
        self._refuse_control(response)
        prompt = self.prompt_ids(messages, assistant_prefix)
        if self.template is not None and self.opens_thought(prompt):
            if not split_thought(response, opened=True).is_answer:
                raise DnoError(
                    f"the prompt opens a thought, and the response has none before its answer: {_shorten(response)}; "
                    "give responses with their thoughts, or have the template open none (for many models: "
                    "model.template_options: {enable_thinking: false})"
                )
            tail = self.continued_ids(messages, assistant_prefix, response)
        else:
            whole = self.chat_ids(messages, assistant_prefix + response)
            tail = whole[len(prompt) :]
            if whole[: len(prompt)] != prompt:
                if self.template is None:
                    # The last token of the prompt merges with the response's first: a model would never sample that.
                    return (*self._following_ids(response), end_id)
                if not self._differs_by_empty_thought(messages, assistant_prefix, response):
                    self._say_where_they_part(prompt, whole)
                tail = self.continued_ids(messages, assistant_prefix, response)
        for index, token in enumerate(tail):
            if token in self.end_ids:
                return tail[: index + 1]
        return (*tail, end_id)

    def continued_ids(self, messages: Sequence[Message], assistant_prefix: str, response: str) -> tuple[int, ...]:
        """Return the ids of a response, and of what the template writes after one, as they follow the prompt's text."""
        prompt = self.prompt_ids(messages, assistant_prefix)
        text = self.prompt_text(messages, assistant_prefix)
        closing = self.chat_text(messages, assistant_prefix + STAND_IN).rpartition(STAND_IN)[2]
        whole = self._plain_ids(text + after_opening(response, prompt=text) + closing)
        if whole[: len(prompt)] != prompt:
            self._say_where_they_part(prompt, whole)
        return whole[len(prompt) :]

    def _differs_by_empty_thought(self, messages: Sequence[Message], assistant_prefix: str, response: str) -> bool:
        """Whether the prompt ends with an empty thought, and is otherwise how the whole chat begins."""
        text = self.prompt_text(messages, assistant_prefix)
        head = without_thought_at_end(text)
        if head == text or split_thought(response) != ("", response, True):
            return False
        return self.chat_text(messages, assistant_prefix + response).startswith(head)

    def decode(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """Return text without special tokens, but with what a model may say (<think> is special to some tokenizers).

        Args:
            after: ids that the text continues: a blank between them belongs to it, which SentencePiece would swallow
                at the beginning of a text.
        """

        def text(ids: Sequence[int]) -> str:
            return self.spelled([i for i in ids if i not in self._special_ids])

        head = text(after) if after else ""
        whole = text([*after, *ids])
        return whole[len(head) :] if whole.startswith(head) else text(ids)

    def spelled(self, ids: Sequence[int]) -> str:
        """Return text with special tokens as they are spelt."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

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
        return text in self._vocabulary

    def _apply(self, messages: Sequence[Message], *, tokenize: bool = True, **options: Any) -> Any:
        """Render a chat: ids or, with tokenize=False, text; in Jinja's immutable sandbox, within limits."""
        chat = [{"role": message.role, "content": message.content} for message in messages]
        template, dated = pinned(self.template or "", self.date)
        try:
            # Ids directly, never text that is tokenised again: that doubles the BOS which the template wrote.
            told = {**dated, **self.options, **options}
            made = apply_template(self._tokenizer, chat, chat_template=template, tokenize=tokenize, **told)
        except Exception as error:  # the template is a program of somebody else's: it may raise anything
            roles = ", ".join(message.role for message in messages)
            kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
            hint = ""
            if self.bos_id is None and "'bos_token' is undefined" in str(error):
                hint = "; the tokenizer has no begin token: name one in tokenizer_config.json, or give another template"
            raise DnoError(
                f"{self.template_place}: the chat template refuses a chat of roles ({roles}): {kind}{error}{hint}"
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
        ids = self._plain_ids(response)
        for token in ids:
            if token in self.rowless_ids:
                raise DnoError(
                    f"the response holds {self._spelling(token)!r} (id {token}), for which the model's embedding "
                    f"({self.num_rows} rows) has no row: {_shorten(response)}; remove it from the data"
                )
            if token in self.control_ids or token in self.end_ids:
                raise DnoError(
                    f"the response spells the control token {self._spelling(token)!r}: {_shorten(response)}; it would "
                    "pass for the structure of the chat; remove it from the data"
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


def _assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


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
