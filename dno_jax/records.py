"""The rows that stages hand to each other: frozen, validated at the border, one JSON object per line.

Every row is joined to others by id, never by line number. Nothing here imports jax.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError, model_validator

from dno_jax.display import hide_keys
from dno_jax.errors import DnoError

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length"]
VerdictState = Literal["ok", "tie", "refused", "unparsable", "failed", "over budget"]
JudgementState = Literal["ok", "refused", "unparsable", "failed", "over budget"]
Source = Literal["policy", "mixture", "previous", "gold", "data"]
PairKind = Literal["student>student", "student>gold", "gold>student", "data>data", "data>gold", "gold>data"]


def _token_ids(value: Any) -> array:
    if isinstance(value, array) and value.typecode == "i":
        return value
    try:
        return array("i", value)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"token ids are 32-bit integers: {error}") from None


if TYPE_CHECKING:
    TokenIds = Sequence[int]
else:  # 4 bytes per id while a row is held, where a tuple takes 8 and up to 28 more for each int; a list in JSON
    _AS_LIST = PlainSerializer(lambda ids: ids.tolist(), return_type=list[int], when_used="json")
    TokenIds = Annotated[array, PlainValidator(_token_ids), _AS_LIST]


class Record(BaseModel):
    """Base of every row: immutable, unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Message(Record):
    role: Role
    content: str


class GivenResponse(Record):
    """A response that comes with the data, with its points where somebody gave it any."""

    text: str = Field(min_length=1)
    score: float | None = Field(default=None, allow_inf_nan=False)


class Conversation(Record):
    """A chat that a response continues.

    Attributes:
        messages: the chat so far, up to the user's (or system's) last turn.
        assistant_prefix: words that the assistant has begun its turn with. The response continues them: they stand
            in the prompt's ids and are never trained, and a judge reads them before the response.
    """

    prompt_id: str = Field(min_length=1)
    messages: tuple[Message, ...] = Field(min_length=1)
    assistant_prefix: str = ""

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> Conversation:
        if self.messages[-1].role == "assistant":
            raise ValueError(
                "the last message is the assistant's; a prompt ends with the user's (or system's) turn: the beginning "
                "of an answer goes into assistant_prefix"
            )
        if not self.messages[-1].content.strip():
            raise ValueError("the last message is empty")
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything in it that somebody wrote."""
        return (*(message.content for message in self.messages), self.assistant_prefix)


class Prompt(Conversation):
    """One prompt x, with the teacher's response where there is one.

    Attributes:
        gold: text of the teacher's response y_gold (Algorithm 2, line 3), or None; what follows `assistant_prefix`.
        candidates: responses for offline methods (sampling.source=data); what follows `assistant_prefix`.
    """

    source: str = ""
    gold: str | None = None
    candidates: tuple[GivenResponse, ...] = ()


class Example(Conversation):
    """One supervised example for `dno sft`: the loss covers `response` and its end token only."""

    response: str = Field(min_length=1)


class Rollout(Record):
    """One candidate response with the exact token ids that a model emits and a judge reads.

    Attributes:
        rollout_id: "<iteration>/<prompt_id>/<sample>", or ".../gold" for the teacher's response; of the policy before
            what its own iteration called it.
        sample: index of the sample; -1 for the teacher's response.
        source: who wrote it: policy t, its mixture with the initial policy, the policy before (t-1, as iteration t-1
            drew it), the teacher, or somebody in the data.
        policy: index t of the policy pi_t that sampled it, alone or in the mixture; None where none did.
        text: what the judge sees, after the prompt's assistant_prefix; the decoded `token_ids` without special tokens,
            cut before a stop string.
        token_ids: response ids, ending with an end-of-sequence id, or with the stop string's, when finish == "stop".
        prompt_token_ids: the ids the response was conditioned on.
        logprob: sum of log pi_t(token | prefix) over `token_ids` at temperature 1, nats; None for the teacher's
            response and for the data's.
        drawn_logprob: the same under the distribution that the tokens were drawn from; None unless asked for.
        in_thought: whether the prompt ends inside a thought, so that the response begins in it.
        finish: "stop" (an end id or a stop string was emitted) or "length" (cut at the maximum).
    """

    rollout_id: str
    prompt_id: str
    sample: int = Field(ge=-1)
    source: Source
    policy: int | None
    text: str
    token_ids: TokenIds
    prompt_token_ids: Annotated[TokenIds, Field(min_length=1)]
    logprob: float | None
    finish: Finish
    drawn_logprob: float | None = None
    in_thought: bool = False

    @property
    def is_gold(self) -> bool:
        return self.source == "gold"


class Answer(Record):
    """One question that a judgement rests on.

    Attributes:
        order: indices into the judgement's candidates, as they were shown.
        state: "ok", or "tie" where a pair was found equally good; any other state is no answer.
        scores: one number per candidate shown; of a pair P(better), P(worse); None where there is no answer.
        judge: identity of the one that was asked.
    """

    order: tuple[int, ...]
    state: VerdictState
    scores: tuple[float, ...] | None = None
    judge: str = ""


class Judgement(Record):
    """A verdict on one pool of C candidates, or the reason why there is none.

    Attributes:
        candidate_ids: rollout ids of the pool, in the order of `scores` and of the rows of `wins`.
        judge: identity of the preference function (kind, model, rubric version).
        scores: [C] points of a list-wise rubric; None for a pairwise judge.
        wins: [C][C] probabilities P(row beats column), diagonal 1/2, wins + wins^T = 1; None for a list-wise judge.
        raw: the judge's own words, kept for people.
        state: only "ok" is an answer; every other state carries neither scores nor wins.
        detail: why there is no answer.
        answers: the questions it was made of, in the order asked; empty where nobody was asked.
    """

    prompt_id: str
    candidate_ids: tuple[str, ...] = Field(min_length=2)
    judge: str
    state: JudgementState
    scores: tuple[float, ...] | None = None
    wins: tuple[tuple[float, ...], ...] | None = None
    raw: str = ""
    detail: str = ""
    answers: tuple[Answer, ...] = ()

    @model_validator(mode="after")
    def _answers_are_whole(self) -> Judgement:
        count = len(self.candidate_ids)
        if len(set(self.candidate_ids)) != count:
            raise ValueError("candidate_ids repeat")
        if self.state != "ok":
            if self.scores is not None or self.wins is not None:
                raise ValueError(f"state {self.state!r} is no answer and must carry no scores or wins")
            return self
        if (self.scores is None) == (self.wins is None):
            raise ValueError("an answer carries either scores or wins")
        if self.scores is not None and len(self.scores) != count:
            raise ValueError(f"{len(self.scores)} scores for {count} candidates")
        if self.wins is not None and (len(self.wins) != count or any(len(row) != count for row in self.wins)):
            raise ValueError(f"wins is not a {count} x {count} matrix")
        return self


class TaughtResponse(Record):
    """What a teacher answered to a prompt without a gold response, or why it did not.

    Attributes:
        text: the response, after the prompt's assistant_prefix; empty unless state is "ok".
        detail: why there is none.
    """

    prompt_id: str
    state: VerdictState
    text: str = ""
    detail: str = ""


class Pair(Record):
    """One training pair (x, y+, y-), as a rule chose it; on disk it carries its rows besides (data/pairs.py).

    Attributes:
        chosen_reward, rejected_reward: the rewards the pair rule compared, in the unit of `pairing.reward`.
        target: P(chosen preferred) in [0, 1] that the loss regresses on; 1 for DNO-Prct (Eq. 13).
        weight: how many pairs of samples this one stands for, as equal texts are judged once.
        kind: who won against whom.
        iteration: the iteration whose rollouts the ids name (an earlier one for replayed pairs).
    """

    pair_id: str
    prompt_id: str
    chosen_id: str
    rejected_id: str
    chosen_reward: float
    rejected_reward: float
    target: float = Field(ge=0.0, le=1.0)
    weight: float = Field(default=1.0, gt=0.0)
    kind: PairKind
    iteration: int = Field(ge=0)


class ReferenceScore(Record):
    """log-probabilities of both responses of a pair under one frozen policy, nats, summed over response tokens."""

    pair_id: str
    chosen_logprob: float
    rejected_logprob: float


RecordT = TypeVar("RecordT", bound=Record)


def parse_lines(kind: type[RecordT], lines: Iterable[str], *, place: str) -> Iterator[RecordT]:
    """Yield one validated record per non-blank line.

    Raises:
        DnoError: naming `place`, the line number and the field that is wrong.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield kind.model_validate_json(line)
        except ValidationError as error:
            raise DnoError(f"{place}:{number}: not a valid {kind.__name__}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Say in one line, field by field, what a validation found (without echoing whole inputs)."""
    parts = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "the row"
        parts.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{_shown(item)}")
    return "; ".join(parts)


def _shown(item: Any) -> str:
    if item["type"] in ("missing", "extra_forbidden", "value_error", "json_invalid") or item["input"] is None:
        return ""
    text = hide_keys(repr(item["input"]))
    if "key" in f"{item['loc']}{text}".lower():  # of a section in which a key may stand for its variable's name
        return ""
    return f" (got {text if len(text) <= 80 else text[:77] + '...'})"
