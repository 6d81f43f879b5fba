"""Pairs of real lengths for benchmarks/train.py.

    python benchmarks/real_pairs.py DATA TOKENIZER OUT.json [--max-length N]

DATA is a folder of AlpacaEval's: prompts.jsonl.gz (index, instruction) and outputs/*.jsonl.gz, one per model (index,
output); a pair is the answers of two models to one instruction, in turn. Or it is a file of pairs (.jsonl.gz, rows with
prompt, response_1 and response_2). TOKENIZER is a tokenizer.json. Texts are cut as training would cut them: prompts to
a quarter of the maximum, responses to what is left.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def rows_of(path: Path) -> list[dict]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def texts(data: Path) -> Iterator[tuple[str, str | None, str | None]]:
    if data.is_file():
        for row in rows_of(data):
            yield row["prompt"], row["response_1"], row["response_2"]
        return
    prompts = rows_of(data / "prompts.jsonl.gz")
    models = [{row["index"]: row["output"] for row in rows_of(path)} for path in sorted((data / "outputs").iterdir())]
    for number, row in enumerate(prompts):
        first, second = (models[(number + own) % len(models)].get(row["index"]) for own in range(2))
        yield row["instruction"], first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-length", type=int, default=1024)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    pairs = []
    for prompt, chosen, rejected in texts(options.data):
        if not (isinstance(chosen, str) and isinstance(rejected, str)):
            continue  # a response that is missing
        ids = tokenizer.encode(prompt).ids[: options.max_length // 4]
        left = options.max_length - len(ids)
        answers = [tokenizer.encode(text, add_special_tokens=False).ids[:left] for text in (chosen, rejected)]
        if all(answers):
            pairs.append({"prompt_ids": ids, "chosen_ids": answers[0], "rejected_ids": answers[1]})
    np.random.default_rng(0).shuffle(pairs)
    options.out.write_text(json.dumps(pairs))
    lengths = np.asarray([[len(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")] for pair in pairs])
    print(json.dumps({"pairs": len(pairs), "mean": lengths.mean(0).round(1).tolist(), "max": lengths.max(0).tolist()}))


if __name__ == "__main__":
    main()
