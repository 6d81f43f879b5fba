"""Seeded draws: each purpose has its own, and nothing else in the package draws."""

import hashlib
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import jax
import numpy as np
import pytest

from dno_jax import addresses
from dno_jax.addresses import Purpose
from dno_jax.sampling.transforms import address
from dno_jax.training.batches import batch_order

PACKAGE = Path(addresses.__file__).parent


def streams(*where):
    """The beginning of everything that each purpose draws at one address."""
    for purpose in Purpose:
        yield (
            purpose,
            (
                addresses.rng(purpose, *where).permutation(1000).tolist(),
                addresses.uniform(purpose, *where),
                addresses.integer(purpose, *where, below=2**31),
                addresses.order(purpose, *where, names=[str(i) for i in range(100)]),
                tuple(addresses.key_data(purpose, *where).tolist()),
            ),
        )


@pytest.mark.parametrize("where", [(), (0,), (0, 1, 1), (7, "p", "a", "b"), (0, [{"role": "user"}], 0)])
def test_no_two_purposes_share_a_stream(where):
    for (one, first), (other, second) in combinations(streams(*where), 2):
        assert all(a != b for a, b in zip(first, second, strict=True)), (one, other)


def test_every_purpose_is_used_and_in_one_place_only():
    users = {purpose.name: set() for purpose in Purpose}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in re.findall(r"\bPurpose\.([A-Z_]+)", path.read_text()):
            users[name].add(str(path.relative_to(PACKAGE)))
    assert {name: len(files) for name, files in users.items()} == dict.fromkeys(users, 1)
    assert len({purpose.value for purpose in Purpose}) == len(Purpose)


def test_nothing_else_seeds_a_generator():
    """Exact games have seeds of their own, a fake judge errs by its own, and an export is compared at fixed ids."""
    own = ("addresses.py", "games/", "report/game.py", "fake_judge/", "model/hf/exporter.py")
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if not name.startswith(own):
            assert not re.search(
                r"SeedSequence|Philox|default_rng|random\.key\((?!0\))|random\.seed", path.read_text()
            ), name


def test_batches_and_replay_of_one_number_draw_apart():
    """Epoch 1 of an iteration is not the order in which pairs of age 1 are replayed."""
    batches = batch_order(64, batch_size=64, num_epochs=2, seed=0, iteration=3)
    epochs = [next(batches).tolist() for _ in range(2)]
    replayed = addresses.rng(Purpose.REPLAY, 0, 3, 1).permutation(64).tolist()
    assert sorted(replayed) == sorted(epochs[1]) == list(range(64))
    assert replayed not in epochs


def test_the_same_address_draws_the_same_and_a_part_of_it_another():
    for where in [(0, "p", 1), (0, "p", 2), (1, "p", 1), (0, "q", 1), ("0", "p", 1), (0, "p1")]:
        same = addresses.rng(Purpose.MATCHING, *where).random() == addresses.rng(Purpose.MATCHING, 0, "p", 1).random()
        assert same == (where == (0, "p", 1))


def test_what_others_can_draw_again():
    """As mixture.json says it: sha256 of JSON, its first eight bytes."""
    digest = hashlib.sha256(b'["mixture member", 3, "p\\u00e9", 0]').digest()
    assert addresses.integer(Purpose.MIXTURE_MEMBER, 3, "p\u00e9", 0, below=5) == int.from_bytes(digest[:8], "big") % 5
    assert addresses.key_data(Purpose.MIXTURE_MEMBER, 3, "p\u00e9", 0).tolist() == [
        int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big"),
    ]  # fmt: skip


def test_numbers_are_uniform():
    drawn = np.asarray([addresses.uniform(Purpose.TABLE, index) for index in range(4000)])
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    counts, _ = np.histogram(drawn, bins=10, range=(0.0, 1.0))
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared, 9 degrees of freedom: one address in a thousand
    members = Counter(addresses.integer(Purpose.MIXTURE_MEMBER, index, below=3) for index in range(3000))
    assert all(abs(count - 1000) < 100 for count in members.values())


def test_an_order_is_of_names_and_not_of_places():
    names = ["c", "a", "d", "b"]
    drawn = [names[i] for i in addresses.order(Purpose.PRESENTATION, 0, "p", names=names)]
    turned = names[::-1]
    assert [turned[i] for i in addresses.order(Purpose.PRESENTATION, 0, "p", names=turned)] == drawn
    firsts = Counter(names[addresses.order(Purpose.PRESENTATION, seed, "p", names=names)[0]] for seed in range(2000))
    assert all(abs(count - 500) < 100 for count in firsts.values())


def test_keys_of_the_sampler_have_a_purpose():
    names, samples = jax.numpy.arange(4, dtype=jax.numpy.uint32), jax.numpy.arange(4)
    keys = [
        np.asarray(address(purpose=purpose, seed=0, iteration=0, prompt=names, sample=samples))
        for purpose in (Purpose.RESPONSE, Purpose.READING)
    ]
    assert np.all(keys[0] != keys[1])
