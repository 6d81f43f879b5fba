"""A judge on loopback: real HTTP, planted verdicts, injected faults, and a count of everything.

It speaks POST /v1/chat/completions and nothing else, reads the fenced candidates of our prompt as a careful judge would
(only lines with the code count), and scores them 1-6 by the embedded oracle or by a function of the test's.

    with JudgeServer() as server:
        config = OpenAISection(base_url=server.url, api_key_env=None)

    python -m tests.annotation.judge_server --port 8000 --fraction 0.2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Scorer = Callable[[str, Sequence[str]], Sequence[int]]
"""(prompt text, candidates as presented) -> integer scores 1..6."""

FAULTS = ("429", "500", "hang", "garbage", "refusal", "wrong_ids", "close")
_CODE = re.compile(r"<<<TITLE ([0-9a-f]{16})>>>")


@dataclass(frozen=True)
class Entry:
    """One request: digest of its body, what became of it ("ok", "probe", "401" or a fault), requests then in flight."""

    body: str
    outcome: str
    in_flight: int


def oracle_scores(prompt: str, candidates: Sequence[str]) -> list[int]:
    """Spread the ranks of mean win rates in the pool over 1..6: the best gets 6, the worst 1, equals the same."""
    from dno_jax.annotation.oracles import majority_matrix

    criteria = ("relevance", "variety", "brevity")
    wins = majority_matrix(prompt, candidates, criteria=criteria, target_words=30)
    rates = [round(sum(row), 6) for row in wins]
    levels = sorted(set(rates))
    return [1 + round(5 * levels.index(rate) / max(1, len(levels) - 1)) for rate in rates]


def read_request(messages: Sequence[dict[str, str]]) -> tuple[str, list[str]] | None:
    """Take prompt text and candidates out of a request of ours; None if it is none (a probe)."""
    text = "\n".join(message["content"] for message in messages)
    code = _CODE.search(text)  # stands in the system message, before any text of others
    if code is None:
        return None
    block = re.compile(
        rf"^<<<(MESSAGE|CANDIDATE) ([^\n>]+) {code[1]}>>>\n(.*?)\n<<<END \1 \2 {code[1]}>>>$", re.DOTALL | re.MULTILINE
    )
    found = block.findall(text)
    conversation = [(title, content) for kind, title, content in found if kind == "MESSAGE"]
    numbered = {int(title): content for kind, title, content in found if kind == "CANDIDATE"}
    asked = [content for title, content in conversation if title == "(user)"]
    prompt = asked[-1] if asked else "\n".join(content for _, content in conversation)
    return prompt, [numbered[number] for number in range(1, len(numbered) + 1)]


class JudgeServer:
    """The server as a context manager.

    Args:
        scorer: the verdict; the oracle if None.
        fraction: share of requests that get a fault: a function of `fault_seed`, body and attempt, not of arrival.
        faults: which ones.
        schedule: outcome of the first requests by arrival (None or "ok" is no fault); `fraction` rules after it.
        api_key: demand this key; a 401 quotes the one it got, as the worst endpoints do.
        delay: seconds an answer takes.
        retry_after: value of that header on a 429.
    """

    def __init__(
        self,
        *,
        scorer: Scorer | None = None,
        fraction: float = 0.0,
        faults: Sequence[str] = FAULTS,
        fault_seed: int = 0,
        schedule: Sequence[str | None] = (),
        api_key: str | None = None,
        delay: float = 0.0,
        retry_after: str = "0",
        port: int = 0,
    ):
        self.scorer = scorer or oracle_scores
        self.fraction = fraction
        self.faults = tuple(faults)
        self.fault_seed = fault_seed
        self.schedule = list(schedule)
        self.api_key = api_key
        self.delay = delay
        self.retry_after = retry_after
        self.log: list[Entry] = []
        self.bodies: list[dict[str, Any]] = []
        self.errors: list[BaseException] = []
        self.max_in_flight = 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._in_flight = 0
        self._attempts: Counter[str] = Counter()
        self._http = _Server(("127.0.0.1", port), self)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> JudgeServer:
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
    def requests(self) -> int:
        """Requests for a verdict, whatever became of them (probes and refused keys left out)."""
        with self._lock:
            return sum(entry.outcome not in ("probe", "401") for entry in self.log)

    @property
    def answers(self) -> Counter[str]:
        """Good verdicts given, by digest of the request's body."""
        with self._lock:
            return Counter(entry.body for entry in self.log if entry.outcome == "ok")

    @property
    def duplicates(self) -> int:
        """Good verdicts given for a request that had been given one before: paid for twice."""
        return sum(count - 1 for count in self.answers.values())

    @property
    def counts(self) -> Counter[str]:
        """Requests for a verdict by digest of the body."""
        with self._lock:
            return Counter(entry.body for entry in self.log if entry.outcome not in ("probe", "401"))

    def begin(self, body: dict[str, Any], *, outcome: str | None = None) -> str:
        """Note a request and settle its outcome."""
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self._lock:
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
            outcome = outcome or self._settle(digest)
            self.log.append(Entry(body=digest, outcome=outcome, in_flight=self._in_flight))
            self.bodies.append(body)
        return outcome

    def end(self) -> None:
        with self._lock:
            self._in_flight -= 1

    def _settle(self, digest: str) -> str:
        if self.schedule:
            return self.schedule.pop(0) or "ok"
        self._attempts[digest] += 1
        drawn = hashlib.sha256(f"{self.fault_seed} {digest} {self._attempts[digest]}".encode()).digest()
        if int.from_bytes(drawn[:4], "big") >= self.fraction * 2**32:
            return "ok"
        return self.faults[drawn[4] % len(self.faults)]


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], judge: JudgeServer):
        super().__init__(address, _Handler)
        self.judge = judge
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
        """Pass over broken pipes, which clients that time out or are killed leave; keep what is a fault of ours."""
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):
            self.judge.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        judge = self.server.judge
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionError("the client went away in the middle of its request")
        body = json.loads(data)
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": f"no {self.path} here"}})
            return
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if judge.api_key is not None and given != judge.api_key:
            judge.begin(body, outcome="401")
            judge.end()
            self._send(401, {"error": {"message": f"Incorrect API key provided: {given}", "code": "invalid_api_key"}})
            return
        asked = read_request(body["messages"])
        outcome = judge.begin(body, outcome=None if asked else "probe")
        try:
            judge.stopping.wait(judge.delay)
            self._answer(outcome, asked)
        finally:
            judge.end()

    def _answer(self, outcome: str, asked: tuple[str, list[str]] | None) -> None:
        if outcome == "429":
            fault = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
            self._send(429, fault, {"Retry-After": self.server.judge.retry_after})
        elif outcome.isdigit():
            self._send(int(outcome), {"error": {"message": f"planted fault {outcome}"}})
        elif outcome == "hang":
            self.server.judge.stopping.wait(30.0)
            self.close_connection = True
        elif outcome == "trickle":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            while not self.server.judge.stopping.wait(0.02):
                self.wfile.write(b" ")
            self.close_connection = True
        elif outcome == "close":
            self.close_connection = True
        elif outcome == "html":
            self._send(200, "<html>a proxy's front page</html>")
        elif outcome == "refusal":
            self._send(200, _completion(None, refusal="I cannot help with that."))
        elif outcome == "filter":
            self._send(200, _completion("", finish="content_filter"))
        elif outcome == "length":
            self._send(200, _completion(self._verdict(asked)[:40], finish="length"))
        elif outcome == "echo":
            assert asked is not None
            self._send(200, _completion("I was shown: " + " | ".join(asked[1])))
        elif outcome == "garbage":
            self._send(200, _completion("The best one is clearly number 1, 6/6."))
        elif outcome == "wrong_ids":
            self._send(200, _completion(self._verdict(asked, first_number=0)))
        else:
            self._send(200, _completion(self._verdict(asked) if asked else "ready"))

    def _verdict(self, asked: tuple[str, list[str]] | None, *, first_number: int = 1) -> str:
        assert asked is not None
        scores = self.server.judge.scorer(*asked)
        return json.dumps(
            {str(n): {"justification": "as planted", "score": s} for n, s in enumerate(scores, start=first_number)}
        )

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
        """Keep quiet: `JudgeServer.log` says more."""


def _completion(content: str | None, *, finish: str = "stop", refusal: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "planted-judge-1",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A judge on loopback that scores by the embedded oracle.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--fraction", type=float, default=0.0, help="share of requests that get a fault")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds an answer takes")
    arguments = parser.parse_args()
    with JudgeServer(port=arguments.port, fraction=arguments.fraction, delay=arguments.delay) as server:
        print(server.url, flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print(f"{server.requests} requests, {server.duplicates} paid for twice", flush=True)


if __name__ == "__main__":
    main()
