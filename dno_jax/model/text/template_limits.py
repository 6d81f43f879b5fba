"""Chat templates are programs of somebody else's: they render in a process of their own, with bounded time and memory.

Jinja's sandbox keeps a template from reaching out, and from nothing else: `'a' * 3000000000`, a loop in a loop in a
loop or a string that doubles take the memory and time of whoever renders them. No list of such expressions is complete,
so the limits are the operating system's (`template_child`). A chat takes some 0.1 ms more than in this process.
"""

from __future__ import annotations

import atexit
import copy
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dno_jax.errors import DnoError
from dno_jax.model.text import template_child
from dno_jax.model.text.template_child import MEMORY_BYTES

CPU_SECONDS = 1.0  # of one chat; real templates take about a thousandth
MAX_TEMPLATE = 1_000_000  # characters; the longest that models are published with have some 30,000
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # stands where the last message ends while it is rendered


class TemplateError(Exception):
    """A template's own refusal, or its end at a limit; anything else has the name of what it raised."""


def apply_template(
    tokenizer: Any, chat: Sequence[Mapping[str, Any]], *, chat_template: str, tokenize: bool = True, **options: Any
) -> Any:
    """Do as `tokenizer.apply_chat_template(..., return_dict=False)`, within limits.

    Returns:
        Ids or, with tokenize=False, the text.

    Raises:
        TemplateError: the template refuses the chat, or takes more than any real one does.
        Exception: of the kind that the template raised.
    """
    text = _rendered(chat, chat_template, {**tokenizer.special_tokens_map, **options})
    return tokenizer(text, add_special_tokens=False)["input_ids"] if tokenize else text


def refuse_giants(*files: Path) -> None:
    """Refuse template files that are larger than any template, before somebody reads them.

    Raises:
        DnoError: naming the file.
    """
    for file in files:
        if file.is_file() and (size := file.stat().st_size) > 4 * MAX_TEMPLATE:  # of UTF-8, 4 bytes at most
            raise DnoError(
                f"{file}: has {size:,} bytes; a chat template has some thousand, and at most {4 * MAX_TEMPLATE:,} are "
                "read. Give the template that belongs to the model"
            )


def _rendered(chat: Sequence[Mapping[str, Any]], template: str, variables: dict[str, Any]) -> str:
    if len(template) > MAX_TEMPLATE:
        raise TemplateError(f"it has {len(template):,} characters, at most {MAX_TEMPLATE:,} are read")
    goes_on = variables.pop("continue_final_message", False)
    messages = [dict(message) for message in copy.deepcopy(list(chat))]
    final = messages[-1]["content"]
    if goes_on:
        messages[-1]["content"] = final + _TAG
    variables = {"tools": None, "documents": None, "add_generation_prompt": False, **variables}
    text = _CHILD.render(template, {**variables, "messages": messages})
    if not goes_on:
        return text
    if final.strip() not in text or _TAG.strip() not in text:
        raise TemplateError("the final message, which is to be continued, is not in the text as it is")
    end = text.rindex(_TAG.strip())
    kept = text[:end]
    return kept if text[end : end + len(_TAG)] == _TAG else kept.rstrip()  # the template trims: so is what came before


class _Child:
    """The process that renders, started when it is first needed, and again where a template has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._template: str | None = None  # which it has compiled

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            asked = {"template": None if template == self._template else template, "variables": variables}
            line = self._exchange(json.dumps(asked).encode() + b"\n")
            if not line:
                raise TemplateError(self._end())
            reply = json.loads(line)
            self._template = template if "text" in reply else None
        if "text" in reply:
            return reply["text"]
        kind, words = reply["error"]
        if kind == "MemoryError":
            raise TemplateError(f"it needs more than {MEMORY_BYTES // 1024**2} MiB of memory for this chat")
        raise type(kind, (TemplateError,), {})(words)

    def _start(self) -> None:
        self._template = None
        # Not as a module: that would import the package, and with it jax. -P: its folder is no place for imports.
        command = [sys.executable, "-P", str(Path(template_child.__file__)), str(CPU_SECONDS)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _exchange(self, line: bytes) -> bytes:
        """Return the reply; empty where the process has ended."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()
        return self._process.stdout.readline()

    def _end(self) -> str:
        """Say why the process has ended, and let go of it."""
        code = self.close()
        if code == -signal.SIGPROF:
            return (
                f"it does not end: it computed for {CPU_SECONDS:g} s on this chat, and a template takes milliseconds "
                "(a loop without end, or one in another?)"
            )
        return f"the process that rendered it has ended (exit status {code})"

    def close(self) -> int | None:
        """End the process; return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        with suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        if process.stdout is not None:
            process.stdout.close()
        try:
            return process.wait(timeout=CPU_SECONDS + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


_CHILD = _Child()
atexit.register(_CHILD.close)
