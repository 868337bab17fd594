"""The algebra of sweeps, by enumeration."""

import pytest

from llm_jax.errors import UserError
from llm_jax.sweep import (
    Sweep,
    chain,
    find_direction,
    name_points,
    param,
    parse_grid,
    product,
    zip,
)

RATE, LAYERS = param("optimizer.learning_rate", [1e-3, 3e-3]), param("model.num_layers", [2, 4, 8])


def short(space):
    return [tuple(point.values()) for point in space]


def test_a_parameter_has_a_point_for_each_value():
    assert RATE == ({"optimizer.learning_rate": 1e-3}, {"optimizer.learning_rate": 3e-3})
    assert short(param("a", [1, 1.0, True, 1])) == [(1,), (1.0,), (True,)]


def test_a_product_has_every_combination_and_its_last_space_changes_fastest():
    space = product(RATE, LAYERS)
    assert short(space) == [(1e-3, 2), (1e-3, 4), (1e-3, 8), (3e-3, 2), (3e-3, 4), (3e-3, 8)]
    assert space[3] == {"optimizer.learning_rate": 3e-3, "model.num_layers": 2}
    assert len(product(RATE, LAYERS, param("seed", range(5)))) == 30
    assert product(RATE) == RATE and product() == ({},)


def test_zip_goes_through_spaces_side_by_side():
    heads = param("model.num_heads", [1, 2, 4])
    assert short(zip(LAYERS, heads)) == [(2, 1), (4, 2), (8, 4)]
    assert len(product(RATE, zip(LAYERS, heads))) == 6
    with pytest.raises(UserError, match=r"spaces of one size, and these have \[2, 3\] points"):
        zip(RATE, LAYERS)


def test_a_chain_has_the_points_of_all_once():
    again = param("model.num_layers", [8, 16])
    assert short(chain(LAYERS, again)) == [(2,), (4,), (8,), (16,)]
    assert short(chain(RATE, LAYERS)) == [(1e-3,), (3e-3,), (2,), (4,), (8,)]


@pytest.mark.parametrize("combine", [product, zip])
def test_one_key_in_two_spaces_is_refused(combine):
    with pytest.raises(UserError, match="two parts of the sweep set 'seed'"):
        combine(param("seed", [0, 1]), param("seed", [2, 3]))


def test_a_grid_is_a_product_of_terms():
    assert parse_grid(["optimizer.learning_rate=1e-3,3e-3", "config.model.num_layers=2,4,8"]) == (
        product(RATE, LAYERS)
    )
    terms = ["a=True,None", "b=(1, 2),(3,)", "c=adamw,'x,y'", "d=-1"]
    values = [tuple(dict.fromkeys(p[key] for p in parse_grid(terms))) for key in "abcd"]
    assert values == [(True, None), ((1, 2), (3,)), ("adamw", "x,y"), (-1,)]


@pytest.mark.parametrize("term", ["seed", "seed=", "=1,2"])
def test_a_bad_term_shows_a_good_one(term):
    with pytest.raises(UserError, match=r"KEY=VALUE,VALUE.*learning_rate=1e-3,3e-4"):
        parse_grid([term])


def test_folders_are_named_after_the_last_parts_of_keys():
    assert name_points(product(RATE, LAYERS))[:2] == [
        "learning_rate=0.001,num_layers=2", "learning_rate=0.001,num_layers=4",
    ]  # fmt: skip
    assert name_points(product(param("sft.seed", [1]), param("dpo.seed", [2]))) == [
        "sft.seed=1,dpo.seed=2"
    ]
    assert name_points(param("phases[0].length", [64])) == ["length=64"]
    # No name leaves its folder, and no two points share one.
    names = name_points(param("data.source", ["/a/b", "/a_b", "../c", "x" * 300]))
    assert names == ["1-source=_a_b", "2-source=_a_b", "source=.._c", f"4-source={'x' * 113}"]


@pytest.mark.parametrize("metric, direction", [
    ("eval/validation/loss", "lowest"),
    ("eval/needle/accuracy", "highest"),
    ("sft/eval/validation/bits_per_byte", "lowest"),
])  # fmt: skip
def test_the_best_end_of_a_metric_is_known_by_its_name(metric, direction):
    assert find_direction(metric, None) == direction
    assert find_direction(metric, "highest") == "highest"
    with pytest.raises(UserError, match="--direction=lowest or highest"):
        find_direction("tokens", None)


def test_a_sweep_knows_its_keys_and_needs_points():
    assert Sweep("c", chain(RATE, product(LAYERS, RATE))).keys == (
        "optimizer.learning_rate", "model.num_layers",
    )  # fmt: skip
    with pytest.raises(UserError, match="has no points"):
        Sweep("c", param("seed", []))
    with pytest.raises(UserError, match="sets 'seed' for all points, and sweeps over it"):
        Sweep("c", param("seed", [0]), overrides={"seed": 1})
