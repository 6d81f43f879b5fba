"""What it costs to hold files to their digests as they are read, and templates to their limits.

    python benchmarks/trust.py --mb 64

Shards are of rollouts: "parse" is reading one without a digest, "hash" is what a digest adds over the same bytes. A
policy of `--mb` MB is read with its fingerprint, as float32 and as bfloat16 (one array at a time). Each figure is the
median of `--repeats`, in turns; processor seconds per GB of file, for other work may run beside.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from transformers import PreTrainedTokenizerFast

from benchmarks.common import report
from dno_jax.model.text.template_limits import apply_template
from dno_jax.records import Rollout
from dno_jax.stage_dir import StageDir
from dno_jax.training import checkpoint

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = epath.Path(folder)
        shards(root, options.repeats)
        policy(root / "001", options.mb, options.repeats)
    templates(options.repeats)


def shards(root: epath.Path, repeats: int) -> None:
    """Parse a shard of rollouts, and hash its bytes."""
    rng = np.random.default_rng(0)
    stage, text = StageDir(root, "sample", 0), "A response of some words. " * 80
    rows = [
        Rollout(
            rollout_id=f"000/p{index}/0", prompt_id=f"p{index}", sample=0, source="policy", policy=0, text=text,
            token_ids=rng.integers(0, 32000, 512).tolist(), prompt_token_ids=rng.integers(0, 32000, 128).tolist(),
            logprob=-1.0, finish="stop",
        )
        for index in range(2000)
    ]  # fmt: skip
    stage.write_shard("0000000", rows)
    content = (stage.path / "0000000.jsonl").read_bytes()
    parse, digest = medians(
        repeats, lambda: stage.read_shard(Rollout, "0000000"), lambda: hashlib.sha256(content).hexdigest()
    )
    gb = len(content) / 1e9
    report("trust shards", file_mb=1e3 * gb, parse_s_per_gb=parse / gb, hash_s_per_gb=digest / gb)


def policy(path: epath.Path, megabytes: int, repeats: int) -> None:
    """Read a policy, and make the fingerprint of what was read."""
    size = megabytes * 10**6 // 4 // 8
    made = {f"layer{index}": jax.random.normal(jax.random.key(index), (size // 256, 256)) for index in range(8)}
    noted = checkpoint.save_policy(path, made)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: place, made)

    def read(dtype: jnp.dtype) -> None:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), made)
        jax.block_until_ready(checkpoint.load_policy(path, shapes=shapes, shardings=shardings))

    def fingerprint() -> None:
        assert checkpoint.fingerprint(made) == noted

    whole, cast, sums = medians(repeats, lambda: read(jnp.float32), lambda: read(jnp.bfloat16), fingerprint)
    gb = sum(leaf.nbytes for leaf in made.values()) / 1e9
    report("trust policy", gb=gb, read_s_per_gb=whole / gb, cast_s_per_gb=cast / gb, fingerprint_s_per_gb=sums / gb)


def templates(repeats: int) -> None:
    """Render chats here and in the process that is bounded."""
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    chat = [{"role": "user", "content": "A question of some words. " * 40}]
    options = {"chat_template": _TEMPLATE, "tokenize": False, "add_generation_prompt": True}

    def here() -> None:
        for _ in range(200):
            tokenizer.apply_chat_template(chat, **options)

    def apart() -> None:
        for _ in range(200):
            apply_template(tokenizer, chat, **options)

    apart()
    inside, outside = medians(repeats, here, apart, clock=time.perf_counter)
    report("trust templates", here_ms=inside * 5, apart_ms=outside * 5)


def medians(
    repeats: int, *calls: Callable[[], object], clock: Callable[[], float] = time.process_time
) -> tuple[float, ...]:
    """The median seconds of each call, taken in turns after one of each."""
    for call in calls:
        call()
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for own, call in zip(found, calls, strict=True):
            start = clock()
            call()
            own.append(clock() - start)
    return tuple(map(statistics.median, found))


if __name__ == "__main__":
    main()
