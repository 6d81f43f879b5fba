import pytest

from dno_jax.errors import DnoError
from dno_jax.model.attention import xla_attention
from dno_jax.parallel.sharding import DECODE, TRAIN
from dno_jax.stages.runtime import Runtime


def test_the_model_attends_as_configured(make_config):
    runtime = Runtime.start(make_config())
    assert runtime.attention_backend == "xla"  # auto, on a CPU
    assert runtime.model(TRAIN).attention is runtime.model(DECODE).attention is xla_attention
    with pytest.raises(DnoError, match=r"model\.attention is 'splash', but it runs on tpus"):
        Runtime.start(make_config(model={"attention": "splash"}))
