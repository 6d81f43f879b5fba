"""Requests to a fake judge through the real client, and what comes back."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import openai

from dno_jax.annotation.judges.forms import LISTWISE, load_rubric
from dno_jax.annotation.question import Reply
from dno_jax.fake_judge import FakeJudge
from dno_jax.records import Message

QUESTION = Message(role="user", content="Tell a story about a brave cat.")
CODE = "0123456789abcdef"


def listwise(*texts: str, **fields: Any) -> dict[str, Any]:
    messages = load_rubric(LISTWISE).messages((QUESTION,), texts)
    return {"model": "judge", "messages": messages, "max_tokens": 2048, **fields}


def fenced(names: Sequence[str], texts: Sequence[str], shape: str) -> list[dict[str, str]]:
    """A request as our rubrics write it, whatever they say beside."""
    parts = [("MESSAGE (user)", QUESTION.content)]
    parts += [(f"CANDIDATE {name}", text) for name, text in zip(names, texts, strict=True)]
    blocks = [f"<<<{title} {CODE}>>>\n{text}\n<<<END {title} {CODE}>>>" for title, text in parts]
    return [
        {"role": "system", "content": f"Text stands between <<<TITLE {CODE}>>> and <<<END TITLE {CODE}>>>."},
        {"role": "user", "content": "\n\n".join([*blocks, shape])},
    ]


def pairwise(first: str, second: str, **fields: Any) -> dict[str, Any]:
    shape = '{"justification": "...", "verdict": <"first", "second" or "tie">}'
    return {"model": "judge", "messages": fenced(("1", "2"), (first, second), shape), "max_tokens": 512, **fields}


def token(first: str, second: str, *, names: tuple[str, str] = ("m", "M"), **fields: Any) -> dict[str, Any]:
    messages = fenced(names, (first, second), f"{names[0]} or {names[1]}")
    return {"model": "judge", "messages": messages, "max_tokens": 1, "logprobs": True, "top_logprobs": 5, **fields}


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "teacher", "messages": [{"role": "user", "content": text}], **fields}


def client_of(server: FakeJudge, *, key: str = "none", timeout: float = 20.0) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, timeout=timeout)


def ask(server: FakeJudge, *bodies: dict[str, Any]) -> list[Any]:
    with client_of(server) as client:
        return [client.chat.completions.create(**body) for body in bodies]


def text_of(server: FakeJudge, body: dict[str, Any]) -> str:
    return ask(server, body)[0].choices[0].message.content


def scores(server: FakeJudge, *texts: str, **fields: Any) -> tuple[float, ...]:
    return load_rubric(LISTWISE).read(Reply(text=text_of(server, listwise(*texts, **fields))), texts)


def verdict(server: FakeJudge, first: str, second: str, **fields: Any) -> str:
    said = json.loads(text_of(server, pairwise(first, second, **fields)))
    assert set(said) == {"justification", "verdict"}
    return said["verdict"]


def batch_file(bodies: Sequence[dict[str, Any]]) -> bytes:
    lines = [
        {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number, body in enumerate(bodies)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def start_batch(client: openai.OpenAI, content: bytes) -> Any:
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"run": "r1"}
    )


def end_of(client: openai.OpenAI, batch_id: str) -> Any:
    for _ in range(2000):
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "expired", "cancelled", "failed"):
            return batch
        time.sleep(0.01)
    raise AssertionError(f"still {batch.status}")


def rows_of(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """custom_id -> row; of no file none."""
    rows = [] if file_id is None else [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    return {row["custom_id"]: row for row in rows}


def judge_many(server: FakeJudge, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Completions of many requests, in order, by the Batch API: it is the quickest way."""
    with client_of(server) as client:
        batch = end_of(client, start_batch(client, batch_file(bodies)).id)
        rows = rows_of(client, batch.output_file_id)
    return [rows[f"c{number}"]["response"]["body"] for number in range(len(bodies))]


def verdicts(server: FakeJudge, bodies: Sequence[dict[str, Any]]) -> Counter[str]:
    said = [json.loads(reply["choices"][0]["message"]["content"]) for reply in judge_many(server, bodies)]
    return Counter(one["verdict"] for one in said)


def address_of(server: FakeJudge) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").removesuffix("/v1").partition(":")
    return host, int(port)


def raw_request(body: dict[str, Any], *headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def read_to_end(connection: socket.socket) -> bytes:
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


def http_get(server: FakeJudge, path: str) -> bytes:
    with socket.create_connection(address_of(server)) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        return read_to_end(connection).partition(b"\r\n\r\n")[2]
