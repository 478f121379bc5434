"""The recipe validates; the plan is a pure, uniform function of the index."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from gpufgbg import InputError, OptionError, Plan, Recipe
from gpufgbg.recipe import Shard


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "per_pair": [0, -1, 1_000_001, 1.5, "2", True, None],
        "flip": ["", "sometimes", None, True],
        "size": [0, (0, 5), (5, 0), 16385, (1, 2, 3), "224", 1.5, None],
        "foreground_height": [0, -5, 225, 2.0, None],
        "seed": [-1, 2**64, 0.5, None],
        "quality": [0, 101, -1, 65.0, None],
        "subsampling": ["411", 420, None, ""],
        "optimize": [1, "yes", None],
    }.items(),
)
def test_values_out_of_range_name_the_field(field, values):
    for value in values:
        with pytest.raises(OptionError, match="expected") as caught:
            Recipe(**{field: value})
        assert caught.value.option == field
        assert "\n" not in str(caught.value)


def test_recipe_survives_json_and_is_frozen():
    recipe = Recipe(per_pair=3, flip="always", size=(320, 240), seed=2**64 - 1, optimize=False)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1
    with pytest.raises(OptionError, match="newer version"):
        Recipe.from_dict({**recipe.to_dict(), "colour": 1})
    assert Recipe(size=64, foreground_height=64).size == (64, 64)


@pytest.mark.parametrize("flip", ["both", "never", "always"])
def test_samples_are_ordered_as_the_original_orders_them(flip):
    plan = Plan(Recipe(per_pair=3, flip=flip), 4, [10, 20], [105, 105])
    expected = [
        (b, f, i, turn)
        for b in range(4)
        for f in range(2)
        for i in range(3)
        for turn in {"both": (True, False), "never": (False,), "always": (True,)}[flip]
    ]
    p = plan.placements(range(len(plan)))
    found = list(
        zip(p.background.tolist(), p.foreground.tolist(), p.repetition.tolist(), p.flip.tolist(), strict=True)
    )
    assert found == expected
    assert len(plan) == len(expected)


def test_placement_depends_on_the_index_alone():
    plan = Plan(Recipe(per_pair=50), 5, [10, 200, 224], [105, 105, 105])
    whole = plan.placements(range(len(plan)))
    order = np.random.default_rng(0).permutation(len(plan))
    shuffled = plan.placements(order)
    for field in dataclasses.fields(whole):
        np.testing.assert_array_equal(getattr(shuffled, field.name), getattr(whole, field.name)[order])
    one = plan.placements([777])
    assert (one.x[0], one.y[0]) == (whole.x[777], whole.y[777])


def test_every_position_is_reached_and_none_is_favoured():
    plan = Plan(Recipe(size=(12, 9), foreground_height=4, per_pair=100_000, flip="never"), 1, [3], [4])
    p = plan.placements(range(100_000))
    for found, positions in ((p.x, 10), (p.y, 6)):
        counts = np.bincount(found, minlength=positions)
        assert len(counts) == positions
        # chi-square with at most 9 degrees of freedom: above 33 in fewer than 1 of 8,000 seeds
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 33
    joint = np.bincount(p.x * 6 + p.y, minlength=60)
    assert joint.min() > 0.8 * joint.mean()  # x and y are independent


def test_a_foreground_as_large_as_the_frame_has_one_place():
    p = Plan(Recipe(size=(20, 10), foreground_height=10), 1, [20], [10]).placements(range(40))
    assert not p.x.any() and not p.y.any()


def test_seed_changes_placements():
    first, second = (Plan(Recipe(seed=s), 1, [10], [105]).placements(range(40)) for s in (0, 1))
    assert (first.x != second.x).any() and (first.y != second.y).any()


@pytest.mark.parametrize("indices", [[-1], [0, 40], [2**40]])
def test_indices_outside_the_data_set_are_refused(indices):
    with pytest.raises(OptionError, match="expected 0 to 39"):
        Plan(Recipe(), 1, [10], [105]).placements(indices)


@pytest.mark.parametrize(
    ("indices", "found"),
    [
        ([0.7, 1.9], "float64 (2,)"),
        (np.array([True, False]), "bool (2,)"),
        (["3"], "<U1 (1,)"),
        ([[0, 1], [2, 3]], "int64 (2, 2)"),
        (None, "object ()"),
        ([2**70], "object (1,)"),
        ({1, 2}, "object ()"),
        ((i for i in range(3)), "object ()"),
        (slice(0, 3), "object ()"),
    ],
)
def test_what_is_no_list_of_integers_is_refused(indices, found):
    expected = f"indices: got {found}, expected integers (N,) from 0 to 39, for example a range, a list or an array"
    with pytest.raises(OptionError) as refused:
        Plan(Recipe(), 1, [10], [105]).placements(indices)
    assert str(refused.value) == expected


def test_any_integers_are_taken_and_none_too():
    plan = Plan(Recipe(), 1, [10], [105])
    for indices in (range(3), [0, 1, 2], np.arange(3, dtype=np.uint8), np.arange(3, dtype=np.uint64), (0, 1, 2)):
        assert plan.placements(indices).index.tolist() == [0, 1, 2]
    assert plan.placements(3).index.tolist() == [3]
    for nothing in ([], (), np.empty(0), np.empty((0, 4)), range(0)):
        assert len(plan.placements(nothing)) == 0
    with pytest.raises(OptionError, match=f"got {2**64 - 1} to {2**64 - 1}, expected 0 to 39"):
        plan.placements(np.array([2**64 - 1], np.uint64))


def test_a_foreground_larger_than_the_frame_is_refused():
    with pytest.raises(InputError, match="foreground 1 is 225x105"):
        Plan(Recipe(), 1, [224, 225], [105, 105])


@pytest.mark.parametrize(
    ("backgrounds", "foregrounds", "per_pair", "size"),
    [(99, 99, 20, 224), (99, 99, 1, 224), (3, 2, 1, 224), (2, 500, 20, 224), (5, 7, 3, 1000), (2, 1, 1, 9000)],
)
def test_shards_tile_the_samples_and_keep_to_backgrounds(backgrounds, foregrounds, per_pair, size):
    recipe = Recipe(per_pair=per_pair, size=size, foreground_height=1)
    plan = Plan(recipe, backgrounds, np.ones(foregrounds), np.ones(foregrounds))
    shards = list(plan.shards(Shard(0, len(plan))))
    assert shards[0].start == 0 and shards[-1].stop == len(plan)
    assert all(a.stop == b.start for a, b in itertools.pairwise(shards))
    assert all(0 < len(shard) <= 4096 for shard in shards)
    for number, shard in enumerate(shards):
        assert plan.cell(shard.start) == plan.cell(shard.stop - 1) == (shard, number)
        # a shard is whole backgrounds, or lies inside one
        per = plan.per_background
        assert (shard.start % per == 0 and shard.stop % per == 0) or shard.start // per == (shard.stop - 1) // per
    # any slices give the same shards but for those at their ends
    cut = len(plan) // 3
    parts = [*plan.shards(Shard(0, cut)), *plan.shards(Shard(cut, len(plan)))] if cut else shards
    assert sum(len(part) for part in parts) == len(plan)
    assert {p for p in parts if p.stop != cut and p.start != cut} <= set(shards)
