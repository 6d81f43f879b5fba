"""The loss in a Flax NNX training loop, on pairs that somebody else has collected and labelled.

    python examples/flax_nnx.py

Rows have a prompt of 2 tokens, a response of 4 to 8, and padding. A response's score is its even tokens less its odd
ones; as in DNO-Prct, pairs are kept whose scores are well apart. Printed are figures of pairs held out.
"""

import math

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dno_jax.logprobs import head_token_logprobs, sequence_logprobs
from dno_jax.losses import dno_loss, reward_margin

VOCAB, PROMPT, RESPONSE, WIDTH, BETA = 16, 2, 8, 32, 0.1


class LanguageModel(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(WIDTH, WIDTH, rngs=rngs))
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, token):  # [B, T] -> [B, T, WIDTH]: not the logits, which head_token_logprobs makes in slices
        return self.rnn(self.embed(token))


def make_pairs(seed, *, num_pairs):
    """Return tokens [P, 2, T], the preferred row first, and which of them are the response."""
    rng = np.random.default_rng(seed)
    token = rng.integers(VOCAB, size=(num_pairs, 2, PROMPT + RESPONSE))
    token[:, 1, :PROMPT] = token[:, 0, :PROMPT]
    place = np.arange(PROMPT + RESPONSE)
    mask = (place >= PROMPT) & (place < PROMPT + rng.integers(4, RESPONSE + 1, size=(num_pairs, 2, 1)))
    score = np.where(mask, 1 - 2 * (token % 2), 0).sum(-1)
    best_first = np.argsort(-score, axis=-1)[..., None]
    token, mask = (np.take_along_axis(array, best_first, axis=1) for array in (token, mask))
    well_apart = np.abs(score[:, 0] - score[:, 1]) >= 3
    return token[well_apart], mask[well_apart]


@nnx.jit
def response_logprobs(model, token, mask):
    """Return log pi(y|x) of each row, [P, 2]."""
    rows = token.reshape(-1, token.shape[-1])
    hidden = model(rows[:, :-1])
    logprob = head_token_logprobs(hidden, model.head.kernel[...], rows[:, 1:], chunk=1024)
    return sequence_logprobs(logprob.reshape(*token.shape[:2], -1), mask[..., 1:])


def loss_and_figures(model, token, mask, reference):
    logprob = response_logprobs(model, token, mask)
    four = {
        "chosen_logprob": logprob[:, 0],
        "rejected_logprob": logprob[:, 1],
        "reference_chosen_logprob": reference[:, 0],
        "reference_rejected_logprob": reference[:, 1],
    }
    loss = dno_loss(**four, target=1.0, beta=BETA).mean()  # Eq. 13
    margin = reward_margin(**four, beta=BETA)
    return loss, {"loss": loss, "accuracy": jnp.mean(margin > 0), "margin": margin.mean()}


@nnx.jit
def train_step(model, optimizer, token, mask, reference):
    gradient, figures = nnx.grad(loss_and_figures, has_aux=True)(model, token, mask, reference)
    optimizer.update(model, gradient)
    return figures


def main(*, num_pairs=4096, batch_size=64, num_epochs=2, seed=0):
    model = LanguageModel(rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    train, held_out = make_pairs(seed, num_pairs=num_pairs), make_pairs(seed + 1, num_pairs=512)
    # The reference is numbers: computed once, before the model moves, so that training needs no second model.
    train, held_out = ((*pairs, response_logprobs(model, *pairs)) for pairs in (train, held_out))

    evaluate, history = nnx.jit(loss_and_figures), []
    print("step      loss  accuracy  margin")
    num_steps = num_epochs * (len(train[0]) // batch_size)
    for step in range(num_steps + 1):
        if step % max(num_steps // 6, 1) == 0:
            figures = evaluate(model, *held_out)[1]
            history.append({"step": step} | {name: float(value) for name, value in figures.items()})
            print("{step:4d}  {loss:8.5f}  {accuracy:8.3f}  {margin:6.3f}".format(**history[-1]))
        batch = np.arange(step * batch_size, (step + 1) * batch_size) % len(train[0])
        train_step(model, optimizer, *(array[batch] for array in train))
    print(f"the first loss is log 2 = {math.log(2):.5f}: there the policy is its reference")
    return history


if __name__ == "__main__":
    main()
