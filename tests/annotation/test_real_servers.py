"""Judges behind other people's servers: litellm's proxy, which limits, and llama.cpp's, which gives log-probabilities.

Opt-in, by the Python that has the server (docs/annotation.md says how): DNO_LITELLM_PYTHON, DNO_LLAMA_PYTHON.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import yaml

from dno_jax.annotation import build_annotator
from dno_jax.annotation.judges.chat_judge import ChatJudge
from dno_jax.annotation.judges.functions import PairWise
from dno_jax.annotation.ledger.store import VerdictStore
from dno_jax.annotation.pool import Pool
from dno_jax.annotation.question import Reply
from dno_jax.annotation.transport.client import EndpointClient
from dno_jax.annotation.transport.probe import Capabilities
from dno_jax.config import AnnotationSection, OpenAISection
from dno_jax.endpoint import Trouble
from dno_jax.records import Judgement
from tests.annotation.planted import graded, pool_of
from tests.annotation.scripted import free_port

pytestmark = [pytest.mark.soak, pytest.mark.slow, pytest.mark.timeout(1200)]

KEY_ENV = "DNO_TEST_KEY"
NUM_POOLS = 64
REQUESTS_A_MINUTE = 30  # all pools are asked about at once: more than the end of one minute and the next let through


def python_of(variable: str) -> Path:
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"{variable} names no Python that has the server")
    return Path(found).absolute()  # the server runs in a folder of its own


@contextmanager
def served(command: Sequence[str], *, sign_of_life: str, log: Path, env: Mapping[str, str]) -> Iterator[None]:
    """Run a server, from when it answers."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=log.parent, env={**clean, **env}, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 300.0
            while not answers(sign_of_life):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def judge_all(section: OpenAISection, pools: Sequence[Pool], store_path: Path) -> list[Judgement]:
    async def work() -> list[Judgement]:
        annotator = build_annotator(AnnotationSection(kind="openai", openai=section), store_path=store_path, seed=0)
        try:
            return await asyncio.gather(*(annotator.judge(pool) for pool in pools))
        finally:
            await annotator.close()

    return asyncio.run(work())


def test_litellms_limits_delay_verdicts_and_lose_none(tmp_path, monkeypatch, capsys):
    python = python_of("DNO_LITELLM_PYTHON")
    monkeypatch.setenv(KEY_ENV, f"sk-{secrets.token_hex(24)}")
    port, log, store_path = free_port(), tmp_path / "server.log", tmp_path / "annotations.sqlite"
    model = {"model": "openai/planted", "api_key": "none", "mock_response": graded((5, 3, 1)), "rpm": REQUESTS_A_MINUTE}
    limited = {"optional_pre_call_checks": ["enforce_model_rate_limits"], "num_retries": 0, "disable_cooldowns": True}
    (tmp_path / "litellm.yaml").write_text(
        yaml.safe_dump({"model_list": [{"model_name": "planted", "litellm_params": model}], "router_settings": limited})
    )
    section = OpenAISection(
        model="planted", base_url=f"http://127.0.0.1:{port}/v1", api_key_env=KEY_ENV, max_concurrency=NUM_POOLS
    )
    pools = [pool_of(("one", "two", "three"), prompt_id=f"p{n}", prompt=f"Question {n}?") for n in range(NUM_POOLS)]
    command = [str(python.parent / "litellm"), "--config", "litellm.yaml", "--host", "127.0.0.1", "--port", str(port)]
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": os.environ[KEY_ENV]}
    alive = f"http://127.0.0.1:{port}/health/liveliness"
    with served(command, sign_of_life=alive, log=log, env=environment):
        start = time.monotonic()
        judgements = judge_all(section, pools, store_path)
        seconds = time.monotonic() - start
        statuses = Counter(re.findall(r'"POST /v1/chat/completions HTTP/1.1" (\d+)', log.read_text()))
        again = judge_all(section, pools, store_path)
        assert Counter(re.findall(r'"POST /v1/chat/completions HTTP/1.1" (\d+)', log.read_text())) == statuses
    with closing(VerdictStore(store_path)) as store:
        tally, receipts = store.tallies(), store.receipts()
    assert [row.state for row in judgements] == ["ok"] * NUM_POOLS, judgements
    assert {row.answers[0].scores for row in judgements} == {(5, 3, 1)}  # in the order in which they were shown
    assert again == judgements
    # The server's own count: what was refused, one reply a verdict, and those by which it was probed.
    assert set(statuses) == {"200", "429"}
    assert [(one.state, one.verdicts) for one in tally] == [("ok", NUM_POOLS)]
    assert statuses["429"] == tally[0].tries - NUM_POOLS > 0
    num_probes = statuses["200"] - NUM_POOLS
    assert 1 <= num_probes <= 2
    assert [(one.requests, one.unmetered) for one in receipts] == [(statuses.total(), 0)]
    assert os.environ[KEY_ENV].encode() not in store_path.read_bytes()
    with capsys.disabled():
        print(f"\n[litellm: {dict(statuses)} in {seconds:.0f} s]")


def test_llama_cpps_server_answers_with_log_probabilities(tmp_path, shared_data, capsys):
    python, port = python_of("DNO_LLAMA_PYTHON"), free_port()
    model = shared_data / "tiny_llama" / "stories260K.gguf"
    command = [str(python), "-m", "llama_cpp.server", "--model", str(model), "--n_ctx", "4096", "--logits_all", "true"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--model_alias", "stories"]
    url = f"http://127.0.0.1:{port}/v1"
    section = OpenAISection(
        form="logprob", model="stories", base_url=url, api_key_env=None, max_concurrency=2, max_tries=1
    )
    judge = PairWise(section, seed=0)
    pool = pool_of(("Once upon a time there was a cat.", "No."), prompt="Tell a story.")
    with served(command, sign_of_life=f"{url}/models", log=tmp_path / "server.log", env={}):
        offers, reply = asyncio.run(ask_once(section, judge, pool))
        judgement = judge_all(section, [pool], tmp_path / "annotations.sqlite")[0]
    assert isinstance(reply, Reply), reply
    assert reply.first_logprobs, reply
    assert all(logprob <= 1e-6 for logprob in reply.first_logprobs.values())
    assert len(reply.first_logprobs) >= 5
    assert reply.tokens_in > 100
    assert reply.tokens_out <= 1
    # What so small a model says is no verdict, and is not taken for one.
    assert judgement.state == "ok" or "among the first tokens" in judgement.detail, judgement
    with capsys.disabled():
        print(f"\n[llama.cpp: {offers}, first tokens {reply.first_logprobs}, {judgement.state}: {judgement.detail}]")


async def ask_once(section: OpenAISection, judge: ChatJudge, pool: Pool) -> tuple[Capabilities, Reply | Trouble]:
    client = EndpointClient(section, who="the judge", place="annotation.openai")
    question = judge.question(pool, order=(0, 1))
    try:
        return await client.probe(question.body), await client.send(question.body)
    finally:
        await client.close()
