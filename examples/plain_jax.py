"""Direct Nash Optimization in plain JAX: the parameters are a dict, the pairs are sampled, the reference moves.

    python examples/plain_jax.py

A prompt is one token, a response four. The judge prefers the response that has more tokens of the prompt's parity. So
few responses exist that all of them are listed, and how often the new policy beats the old one is known exactly.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dno_jax.logprobs import head_token_logprobs, sequence_logprobs
from dno_jax.losses import dno_loss, reward_margin, self_play_win_rates

VOCAB, LENGTH, WIDTH, BETA = 6, 4, 32, 0.2  # BETA is the paper's eta
PROMPTS = np.arange(VOCAB)[:, None]
ROWS = np.array(list(itertools.product(range(VOCAB), repeat=1 + LENGTH))).reshape(VOCAB, -1, 1 + LENGTH)
SCORES = (ROWS[..., 1:] % 2 == ROWS[..., :1] % 2).sum(-1)  # [prompt, response]: tokens that the judge likes


def preference(score):
    """Return P(y > y' | x) of all pairs: 1 for a win, 1/2 for a tie, 0 for a loss."""
    return (1 + np.sign(score[..., :, None] - score[..., None, :])) / 2


def init(key):
    shapes = {"embed": (VOCAB, WIDTH), "position": (LENGTH, WIDTH), "qkv": (WIDTH, 3 * WIDTH), "head": (WIDTH, VOCAB)}
    keys = jax.random.split(key, len(shapes))
    return {name: 0.1 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


@jax.jit
def response_logprobs(params, row):
    """Return log pi(y|x) of rows [..., 1 + LENGTH], each a prompt and a response, by one block of causal attention."""
    token = row.reshape(-1, 1 + LENGTH)
    x = params["embed"][token[:, :-1]] + params["position"][None]
    query, key, value = jnp.split((x @ params["qkv"])[:, :, None], 3, axis=-1)  # one head
    hidden = x + jax.nn.dot_product_attention(query, key, value, is_causal=True)[:, :, 0]
    logprob = head_token_logprobs(hidden, params["head"], token[:, 1:], chunk=4096)
    is_response = jnp.ones(logprob.shape, bool)  # the prompt is never predicted here
    return sequence_logprobs(logprob, is_response).reshape(row.shape[:-1])


def sample_pairs(params, key, *, num_samples):
    """Return pairs of the policy's own responses, the better one first, and their targets: sigmoid(r_t - r_t')."""
    choice = jax.random.categorical(key, response_logprobs(params, ROWS)[:, None], shape=(VOCAB, num_samples))
    win_rate = np.asarray(self_play_win_rates(preference=preference(SCORES[PROMPTS, choice])))  # r_t, from the samples
    best_first = np.argsort(-win_rate, axis=1)
    half = num_samples // 2
    pairs = np.stack([best_first[:, :half], best_first[:, : half - 1 : -1]], axis=-1)  # the best with the worst, ...
    rows, win_rate = ROWS[PROMPTS, choice][PROMPTS[..., None], pairs], win_rate[PROMPTS[..., None], pairs]
    return rows.reshape(-1, 2, 1 + LENGTH), jax.nn.sigmoid(win_rate[..., 0] - win_rate[..., 1]).reshape(-1)


def loss_and_figures(params, rows, reference, target):
    logprob = response_logprobs(params, rows)  # [P, 2]
    four = {
        "chosen_logprob": logprob[:, 0],
        "rejected_logprob": logprob[:, 1],
        "reference_chosen_logprob": reference[:, 0],
        "reference_rejected_logprob": reference[:, 1],
    }
    loss = dno_loss(**four, target=target, beta=BETA).mean()  # Eq. 8
    margin = reward_margin(**four, beta=BETA)
    return loss, {"loss": loss, "accuracy": jnp.mean(margin > 0, where=target > 0.5), "margin": margin.mean()}


def main(*, num_iterations=2, num_steps=100, num_samples=32, seed=0):
    key = jax.random.key(seed)
    policy = init(jax.random.fold_in(key, 0))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, *batch):
        gradient, figures = jax.grad(loss_and_figures, has_aux=True)(params, *batch)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, figures

    history = []
    print("iteration  step      loss  accuracy  margin")
    for iteration in range(num_iterations):
        previous = policy
        rows, target = sample_pairs(previous, jax.random.fold_in(key, iteration + 1), num_samples=num_samples)
        reference = response_logprobs(previous, rows)  # numbers: the step needs no second model
        state = optimizer.init(policy)
        for index in range(num_steps + 1):
            policy, state, figures = step(policy, state, rows, reference, target)
            figures = {"iteration": iteration, "step": index} | {name: float(value) for name, value in figures.items()}
            history.append(figures)
            if index % max(num_steps // 4, 1) == 0:
                print("{iteration:9d}  {step:4d}  {loss:8.5f}  {accuracy:8.3f}  {margin:6.3f}".format(**figures))
        new, old = (np.exp(response_logprobs(params, ROWS)) for params in (policy, previous))
        wins = np.einsum("xi,xij,xj->x", new, preference(SCORES), old).mean()
        print(f"the new policy beats the old one with probability {wins:.3f}")
        history[-1]["wins"] = float(wins)
    print(f"each iteration starts at log 2 = {math.log(2):.5f}: there the policy is its reference")
    return history


if __name__ == "__main__":
    main()
