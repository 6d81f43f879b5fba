"""Whether a configuration, a model's shape, a tokenizer and a mesh fit together, before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dno_jax.config import AnyConfig, RewardConfig, RunConfig, SftConfig
from dno_jax.console import say
from dno_jax.errors import DnoError
from dno_jax.model.adapters import AdapterConfig
from dno_jax.model.config import ModelConfig
from dno_jax.model.hf import folder, read_config, read_dropout, reward_shape
from dno_jax.model.text.tokenizer import ChatTokenizer
from dno_jax.parallel.cluster import is_primary


def read_shape(config: AnyConfig) -> ModelConfig:
    """Read the model's shape: once for the whole run, so that sampling, scoring, training and judging rotate alike.

    That of a reward model has a score in place of the head, whichever of the two the checkpoint has.

    Raises:
        DnoError: the checkpoint cannot be read, or is of a family without reward models.
    """
    if isinstance(config, RewardConfig):
        return reward_shape(_shape_from(config), rope_length=longest_text(config))
    return read_config(_shape_from(config), rope_length=longest_text(config))


def warn_of_dropout(config: AnyConfig) -> None:
    """Say, on the first process, what a checkpoint would have dropped in training."""
    shape_from = _shape_from(config)
    if is_primary() and (dropped := read_dropout(shape_from)):
        shares = ", ".join(f"{key} {share}" for key, share in dropped.items())
        say(
            f"warning: {shape_from} has {shares}: nothing is dropped here, neither in training nor in sampling, since "
            "the loss compares log-probabilities of the two; an export keeps the setting"
        )


def _shape_from(config: AnyConfig) -> Path:
    return folder(getattr(config.model, "init_config", None) or config.model.path)


def check_fit(config: AnyConfig, *, model_config: ModelConfig, tokenizer: ChatTokenizer, row_shards: int) -> None:
    """Check lengths, ids and batches of a run against its model, tokenizer and mesh.

    Raises:
        DnoError: naming the first that does not fit.
    """
    check_shape(config, model_config=model_config, row_shards=row_shards)
    check_ids(tokenizer, model_config)
    _check_ends(config, tokenizer)


def check_shape(config: AnyConfig, *, model_config: ModelConfig, row_shards: int) -> None:
    """Check lengths and batches of a run against its model and mesh; raises as `check_fit`."""
    longest, context = _longest_example(config), model_config.context
    if longest > context:
        remedy = f"lower {'data' if isinstance(config, SftConfig) else 'pairs'}.max_length"
        if isinstance(config, RunConfig):
            remedy = (
                "lower prompts.max_length or sampling.max_new_tokens, or bound both together by "
                f"sampling.max_total_tokens={context}"
            )
        raise DnoError(
            f"sequences of up to {longest} tokens exceed the model's context of "
            f"{context} (max_position_embeddings of {config.model.path}); {remedy}"
        )
    if isinstance(config, RunConfig) and config.loss.load_balance_weight and not model_config.num_experts:
        raise DnoError(
            f"loss.load_balance_weight is {config.loss.load_balance_weight}, but {config.model.path} is no mixture "
            "of experts; set it to 0"
        )
    trained_adapter(config, model_config)
    count = config.training.micro_batch_size or config.training.batch_size
    texts = 1 if isinstance(config, SftConfig) else 2
    if (count * texts) % row_shards:
        what = "pairs of 2 texts" if texts == 2 else "texts"
        raise DnoError(
            f"training.micro_batch_size is {count} {what}, which the mesh's data*fsdp*expert={row_shards} devices do "
            "not divide; make it a multiple, or let texts be packed (training.packing)"
        )


def trained_adapter(config: AnyConfig, model_config: ModelConfig) -> AdapterConfig | None:
    """The adapters that are trained; None where all parameters are.

    Raises:
        DnoError: the model takes no such adapters.
    """
    if (section := config.adapter) is None:
        return None
    return AdapterConfig.of(model_config, rank=section.rank, alpha=section.alpha, targets=section.targets)


def check_ids(tokenizer: ChatTokenizer, model_config: ModelConfig) -> None:
    """Raise DnoError if words, an end or the template have ids for which a model has no embedding.

    Other tokens may lack one, such as an image's: texts that hold one are dropped.
    """
    ids, embeddings = tokenizer.vocab_size, model_config.vocab_size
    tokenizer, place = replace(tokenizer, num_rows=embeddings), tokenizer.path
    if tokenizer.rowless_ids - tokenizer.added_ids:
        raise DnoError(
            f"{place}: the tokenizer has {ids} ids, the model's embedding {embeddings} rows (vocab_size of its "
            "config.json); give the tokenizer that the model was trained with, or a model with a larger embedding"
        )
    if max(tokenizer.end_ids) >= embeddings:
        raise DnoError(
            f"{place}: eos_token_id names {max(tokenizer.end_ids)}, the model's embedding has {embeddings} rows; "
            "correct generation_config.json"
        )
    # Few tokenizers have such ids, and only for these is a chat rendered.
    if tokenizer.rowless_ids and (needed := sorted(tokenizer.rowless_ids & tokenizer.written_ids)):
        raise DnoError(
            f"{tokenizer.template_place}: the chat template writes {tokenizer.strip(needed)[0]!r} (id {needed[0]}), "
            f"the model's embedding has {embeddings} rows; give the template that the model was trained with"
        )


def _check_ends(config: AnyConfig, tokenizer: ChatTokenizer) -> None:
    """Raise DnoError if no response could be ended by what is to end responses: an end id or a stop string."""
    if (last := max(tokenizer.end_ids)) >= tokenizer.vocab_size:
        raise DnoError(
            f"{tokenizer.path}: eos_token_id names {last}, the tokenizer has {tokenizer.vocab_size} ids, and no other "
            "is ever drawn; give the tokenizer that the model was trained with, or correct generation_config.json"
        )
    for stop in config.sampling.stop if isinstance(config, RunConfig) else ():
        for name in tokenizer.control_tokens(stop):
            raise DnoError(
                f"sampling.stop has {stop!r}, which holds the control token {name!r}: control tokens are not text, so "
                "no response would be found to hold it; remove it, and name the token's id in eos_token_id of "
                f"{tokenizer.path / 'generation_config.json'} if it is to end responses"
            )


def longest_text(config: AnyConfig) -> int:
    """Return the tokens of the longest text that the run puts through the model, what it judges by itself included."""
    longest = _longest_example(config)
    if isinstance(config, RunConfig) and config.annotation.kind == "self":
        judge = config.annotation.self_judge
        longest = max(longest, judge.max_prompt_length + judge.max_new_tokens)
    return longest


def _longest_example(config: AnyConfig) -> int:
    return config.pairs.max_length if isinstance(config, RewardConfig) else config.max_length
