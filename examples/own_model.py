"""Train a model that is not ours with one call: a recurrent network in plain JAX, and its own log-probabilities.

    python examples/own_model.py

`make_train_step` wants a function from parameters and a batch to log pi(y|x), an optimiser and a loss. Of two responses
the one with more even tokens is preferred, and stands first.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dno_jax.losses import dno_loss, reward_margin
from dno_jax.training.library import make_train_step

VOCAB, LENGTH, WIDTH, BETA = 16, 8, 32, 0.1


def init(key):
    shapes = {"embed": (VOCAB, WIDTH), "into": (WIDTH, WIDTH), "again": (WIDTH, WIDTH), "head": (WIDTH, VOCAB)}
    keys = jax.random.split(key, len(shapes))
    return {name: 0.3 * jax.random.normal(own, shape) for own, (name, shape) in zip(keys, shapes.items(), strict=True)}


def response_logprobs(params, batch):
    """Return log pi(y|x) of each response, [P, 2]: a recurrent network reads token by token."""
    token = batch["token"].reshape(-1, 1 + LENGTH)

    def read(state, own):
        state = jnp.tanh(params["embed"][own] @ params["into"] + state @ params["again"])
        return state, state

    _, states = jax.lax.scan(read, jnp.zeros((len(token), WIDTH)), token[:, :-1].T)
    logprob = jax.nn.log_softmax(states @ params["head"])  # [LENGTH, rows, VOCAB]
    chosen = jnp.take_along_axis(logprob, token[:, 1:].T[..., None], axis=-1)[..., 0]
    return chosen.sum(0).reshape(-1, 2)


def loss(logprob, batch):
    reference = batch["reference"]
    columns = {
        "chosen_logprob": logprob[:, 0],
        "rejected_logprob": logprob[:, 1],
        "reference_chosen_logprob": reference[:, 0],
        "reference_rejected_logprob": reference[:, 1],
    }
    margin = reward_margin(**columns, beta=BETA)
    return dno_loss(**columns, target=1.0, beta=BETA), {"accuracy": (margin > 0).astype(jnp.float32)}


def make_pairs(seed, *, num_pairs):
    """Return tokens [P, 2, 1 + LENGTH], the preferred row first; token 0 begins every row."""
    token = np.random.default_rng(seed).integers(VOCAB, size=(4 * num_pairs, 2, 1 + LENGTH))
    token[..., 0] = 0
    even = np.sum(token[..., 1:] % 2 == 0, axis=-1)
    return token[even[:, 0] > even[:, 1]][:num_pairs]


def main(*, num_steps=40, batch_size=256, seed=0, parts=2):
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("pairs",))
    params = jax.device_put(init(jax.random.key(seed)), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    token = make_pairs(seed, num_pairs=num_steps * batch_size)
    reference = np.asarray(jax.jit(response_logprobs)(params, {"token": token}))  # numbers: no second model is needed
    tx = optax.adam(1e-2)
    state, step = tx.init(params), make_train_step(response_logprobs, tx, loss, mesh, parts=parts)
    history = []
    for index in range(num_steps):
        rows = slice(index * batch_size, (index + 1) * batch_size)
        params, state, figures = step(params, state, {"token": token[rows], "reference": reference[rows]})
        history.append({name: float(value) for name, value in figures.items()})
        if index % max(num_steps // 6, 1) == 0 or index == num_steps - 1:
            print(f"step {index:3}  loss {history[-1]['loss']:.4f}  accuracy {history[-1]['accuracy']:.3f}")
    return history


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
