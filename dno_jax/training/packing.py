"""Where the texts of a batch lie: which micro-batch, which row, and from which token on. Host-side numpy.

Packed, a row holds many texts. There are as many rows as devices take, each batch's texts are dealt out so that its
longest row is as short as it can be, and rows are cut to a few lengths that the whole training was looked through for:
few programs, little padding. Unpacked, each text has a row of its own.

A layout is a pure function of the lengths of a batch's texts and of the settings: hosts, restarts and what was trained
before change nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

_MAX_SHAPES = 8
# A training of fewer programs' worth of tokens takes lengths rounded up to few numbers: what is compiled then serves
# the next iteration, too.
_SHORT = 32


@dataclass(frozen=True)
class TextLengths:
    """Tokens of the texts of N rows of C candidates.

    Attributes:
        prompt, response: [N, C].
        same_prompt: [N], whether a row's candidates answer one prompt, of the very same ids.
    """

    prompt: Int[np.ndarray, "N C"]
    response: Int[np.ndarray, "N C"]
    same_prompt: Bool[np.ndarray, " N"]

    def take(self, indices: np.ndarray) -> TextLengths:
        return TextLengths(self.prompt[indices], self.response[indices], self.same_prompt[indices])

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class Packing:
    """How texts are laid out.

    Attributes:
        packed: rows hold many texts; otherwise one each.
        share_prompt: a prompt stands once before all its responses, where packed.
        skips: the attention skips what a row's texts do not see of each other, so that rows may be long.
        row_shards: into how many parts rows are split over devices; their number is a multiple of it.
        granule: rows' lengths are multiples of it.
        program_tokens: a program more is compiled where it saves so many tokens of padding.
    """

    packed: bool = False
    share_prompt: bool = False
    skips: bool = False
    row_shards: int = 1
    granule: int = 8
    program_tokens: int = 50_000


@dataclass(frozen=True)
class BatchShape:
    """The arrays of a batch: equal ones are one program.

    Attributes:
        parts: micro-batches.
        pairs: rows of the loss in each, filler included.
        rows, length: of tokens in each.
        window: positions per row that the head runs on, at most.
    """

    parts: int
    pairs: int
    rows: int
    length: int
    window: int

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.parts * self.rows * self.length


@dataclass(frozen=True)
class Layout:
    """Where the texts of one batch lie.

    Attributes:
        part, place: [N] micro-batch of each pair, and its number there.
        row: [N, C] row of each text in its micro-batch.
        prompt, response: [N, C] the token of its row at which a text's prompt and its response begin; a shared prompt
            is named by all who share it.
        shared: [N], whether a pair's prompt stands once.
        longest, window: tokens, and tokens of responses, of the fullest row.
        num_tokens: of all rows, shared prompts once, padding not counted.
    """

    part: Int[np.ndarray, " N"]
    place: Int[np.ndarray, " N"]
    row: Int[np.ndarray, "N C"]
    prompt: Int[np.ndarray, "N C"]
    response: Int[np.ndarray, "N C"]
    shared: Bool[np.ndarray, " N"]
    longest: int
    window: int
    num_tokens: int

    @property
    def most_pairs(self) -> int:
        """Pairs of the fullest micro-batch."""
        return int(self.place.max()) + 1


def lay_out(lengths: TextLengths, packing: Packing, *, parts: int, rows: int) -> Layout:
    """Deal the texts of a batch out to `parts` micro-batches of `rows` rows; a pair's texts stay in one micro-batch.

    The longest first, each to where there is least (Graham 1969): the fullest row is at most 4/3 of the shortest that
    any deal could make it, and mostly a token or two. Unpacked, `rows` is not read.
    """
    count, width = lengths.prompt.shape
    shared = lengths.same_prompt & (packing.packed and packing.share_prompt and width > 1)
    texts = lengths.prompt + lengths.response
    whole = np.where(shared, lengths.prompt[:, 0] + lengths.response.sum(axis=1), texts.sum(axis=1))
    part = _deal(whole, parts, at_most=-(-count // parts) if not packing.packed else None)
    place = np.zeros(count, np.int64)
    row, prompt, response = (np.zeros((count, width), np.int64) for _ in range(3))
    longest = window = 0
    for own in range(parts):
        mine = np.flatnonzero(part == own)
        place[mine] = np.arange(len(mine))
        if not packing.packed:
            row[mine] = np.arange(len(mine) * width).reshape(-1, width)
            response[mine] = lengths.prompt[mine]
            continue
        items = [(int(pair), None) for pair in mine[shared[mine]]]
        items += [(int(pair), c) for pair in mine[~shared[mine]] for c in range(width)]
        sizes = np.asarray([whole[pair] if c is None else texts[pair, c] for pair, c in items], np.int64)
        filled = np.zeros(rows, np.int64)
        answered = np.zeros(rows, np.int64)
        for (pair, c), to in zip(items, _deal(sizes, rows), strict=True):
            start = int(filled[to])
            columns = range(width) if c is None else (c,)
            at = start + int(lengths.prompt[pair, columns[0]])
            for column in columns:
                if c is not None:
                    at = start + int(lengths.prompt[pair, column])
                row[pair, column], prompt[pair, column], response[pair, column] = to, start, at
                at += int(lengths.response[pair, column])
                answered[to] += int(lengths.response[pair, column])
            filled[to] = at
        longest, window = max(longest, int(filled.max())), max(window, int(answered.max()))
    if not packing.packed:
        longest, window = int(texts.max()), int(lengths.response.max())
    return Layout(part, place, row, prompt, response, shared, longest, window, int(whole.sum()))


def _deal(sizes: Int[np.ndarray, " N"], bins: int, *, at_most: int | None = None) -> Int[np.ndarray, " N"]:
    """Return the bin of each item: the largest first, each to the emptiest that has not `at_most` items yet."""
    found = np.zeros(len(sizes), np.int64)
    heap = [(0, bin, 0) for bin in range(bins)]
    for item in np.argsort(-np.asarray(sizes), kind="stable"):
        size, bin, count = heapq.heappop(heap)
        found[item] = bin
        if at_most is None or count + 1 < at_most:
            heapq.heappush(heap, (size + int(sizes[item]), bin, count + 1))
    return found


@dataclass(frozen=True)
class Plan:
    """The shapes of all batches of a training, found by looking through them once.

    Attributes:
        parts, rows, pairs: of every batch.
        shapes: of few lengths, ascending.
    """

    packing: Packing
    shapes: tuple[BatchShape, ...]

    def lay_out(self, lengths: TextLengths) -> tuple[Layout, BatchShape]:
        """Return where the texts of a batch lie, and the smallest shape that holds it."""
        first = self.shapes[0]
        layout = lay_out(lengths, self.packing, parts=first.parts, rows=first.rows)
        fitting = (s for s in self.shapes if layout.longest <= s.length and layout.window <= s.window)
        return layout, next(fitting)


def plan_batches(
    lengths: TextLengths,
    batches: Sequence[np.ndarray],
    packing: Packing,
    *,
    batch_size: int,
    parts: int = 1,
    max_length: int,
) -> Plan:
    """Look through the batches of a training and choose the shapes that they take.

    Args:
        batches: indices of the rows of each.
        batch_size: rows of a full batch.
        parts: micro-batches that a batch takes where every text is of `max_length`; packed, it takes as many as hold
            its tokens in the memory of those.
        max_length: tokens of the longest text that may come.
    """
    width = lengths.prompt.shape[1]
    rows = batch_size // parts * width
    if packing.packed:
        texts = lengths.prompt + lengths.response
        shared = lengths.same_prompt & (packing.share_prompt and width > 1)
        whole = np.where(shared, lengths.prompt[:, 0] + lengths.response.sum(axis=1), texts.sum(axis=1))
        longest = int(np.where(shared, whole, texts.max(axis=1)).max())
        totals = np.asarray([whole[batch].sum() for batch in batches])
        parts = min(parts, max(1, -(-int(totals.max()) // (batch_size // parts * width * max_length))))
        rows = packing.row_shards
        if not packing.skips:
            # Longer rows pad less and attend more: some eight texts each, where none is much longer than that.
            mean = totals.sum() / max(sum(len(batch) for batch in batches), 1) / (1 if shared.all() else width)
            target = max(longest, min(8 * mean, 2 * longest))
            rows *= max(1, int(totals.mean() / (parts * packing.row_shards * target)))
    layouts = [lay_out(lengths.take(batch), packing, parts=parts, rows=rows) for batch in batches]
    pairs = batch_size // parts if not packing.packed else max(layout.most_pairs for layout in layouts)
    short = sum(layout.num_tokens for layout in layouts) < _SHORT * packing.program_tokens
    digits = 3 if short else 6
    needs, windows = (
        np.asarray([_rounded(need, granule=packing.granule, digits=digits) for need in found])
        for found in ([layout.longest for layout in layouts], [layout.window for layout in layouts])
    )
    shapes = []
    for level in _levels(needs, one_more=packing.program_tokens / (parts * rows)):
        shapes.append(BatchShape(parts, pairs, rows, level, int(windows[needs <= level].max())))
    return Plan(packing, tuple(shapes))


def _rounded(need: int, *, granule: int, digits: int) -> int:
    """Round a number up to a multiple of `granule` of at most so many binary digits' worth of multiples."""
    count = max(-(-need // granule), 1)
    coarse = 1 << max(count.bit_length() - digits, 0)
    return -(-count // coarse) * coarse * granule


def _levels(needs: Int[np.ndarray, " N"], *, one_more: float) -> list[int]:
    """Return a few lengths, ascending, to which the needs are rounded up by the least in all.

    Args:
        one_more: what another length has to save.
    """
    values, counts = np.unique(needs, return_counts=True)
    number = np.concatenate([[0], np.cumsum(counts)])
    cost = np.full((min(_MAX_SHAPES, len(values)) + 1, len(values) + 1), np.inf)
    cost[0, 0] = 0.0
    came = np.zeros(cost.shape, np.int64)
    for k in range(1, len(cost)):
        for end in range(1, len(values) + 1):
            options = cost[k - 1, :end] + values[end - 1] * (number[end] - number[:end])
            came[k, end] = int(np.argmin(options))
            cost[k, end] = options[came[k, end]]
    levels, end = [], len(values)
    best = int(np.argmin(cost[:, end] + one_more * np.arange(len(cost))))
    for k in range(best, 0, -1):
        levels.append(int(values[end - 1]))
        end = came[k, end]
    return levels[::-1]
