"""What tests read out of a batch."""

import numpy as np


def response_tokens(batch, pair, candidate):
    """The tokens that are trained of one text, in order; pairs are numbered as in a batch of one micro-batch."""
    mine = np.asarray(batch.text[0]) == pair * batch.num_tokens.shape[-1] + candidate
    return np.asarray(batch.response_token[0])[mine]
