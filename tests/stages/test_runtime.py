"""What a run fixes about its model before anything is computed."""

from __future__ import annotations

import json

import pytest

from dno_jax.config import RunConfig
from dno_jax.errors import DnoError
from dno_jax.stages.runtime import Runtime
from tests.small import small_tree


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_longest_text_of_the_run_selects_the_rotation(tmp_path):
    """Prompt and response together, or the judge's where the policy judges itself: one rotation for all stages."""
    tree = small_tree(tmp_path)  # prompts of up to 16 tokens, responses of up to 16
    file = tmp_path / "checkpoint" / "config.json"
    assert Runtime.start(RunConfig.model_validate(tree)).model_config.rope_length is None
    edit(file, max_position_embeddings=8, rope_scaling={"type": "dynamic", "factor": 4.0})
    runtime = Runtime.start(RunConfig.model_validate(tree))
    assert runtime.model_config.rope_length == 32
    judge = {"max_prompt_length": 40, "max_new_tokens": 8}
    changes = {
        "annotation": {"kind": "self", "self_judge": judge},
        "prompts": {**tree["prompts"], "held_out_path": None},
    }
    judged = RunConfig.model_validate({**tree, **changes})
    assert Runtime.start(judged).model_config.rope_length == 48
    # Stretched four times, a context of 7 ends at 28.
    edit(file, max_position_embeddings=7)
    with pytest.raises(DnoError, match="up to 32 tokens exceed the model's context of 28"):
        Runtime.start(RunConfig.model_validate(tree))
