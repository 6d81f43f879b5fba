"""The loss in an Equinox training loop, and others of the family in its place.

    python examples/equinox_loop.py [--loss dno | ipo | rebel]

The model is written for one row and mapped over a batch. Judges like even tokens, and do not always agree: each of 9
compares the two responses, and the target is the share that preferred the one most of them prefer. Printed are figures
of pairs held out; the accuracy is that on pairs where at least 8 of the judges agree.
"""

import argparse
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dno_jax import losses
from dno_jax.logprobs import head_token_logprobs, sequence_logprobs

VOCAB, PROMPT, RESPONSE, WIDTH = 16, 2, 8, 32

# Each takes the four log-probabilities of a pair, and P(chosen preferred).
LOSSES = {
    "dno": partial(losses.dno_loss, beta=0.1),
    "ipo": partial(losses.ipo_loss, beta=0.1),
    "rebel": lambda *, target, **four: losses.rebel_loss(**four, reward_difference=2.0 * target - 1.0, beta=0.1),
}


class LanguageModel(eqx.Module):
    embed: eqx.nn.Embedding
    position: jax.Array
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(VOCAB, WIDTH, key=keys[0])
        self.position = jax.random.normal(keys[1], (PROMPT + RESPONSE - 1, WIDTH))
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=keys[2])
        self.head = eqx.nn.Linear(WIDTH, VOCAB, use_bias=False, key=keys[3])

    def __call__(self, token):  # [T] -> [T, WIDTH]
        x = jax.vmap(self.embed)(token) + self.position
        return x + self.attention(x, x, x, mask=jnp.tril(jnp.ones((len(token), len(token)), bool)))


def make_pairs(seed, *, num_pairs, num_judges=9):
    """Return tokens [P, 2, T], the chosen row first, and the share of judges [P] that prefer it."""
    rng = np.random.default_rng(seed)
    token = rng.integers(VOCAB, size=(num_pairs, 2, PROMPT + RESPONSE))
    token[:, 1, :PROMPT] = token[:, 0, :PROMPT]
    even = np.sum(token[..., PROMPT:] % 2 == 0, axis=-1)
    opinion = (even[:, 0] - even[:, 1])[:, None] + rng.logistic(size=(num_pairs, num_judges))
    votes = np.mean(opinion > 0, axis=-1)
    token = np.where(votes[:, None, None] > 0.5, token, token[:, ::-1])
    return token, np.maximum(votes, 1 - votes).astype(np.float32)


@eqx.filter_jit
def response_logprobs(model, token):
    """Return log pi(y|x) of each row, [P, 2]."""
    rows = token.reshape(-1, token.shape[-1])
    hidden = jax.vmap(model)(rows[:, :-1])
    logprob = head_token_logprobs(hidden, model.head.weight.T, rows[:, 1:], chunk=1024)
    is_response = jnp.arange(1, rows.shape[1]) >= PROMPT
    return sequence_logprobs(logprob, jnp.broadcast_to(is_response, logprob.shape)).reshape(token.shape[:2])


def loss_and_figures(model, loss_function, token, target, reference):
    logprob = response_logprobs(model, token)
    four = {
        "chosen_logprob": logprob[:, 0],
        "rejected_logprob": logprob[:, 1],
        "reference_chosen_logprob": reference[:, 0],
        "reference_rejected_logprob": reference[:, 1],
    }
    loss = loss_function(**four, target=target).mean()
    margin = losses.reward_margin(**four, beta=0.1)
    return loss, {"loss": loss, "accuracy": jnp.mean(margin > 0, where=target > 0.8), "margin": margin.mean()}


@eqx.filter_jit
def train_step(model, state, optimizer, *batch):
    gradient, _ = eqx.filter_grad(loss_and_figures, has_aux=True)(model, *batch)
    updates, state = optimizer.update(gradient, state)
    return eqx.apply_updates(model, updates), state


def main(*, loss="dno", num_pairs=4096, batch_size=128, num_epochs=2, seed=0):
    model = LanguageModel(jax.random.key(seed))
    optimizer = optax.adam(3e-3)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    train, held_out = make_pairs(seed, num_pairs=num_pairs), make_pairs(seed + 1, num_pairs=512)
    # The reference is numbers: computed once, before the model moves, so that training needs no second model.
    train, held_out = ((*pairs, response_logprobs(model, pairs[0])) for pairs in (train, held_out))

    evaluate, history = eqx.filter_jit(loss_and_figures), []
    print("step      loss  accuracy  margin")
    num_steps = num_epochs * num_pairs // batch_size
    for step in range(num_steps + 1):
        if step % max(num_steps // 6, 1) == 0:
            figures = evaluate(model, LOSSES[loss], *held_out)[1]
            history.append({"step": step} | {name: float(value) for name, value in figures.items()})
            print("{step:4d}  {loss:8.5f}  {accuracy:8.3f}  {margin:6.3f}".format(**history[-1]))
        batch = slice(step * batch_size % num_pairs, step * batch_size % num_pairs + batch_size)
        model, state = train_step(model, state, optimizer, LOSSES[loss], *(array[batch] for array in train))
    if loss == "dno":
        print(f"the first loss is log 2 = {math.log(2):.5f}: there the policy is its reference")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, default="dno")
    main(loss=parser.parse_args().loss)
