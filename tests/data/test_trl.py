"""`make soak`: Hugging Face datasets and TRL take a pair file as it is (`pip install trl datasets`)."""

import math

import numpy as np
import pytest

from dno_jax.data.pairs import pair_table, write_pairs
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.records import Message, Pair, Prompt, Rollout
from dno_jax.run_dir import RunDir
from tests.small import TEMPLATE, WORDS, write_checkpoint

pytestmark = [
    pytest.mark.soak,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),  # theirs
]


def some_pairs(tokenizer, count, *, prefix):
    """Pairs of random words whose ids are the tokenizer's, and their table."""
    rng = np.random.default_rng(0)
    pairs, rollouts, prompts = [], {}, {}
    for index in range(count):
        name = f"p{index}"
        words = [" ".join(rng.choice(WORDS, size=rng.integers(2, 8))) for _ in range(3)]
        messages = (Message(role="user", content=words[0]),)
        begun = prefix if index % 2 else ""
        prompts[name] = Prompt(prompt_id=name, messages=messages, assistant_prefix=begun)
        for side, text in zip("ab", words[1:], strict=True):
            rollouts[f"{name}/{side}"] = Rollout(
                rollout_id=f"{name}/{side}", prompt_id=name, sample=0, source="policy", policy=0, logprob=-1.0,
                text=text, token_ids=tokenizer.response_ids(messages, text, end_id=2, assistant_prefix=begun),
                prompt_token_ids=tokenizer.prompt_ids(messages, begun), finish="stop",
            )  # fmt: skip
        made = Pair(
            pair_id=f"{name}/a>b", prompt_id=name, chosen_id=f"{name}/a", rejected_id=f"{name}/b",
            chosen_reward=1.0, rejected_reward=0.0, target=0.8, kind="student>student", iteration=0,
        )  # fmt: skip
        pairs.append(made)
    return pairs, pair_table(pairs, rollouts, prompts)


def test_datasets_and_trl_take_the_file_as_it_is(tmp_path):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", template=TEMPLATE)
    pairs, table = some_pairs(ChatTokenizer.load(str(checkpoint)), 8, prefix="bam ")
    stage = RunDir(tmp_path / "run").stage("pair", 0)
    write_pairs(stage.path / "new.parquet", [table])

    files = str(stage.path / "new.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["pair_id"][:] == [pair.pair_id for pair in pairs]
    assert rows[1]["chosen"][0]["content"].startswith("bam ")
    assert rows[0]["prompt_tokens"] == table["prompt_tokens"][0].as_py()

    trainer = trl.DPOTrainer(
        model=str(checkpoint),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trained"), max_steps=2, per_device_train_batch_size=4, logging_steps=1,
            max_length=64, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=rows,
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    # What it makes of the chats are the ids that were sampled; a prefix it trains on, and we do not.
    for made, row in zip(trainer.train_dataset, rows, strict=True):
        for side in ("chosen", "rejected"):
            whole = row["prompt_tokens"] + row[f"{side}_tokens"]
            assert made["prompt_ids"] + made[f"{side}_ids"] == whole
        begun = row["chosen"][0]["content"].startswith("bam ") and len(made["prompt_ids"]) < len(row["prompt_tokens"])
        assert begun or made["prompt_ids"] == row["prompt_tokens"]
