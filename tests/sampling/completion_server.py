"""A completion server on loopback: real HTTP, a model that is really sampled, injected faults, and a count of all.

It speaks GET /v1/models and POST /v1/completions in the dialects of the servers that it stands for. The model is a
function from ids to logits; the tokenizer is a list of pieces, of which the longest that fits is taken.

    with CompletionServer(toy_logits, pieces=PIECES) as server:
        section = CompletionServerSection(base_url=server.url, model="policy-000")
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from dno_jax.sampling.server import PROBE

# Id 0 ends a response, 1 begins a text. "ab" is a token and two: texts do not say which was drawn.
PIECES = ["", "", "a", "b", "c", "d", " ", "ab", "cd", "é", "<|tool|>"]
END, BEGIN = 0, 1

DIALECTS = ("vllm", "sglang", "llama.cpp", "plain")


def toy_logits(ids: Sequence[int]) -> np.ndarray:
    """Logits [V] that the last two ids decide; the special piece is as good as impossible."""
    rng = np.random.default_rng(list(ids[-2:]))
    logits = 1.5 * rng.standard_normal(len(PIECES))
    logits[[BEGIN, PIECES.index("<|tool|>")]] = -1e9
    return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def encode(text: str, pieces: Sequence[str] = PIECES) -> tuple[int, ...]:
    ids: list[int] = []
    while text:
        fits = [(len(piece), index) for index, piece in enumerate(pieces) if piece and text.startswith(piece)]
        length, index = max(fits) if fits else (1, BEGIN)
        ids.append(index)
        text = text[length:]
    return tuple(ids)


def decode(ids: Sequence[int], pieces: Sequence[str] = PIECES) -> str:
    return "".join(pieces[index] for index in ids if index < len(pieces))


def distribution(logits: np.ndarray, body: dict[str, Any]) -> np.ndarray:
    """Probabilities that a request's sampling fields make of logits; written apart from what it is compared with."""
    if body["temperature"] == 0.0:
        return np.eye(len(logits))[int(np.argmax(logits))]
    probability = np.exp(log_softmax(logits / body["temperature"]))
    order = np.argsort(-probability)
    if body.get("top_k", 0) > 0:
        probability[order[body["top_k"] :]] = 0.0
    probability /= probability.sum()
    before = np.cumsum(probability[order]) - probability[order]
    probability[order[before >= body.get("top_p", 1.0)]] = 0.0
    probability[probability < body.get("min_p", 0.0) * probability.max()] = 0.0
    return probability / probability.sum()


def is_probe(body: dict[str, Any]) -> bool:
    return body["prompt"] == PROBE


class CompletionServer:
    """The server as a context manager.

    Args:
        logits: the model.
        text_of, ids_of: its tokenizer.
        dialect: what it tells beside OpenAI's fields.
        model: the name it lists.
        schedule: outcome of the first completion requests by arrival, the probe's too (None: an answer).
        delay: seconds that an answer takes, of the request's body.
        api_key: demand this key; a 401 quotes the one it got.
        honours_seed: else every request draws from the same one.
        logprobs: "raw" or "processed".
        alter: what it does to a reply before it is sent; the probe's is left alone.
    """

    def __init__(
        self,
        logits: Callable[[Sequence[int]], np.ndarray] = toy_logits,
        *,
        text_of: Callable[[Sequence[int]], str] = decode,
        ids_of: Callable[[str], Sequence[int]] = encode,
        dialect: str = "vllm",
        model: str = "policy-000",
        end_ids: Sequence[int] = (END,),
        schedule: Sequence[str | None] = (),
        delay: Callable[[dict[str, Any]], float] = lambda body: 0.0,
        api_key: str | None = None,
        honours_seed: bool = True,
        logprobs: str = "raw",
        alter: Callable[[dict[str, Any]], Any] = lambda reply: reply,
    ):
        assert dialect in DIALECTS
        self.logits = logits
        self.text_of = text_of
        self.ids_of = ids_of
        self.dialect = dialect
        self.model = model
        self.end_ids = set(end_ids)
        self.schedule = list(schedule)
        self.delay = delay
        self.api_key = api_key
        self.honours_seed = honours_seed
        self.logprobs = logprobs
        self.alter = alter
        self.bodies: list[dict[str, Any]] = []
        self.outcomes: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self.in_flight = 0
        self.max_in_flight = 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._http = _Server(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> CompletionServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._thread.join()
        self._http.drop_connections()
        self._http.server_close()  # joins the handlers' threads
        if self.errors:
            raise self.errors[0]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @property
    def sampled(self) -> list[dict[str, Any]]:
        """Bodies of all requests but the probe's."""
        with self._lock:
            return [body for body in self.bodies if not is_probe(body)]

    def begin(self, body: dict[str, Any]) -> str:
        with self._lock:
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
            outcome = (self.schedule.pop(0) if self.schedule else None) or "ok"
            self.outcomes[outcome] += 1
            self.bodies.append(body)
        return outcome

    def end(self) -> None:
        with self._lock:
            self.in_flight -= 1

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        """Sample, and say so in the server's dialect."""
        prompt_ids = self.prompt_ids(body)
        ids, logprobs, stopped_by = self._draw(prompt_ids, body)
        finish = "length" if stopped_by is None else "stop"
        text = self.text_of([token for token in ids if token not in self.end_ids])
        if isinstance(stopped_by, str):
            text = text[: text.index(stopped_by)]
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
        if self.dialect == "vllm":
            choice["stop_reason"] = stopped_by if isinstance(stopped_by, str) else None
        if self.dialect == "sglang":
            choice["matched_stop"] = stopped_by
        if self.dialect in ("vllm", "sglang") and body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": prompt_ids}
        if self.dialect == "llama.cpp":
            if body.get("n_probs"):
                choice["logprobs"] = {"content": [{"id": i, "logprob": p} for i, p in zip(ids, logprobs, strict=True)]}
        elif "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": logprobs, "tokens": [self.text_of([token]) for token in ids]}
        usage = {"prompt_tokens": len(prompt_ids), "completion_tokens": len(ids)}
        return {"object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage}

    def prompt_ids(self, body: dict[str, Any]) -> list[int]:
        """What it reads of a request's prompt."""
        prompt = body["prompt"]
        return [BEGIN, *self.ids_of(prompt)] if isinstance(prompt, str) else list(prompt)

    def _draw(self, prompt_ids: list[int], body: dict[str, Any]) -> tuple[list[int], list[float], int | str | None]:
        rng = np.random.default_rng(body["seed"] if self.honours_seed else 0)
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < body["max_tokens"]:
            logits = self.logits([*prompt_ids, *ids])
            probability = distribution(logits, body)
            token = int(rng.choice(len(logits), p=probability))
            ids.append(token)
            given = log_softmax(logits) if self.logprobs == "raw" else np.log(np.maximum(probability, 1e-300))
            logprobs.append(float(given[token]))
            if token in self.end_ids:
                return ids, logprobs, token
            text = self.text_of(ids)
            if matched := next((string for string in body.get("stop", ()) if string in text), None):
                return ids, logprobs, matched
        return ids, logprobs, None


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], owner: CompletionServer):
        super().__init__(address, _Handler)
        self.owner = owner
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        """End idle keep-alive connections, whose handlers would wait for a next request."""
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over broken pipes, which clients that time out or are closed leave; keep what is a fault of ours."""
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):
            self.owner.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        owner = self.server.owner
        if self._refuse_key():
            return
        if self.path != "/v1/models":
            self._send(404, {"error": {"message": f"no {self.path} here"}})
            return
        self._send(200, {"object": "list", "data": [{"id": owner.model, "object": "model"}]})

    def do_POST(self) -> None:
        owner = self.server.owner
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionError("the client went away in the middle of its request")
        if self._refuse_key():
            return
        if self.path != "/v1/completions":
            self._send(404, {"error": {"message": f"no {self.path} here"}})
            return
        body = json.loads(data)
        outcome = owner.begin(body)
        try:
            owner.stopping.wait(owner.delay(body))
            answer = self._answer(outcome, body)
        finally:
            owner.end()
        if answer is not None:
            self._send(*answer)

    def _refuse_key(self) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        wanted = self.server.owner.api_key
        if wanted is None or given == wanted:
            return False
        self._send(401, {"error": {"message": f"Incorrect API key provided: {given}", "code": "invalid_api_key"}})
        return True

    def _answer(self, outcome: str, body: dict[str, Any]) -> tuple[Any, ...] | None:
        owner = self.server.owner
        if outcome == "429":
            return 429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}
        if outcome.isdigit():
            return int(outcome), {"error": {"message": f"planted fault {outcome}"}}
        if outcome == "html":
            return 200, "<html>a proxy's front page</html>"
        if outcome in ("hang", "close"):
            owner.stopping.wait(30.0 if outcome == "hang" else 0.0)
            self.close_connection = True
            return None
        reply = owner.reply(body)
        choice = reply["choices"][0]
        if outcome == "none":
            reply["choices"] = []
        elif outcome == "two":
            reply["choices"].append(choice)
        elif outcome == "cut json":
            return 200, json.dumps(reply)[:-20]
        elif outcome == "empty":
            choice.update(text="", token_ids=[], finish_reason="stop")
        elif outcome == "text null":
            choice["text"] = None
        elif outcome == "ids are words":
            choice["token_ids"] = ["a", "b"]
        elif outcome == "abort":
            choice["finish_reason"] = "abort"
        elif outcome == "filter":
            choice["finish_reason"] = "content_filter"
        elif outcome == "strange id":
            choice["token_ids"] = [2, len(PIECES)]
        elif outcome == "too long":
            choice.update(token_ids=[2] * (body["max_tokens"] + 1), finish_reason="length")
        elif outcome == "other prompt":
            choice["prompt_token_ids"] = [BEGIN, *body["prompt"]]
        elif outcome == "other count":
            choice.pop("prompt_token_ids", None)
            reply["usage"]["prompt_tokens"] += 1
        else:
            assert outcome == "ok", outcome
        return 200, reply if is_probe(body) else owner.alter(reply)

    def _send(self, status: int, body: dict[str, Any] | str, headers: dict[str, str] | None = None) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: the server's own counts say more."""
