"""One judged pool as a pair rule sees it: its texts, their rewards, and who may be trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cached_property

import numpy as np

from dno_jax.config import PairingSection
from dno_jax.errors import DnoError
from dno_jax.preferences import ScoredCandidate, repeated_ngram_share, scores_to_wins, win_rates
from dno_jax.records import Judgement, Rollout
from dno_jax.stages.cut import fate


class PairPool:
    """One prompt's candidates with their rewards: each text was judged once, however many samples gave it.

    An empty response, or one cut inside its thought, was shown to no judge: it loses to every text, as section 5.1 has
    it for degenerate samples. Were it in no pair, nothing would keep its probability down, for a pair's loss sees
    differences only.

    Args:
        shown: what a judge reads of each response, by its id; empty where that has no answer.
        trains_previous: the policy before's samples are rated against the policy's, not the policy's against both.
    """

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        shown: Mapping[str, str],
        judgement: Judgement | None,
        section: PairingSection,
        *,
        trains_previous: bool = False,
    ):
        self.shown = shown
        self.prompt_id, self.judge, self.section = rollouts[0].prompt_id, judgement and judgement.judge, section
        self.scores = judgement and judgement.scores
        if judgement is None:
            self.judged = [min((row for row in rollouts if self.shown[row.rollout_id]), key=lambda row: row.sample)]
            self.wins = np.full((1, 1), 0.5)
        else:
            by_id = {rollout.rollout_id: rollout for rollout in rollouts}
            self.judged = [by_id[name] for name in judgement.candidate_ids]
            if judgement.wins is not None:
                self.wins = np.asarray(judgement.wins, np.float64)
            else:
                self.wins = scores_to_wins(judgement.scores or (), temperature=section.score_temperature)
        empty = [rollout for rollout in rollouts if not self.shown[rollout.rollout_id] and not rollout.is_gold]
        if empty:
            self.judged.append(min(empty, key=lambda row: row.sample))
            self.wins = np.pad(self.wins, (0, 1), constant_values=0.0)
            self.wins[:-1, -1], self.wins[-1, -1] = 1.0, 0.5
            self.scores = self.scores and (*self.scores, min(0.0, *self.scores))
        self._settle_cut(rollouts, section)
        self.place = {self.shown[rollout.rollout_id]: index for index, rollout in enumerate(self.judged)}
        self.samples = [rollout for rollout in rollouts if self.shown[rollout.rollout_id] in self.place]
        sources = {rollout.source for rollout in self.samples}
        self.whom = sources if section.opponents == "pool" else {section.opponents}
        # Beside samples of the policy, those of the mixture (Nash-MD) or of the policy before are only compared with,
        # but at the second half of an extragradient step, which is trained on what its first half was.
        others = {"policy"} if trains_previous else {"mixture", "previous"}
        self.trained = sources - others if "policy" in sources else sources
        self.meets_previous = "previous" in sources
        self._guesses = self.meets_previous and not trains_previous
        self.errors: list[float] = []  # standard errors of the win rates that were asked for

    def _settle_cut(self, rollouts: Sequence[Rollout], section: PairingSection) -> None:
        """Let what was cut at the limit of tokens lose to all that is whole, or be in no pair.

        It lacks its end: chosen, it teaches to go on for ever.
        """
        fates = [fate(rollout, self.shown[rollout.rollout_id], section) for rollout in self.judged]
        texts = {
            own: {self.shown[row.rollout_id] for row, found in zip(self.judged, fates, strict=True) if found == own}
            for own in ("negative", "drop")
        }
        self.left_out = Counter(
            f"{'gold' if row.is_gold else 'response'} cut at the limit"
            for row in self.judged
            if self.shown[row.rollout_id] in texts["drop"]
        )
        self.negatives = {row.rollout_id for row in rollouts if self.shown[row.rollout_id] in texts["negative"]}
        self.out = {row.rollout_id for row in rollouts if self.shown[row.rollout_id] in texts["drop"]}
        if not self.negatives:
            return
        lost = np.array([row.rollout_id in self.negatives or not self.shown[row.rollout_id] for row in self.judged])
        beats = np.where(lost[:, None] == lost, self.wins, lost[None, :].astype(np.float64))
        self.wins = np.where(lost[:, None] & lost, 0.5, beats)
        if self.scores:
            least = min(0.0, *self.scores)
            self.scores = tuple(least if out else score for score, out in zip(self.scores, lost, strict=True))

    @property
    def is_alone(self) -> bool:
        """Whether win rates are asked for and an opponent would have nobody but itself to meet."""
        return self.section.reward == "win_rate" and int(self.count(self.whom).sum()) < 2

    @cached_property
    def _standing(self) -> dict[int, Rollout]:
        """Place of each judged text that may be trained on -> the response judged, or the first that may be trained."""
        found: dict[int, Rollout] = {}
        for rollout in (*self.judged, *sorted(self.samples, key=lambda row: row.sample)):
            if self._is_trained(rollout, self.trained):
                found.setdefault(self.place[self.shown[rollout.rollout_id]], rollout)
        return dict(sorted(found.items()))

    @property
    def trained_rows(self) -> list[int]:
        """Places of the judged texts that may be trained on."""
        return list(self._standing)

    def count(self, sources: Iterable[str]) -> np.ndarray:
        """[C] how many candidates of these sources gave each judged text."""
        wanted = set(sources)
        places = [self.place[self.shown[rollout.rollout_id]] for rollout in self.samples if rollout.source in wanted]
        return np.bincount(np.asarray(places, int), minlength=len(self.judged))

    def reward(self, rollout: Rollout) -> float:
        """The reward of a candidate, in the unit of the configuration; where two policies are met, 2 r_t - r_{t-1}.

        Raises:
            DnoError: points are asked for and the judge gave pairwise verdicts.
        """
        place = self.place[self.shown[rollout.rollout_id]]
        if self.section.reward == "score":
            if self.scores is None:
                raise DnoError(
                    f"judgement of prompt {self.prompt_id!r} by {self.judge} has pairwise "
                    "verdicts, no scores; set pairing.reward=win_rate"
                )
            return self.scores[place]
        own = np.zeros(len(self.judged), int)
        own[place] = rollout.source in self.whom
        transform = self.section.transform
        found = win_rates(self.wins, opponents=self.count(self.whom), own=own, transform=transform)
        self.errors.append(float(found.standard_error[place]))
        if not self._guesses:
            return float(found.rate[place])
        older, none = self.count({"previous"}), np.zeros(len(self.judged), int)
        before = win_rates(self.wins, opponents=older, own=none, transform=transform)
        return float(2.0 * found.rate[place] - before.rate[place])

    def texts(self) -> list[ScoredCandidate]:
        """One candidate per text."""
        counts = np.maximum(self.count(self.trained - {"gold"}), 1)
        return [self._candidate(row, count=int(counts[place])) for place, row in self._standing.items()]

    def own_samples(self) -> list[ScoredCandidate]:
        """One candidate per sample of the policy, equal texts too."""
        return [
            self._candidate(sample)
            for sample in self.samples
            if self._is_trained(sample, self.trained - {"gold", "data"})
        ]

    def _is_trained(self, rollout: Rollout, sources: Set[str]) -> bool:
        return rollout.source in sources and rollout.rollout_id not in self.out

    def _candidate(self, rollout: Rollout, *, count: int = 1) -> ScoredCandidate:
        repetition = repeated_ngram_share(rollout.token_ids, self.section.degenerate_ngram)
        return ScoredCandidate(
            candidate_id=rollout.rollout_id,
            reward=self.reward(rollout),
            source=rollout.source if rollout.source in ("gold", "data") else "student",
            degenerate=rollout.rollout_id in self.negatives
            or (
                not rollout.is_gold
                and (not self.shown[rollout.rollout_id] or repetition > self.section.degenerate_share)
            ),
            count=count,
        )
