"""`python -m tests.model.two_processes ADDRESS CHECKPOINT OUT ID`: one of two processes that import and export."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

from dno_jax.config import MeshSection
from dno_jax.errors import DnoError
from dno_jax.model import hf
from dno_jax.parallel.cluster import initialize
from dno_jax.parallel.mesh import make_mesh
from dno_jax.parallel.sharding import TRAIN
from dno_jax.training.state import param_shardings


def main(address: str, checkpoint: str, out: str, process_id: str) -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    initialize(coordinator=address, num_processes=2, process_id=int(process_id))
    config = hf.read_config(checkpoint)
    shardings = param_shardings(config, make_mesh(MeshSection(data=1, fsdp=2)), TRAIN)
    calls: list[tuple[int, int]] = []
    _, params = hf.load(checkpoint, shardings=shardings, progress=lambda *call: calls.append(call))
    _, whole = hf.load(checkpoint)
    equal = [
        np.array_equal(np.asarray(shard.data), there[shard.index])
        for leaf, there in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True)
        for shard in leaf.addressable_shards
    ]
    hf.save(out, config, params, source=checkpoint)
    refused = ""
    try:
        hf.save(out, config, params, source=checkpoint)
    except DnoError as error:
        refused = str(error)
    found = {
        "read": sum(count for count, _ in calls),
        "total": calls[0][1],
        "shards_equal": all(equal) and len(equal) == len(jax.tree.leaves(params)),
        "exported": True,
        "refused": refused,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
