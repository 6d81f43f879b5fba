"""How layers lie in the parameter tree: those that are alike are stacked, and run by one scan.

Where every layer mixes alike, "layers" holds the leaves of them all, stacked on axis 0. Where not, the layers are cut
into sections, each a pattern of mixers that repeats: layers/SECTION/POSITION holds the leaves of the layers at one
position of a section's pattern, stacked over its repeats. What a scan runs over thus lies as the scan reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dno_jax.model.config import Mixer, ModelConfig

# Layers of the longest pattern that is looked for.
_LONGEST = 16
Path = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """Layers first, first + 1, ...: the pattern `mixers`, `repeats` times."""

    first: int
    mixers: tuple[Mixer, ...]
    repeats: int

    @property
    def end(self) -> int:
        return self.first + len(self.mixers) * self.repeats


@lru_cache(maxsize=64)
def sections(mixers: tuple[Mixer, ...]) -> tuple[Section, ...]:
    """Cut layers into sections, so that the fewest layers are traced: each of a pattern, once."""
    # cost, number of sections, the first of them: of the layers from each one on
    best: list[tuple[int, int, Section | None]] = [(0, 0, None)] * (len(mixers) + 1)
    for first in reversed(range(len(mixers))):
        options = []
        for width in range(1, min(_LONGEST, len(mixers) - first) + 1):
            pattern, repeats = mixers[first : first + width], 1
            while mixers[first + width * repeats : first + width * (repeats + 1)] == pattern:
                repeats += 1
            for count in {1, repeats}:
                cost, number, _ = best[first + width * count]
                options.append((cost + width, number + 1, Section(first, pattern, count)))
        best[first] = min(options, key=lambda option: option[:2])
    found, at = [], 0
    while (section := best[at][2]) is not None:
        found.append(section)
        at = section.end
    return tuple(found)


def is_uniform(config: ModelConfig) -> bool:
    """Whether all layers are stacked in one."""
    return len(set(config.layer_mixers)) == 1


def layer_groups(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
    """Return, by the path below "layers", which layers are stacked there, ascending."""
    if is_uniform(config):
        return {(): tuple(range(config.num_hidden_layers))}
    return {
        (str(number), str(position)): tuple(range(section.first + position, section.end, len(section.mixers)))
        for number, section in enumerate(sections(config.layer_mixers))
        for position in range(len(section.mixers))
    }


def group_at(layers: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return what lies at a path below "layers"; nothing where the tree has no such group."""
    for key in path:
        layers = layers.get(key, {})
    return layers


def layer_places(config: ModelConfig) -> list[tuple[Path, int]]:
    """Return the group of each layer, and its row there."""
    found = {layer: (path, row) for path, own in layer_groups(config).items() for row, layer in enumerate(own)}
    return [found[layer] for layer in range(config.num_hidden_layers)]


def stacked_groups(layers: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], range | None]]:
    """Yield each group of a whole parameter tree's "layers" and the numbers of its layers; None: of all of them."""
    if not all(isinstance(value, Mapping) for value in layers.values()):
        yield layers, None
        return
    first = 0
    for number in range(len(layers)):
        period = layers[str(number)]
        repeats = next(iter(period["0"].values())).shape[0]
        for position in range(len(period)):
            yield period[str(position)], range(first + position, first + len(period) * repeats, len(period))
        first += len(period) * repeats
