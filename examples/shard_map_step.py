"""The loss inside jax.shard_map: a data-parallel step over all devices, its parameters replicated or sharded (FSDP).

    python examples/shard_map_step.py [--fsdp]
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python examples/shard_map_step.py --fsdp

Of two responses the one with more even tokens is preferred. Both responses of a pair are on one device: only means are
communicated. The figures do not depend on the number of devices (1, 2, 4 or 8).
"""

import argparse
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dno_jax.logprobs import head_token_logprobs, sequence_logprobs
from dno_jax.losses import dno_loss, reward_margin

VOCAB, LENGTH, WIDTH, BETA = 16, 8, 32, 0.1
SHAPES = {"embed": (VOCAB, WIDTH), "position": (LENGTH, WIDTH), "qkv": (WIDTH, 3 * WIDTH), "head": (WIDTH, VOCAB)}


def make_pairs(seed, *, num_pairs):
    """Return tokens [P, 2, 1 + LENGTH], the preferred row first; token 0 begins every row."""
    token = np.random.default_rng(seed).integers(VOCAB, size=(4 * num_pairs, 2, 1 + LENGTH))
    token[..., 0] = 0
    even = np.sum(token[..., 1:] % 2 == 0, axis=-1)
    return token[even[:, 0] > even[:, 1]][:num_pairs]


def response_logprobs(params, token):
    """Return log pi(y|x) of each row, [P, 2], by one block of causal attention."""
    rows = token.reshape(-1, 1 + LENGTH)
    x = params["embed"][rows[:, :-1]] + params["position"][None]
    query, key, value = jnp.split((x @ params["qkv"])[:, :, None], 3, axis=-1)  # one head
    hidden = x + jax.nn.dot_product_attention(query, key, value, is_causal=True)[:, :, 0]
    logprob = head_token_logprobs(hidden, params["head"], rows[:, 1:], chunk=1024)
    return sequence_logprobs(logprob, jnp.ones_like(logprob, bool)).reshape(token.shape[:2])


def loss_and_figures(params, token, reference, *, fsdp):
    """Run on one device, on its own pairs and its own rows of the parameters."""
    if fsdp:
        # Backwards, a gather of parameters is the sum and the scatter of their gradients.
        params = jax.tree.map(partial(jax.lax.all_gather, axis_name="data", tiled=True), params)
    logprob = response_logprobs(params, token)
    four = {
        "chosen_logprob": logprob[:, 0],
        "rejected_logprob": logprob[:, 1],
        "reference_chosen_logprob": reference[:, 0],
        "reference_rejected_logprob": reference[:, 1],
    }
    loss = dno_loss(**four, target=1.0, beta=BETA).mean()
    margin = reward_margin(**four, beta=BETA)
    figures = {"loss": loss, "accuracy": jnp.mean(margin > 0), "margin": margin.mean()}
    # The mean over devices is part of the loss. Its gradient is then that of the whole batch, with no psum to forget or
    # to count twice; for this shard_map has to know what is replicated (check_vma=True, the default).
    return jax.lax.pmean((loss, figures), "data")


def main(*, fsdp=False, num_steps=48, batch_size=256, seed=0):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    pairs, weights = P("data"), P("data") if fsdp else P()

    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    params = {name: 0.2 * jax.random.normal(k, SHAPES[name]) for k, name in zip(keys, SHAPES, strict=True)}
    params = jax.device_put(params, NamedSharding(mesh, weights))
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)  # laid out like the parameters; under jit it would be on one device
    token = make_pairs(seed, num_pairs=num_steps * batch_size)
    reference = np.asarray(jax.jit(response_logprobs)(params, token))  # numbers: the step needs no second model

    gradient_and_figures = jax.shard_map(
        jax.grad(partial(loss_and_figures, fsdp=fsdp), has_aux=True),
        mesh=mesh,
        in_specs=(weights, pairs, pairs),
        out_specs=(weights, P()),
    )

    @jax.jit
    def train_step(params, state, token, reference):
        gradient, figures = gradient_and_figures(params, token, reference)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, figures

    history = []
    print(f"{mesh.size} devices, parameters {'sharded' if fsdp else 'replicated'}")
    print("step      loss  accuracy  margin")
    for step in range(num_steps):
        batch = slice(step * batch_size, (step + 1) * batch_size)
        params, state, figures = train_step(params, state, token[batch], reference[batch])
        if step % max(num_steps // 6, 1) == 0 or step == num_steps - 1:
            history.append({"step": step} | {name: float(value) for name, value in figures.items()})
            print("{step:4d}  {loss:8.5f}  {accuracy:8.3f}  {margin:6.3f}".format(**history[-1]))
    print(f"the first loss is log 2 = {math.log(2):.5f}: there the policy is its reference")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="shard the parameters and the optimizer's state as well")
    main(fsdp=parser.parse_args().fsdp)
