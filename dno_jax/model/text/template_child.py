"""A process that renders chat templates and nothing else: what a template can use up is bounded here, by the system.

A script of its own (`template_limits` starts it), which imports Jinja and no more: it is there in a tenth of a second.
A request is one line of JSON on standard input: {"template": text, or null for the one before, "variables": {...}}. The
reply is one line on standard output: {"text": ...} or {"error": [kind, words]}.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 * 1024**2  # of this process, some 40 MB of which are Python's and Jinja's
EXTRA_CHARACTERS = 1_000_000  # that a template may add to a chat


def main(cpu_seconds: float) -> None:
    """Answer requests until standard input ends; one may take so much processor time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for whoever asks; this ends with its input
    with suppress(ValueError, OSError):  # where the system has no such limit, time is still bounded
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    environment = _environment()
    template: jinja2.Template | None = None
    for line in sys.stdin.buffer:
        # Its signal ends the process, whatever Python or C code it is in: there is nothing that a template could catch.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        reply: dict[str, Any]
        try:
            asked = json.loads(line)
            if asked["template"] is not None:
                template = None
                template = environment.from_string(asked["template"])
            assert template is not None
            text = template.render(**asked["variables"])
            if len(text) > EXTRA_CHARACTERS + 4 * len(line):
                raise ValueError(f"it makes {len(text):,} characters of a chat of {len(line):,}")
            reply = {"text": text}
        except Exception as error:  # somebody else's program: it may raise anything
            reply = {"error": [type(error).__name__, str(error)[:2000]]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for who wants a mask of them; here it is only its contents."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_contents"), [], [], body).set_lineno(line)

    def _contents(self, caller: Any) -> Any:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """A namespace without attributes that lead out of the sandbox, as transformers has it."""

    def __init__(*args: Any, **fields: Any) -> None:  # a field may be called self
        self, args = args[0], args[1:]
        found = dict(*args, **fields)
        for name in found:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace takes no attribute that begins with an underscore: {name!r}"
        )


class _Dict:
    """`dict` without what else is to be reached through the class."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment in which transformers renders chat templates; a test compares the two."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return made


if __name__ == "__main__":
    main(float(sys.argv[1]))
