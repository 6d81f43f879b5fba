"""Ten AdamW steps of DNO-Prct on a real checkpoint and real pairs, against an independent torch implementation."""

import gzip
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dno_jax.config import LossSection, OptimizerSection
from dno_jax.model import hf
from dno_jax.model.decoder import Decoder
from dno_jax.training.batches import TrainingRow, make_batch
from dno_jax.training.objectives import preference_loss
from dno_jax.training.optimizers import make_optimizer
from dno_jax.training.state import TrainState
from dno_jax.training.step import StepConfig, score_step, train_step

BETA, RATE, STEPS, PAIRS = 0.1, 1e-3, 10, 8


@pytest.fixture(scope="module")
def pairs(shared_data):
    """(prompt ids, chosen ids, rejected ids) of the first labelled pairs that fit 128 tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "tiny_llama", local_files_only=True)
    found = []
    with gzip.open(shared_data / "prompts" / "pairs_all.jsonl.gz", "rt") as file:
        for line in file:
            row = json.loads(line)
            if row.get("label") not in (1, 2):
                continue
            order = ("response_1", "response_2") if row["label"] == 1 else ("response_2", "response_1")
            prompt = tokenizer(row["prompt"]).input_ids
            responses = [[*tokenizer(row["prompt"] + " " + row[name]).input_ids[len(prompt) :], 2] for name in order]
            if all(len(prompt) + len(response) <= 128 for response in responses):
                found.append((prompt, *responses))
            if len(found) == PAIRS:
                return found
    raise AssertionError("too few pairs")


def torch_history(path, pairs):
    """The same training, written from the paper's Eq. 13 with transformers' model and torch's AdamW."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def logprobs():
        values = []
        for prompt, *responses in pairs:
            row = []
            for response in responses:
                ids = torch.tensor([prompt + response])
                scores = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
                taken = scores.gather(1, ids[0, 1:, None])[:, 0]
                row.append(taken[len(prompt) - 1 :].sum())
            values.append(torch.stack(row))
        return torch.stack(values)

    with torch.no_grad():
        reference = logprobs()
    history = []
    for _ in range(STEPS):
        ratio = logprobs() - reference
        loss = -torch.nn.functional.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append((float(loss.detach()), float(norm)))
    return reference.numpy(), history


def test_ten_steps_match_torch_step_by_step(shared_data, pairs):
    path = shared_data / "tiny_llama"
    expected_reference, expected = torch_history(path, pairs)

    config, params = hf.load(path)
    model = Decoder(config, remat="full")
    rows = [TrainingRow((tuple(p), tuple(p)), (tuple(c), tuple(r))) for p, c, r in pairs]
    batch = make_batch(rows, batch_size=PAIRS, max_length=128)
    reference = np.asarray(score_step(params, batch, model=model, chunk=128))
    # Sums of up to 128 log-probabilities of size 5: 1e-6 of rounding each.
    np.testing.assert_allclose(reference, expected_reference, atol=2e-3)
    batch = batch.replace(previous_logprob=reference[None])

    optimizer = make_optimizer(OptimizerSection(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0))
    params = jax.tree.map(jnp.asarray, params)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))
    step = StepConfig(model, optimizer, preference_loss(LossSection(beta=BETA)), chunk=128)
    history = []
    for _ in range(STEPS):
        state, metrics = train_step(state, batch, jnp.float32(RATE), config=step)
        history.append((float(metrics["loss"]), float(metrics["grad_norm"])))

    assert history[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert history[-1][0] < 0.9 * history[0][0]
    for step, (found, wanted) in enumerate(zip(history, expected, strict=True)):
        assert found[0] == pytest.approx(wanted[0], abs=1e-4), f"loss at step {step}"
        assert found[1] == pytest.approx(wanted[1], rel=1e-3), f"gradient norm at step {step}"
