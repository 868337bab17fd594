"""Groups of points, the table and the plots that are made of them."""

import numpy as np
import pytest

from llm_jax.sweep import Sweep, param, product, zip
from tools.sweep.outcome import Outcome, group_seeds
from tools.sweep.plots import Axis, draw_metric, find_axes
from tools.sweep.points import Point
from tools.sweep.table import markdown


def outcome(loss, status="finished", **overrides):
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    point = Point(str(overrides), overrides, (), "")
    return Outcome(point, status, 10, 60.0, {} if loss is None else {"loss": loss})


def test_seeds_become_a_mean_with_its_standard_error():
    values = [1.0, 2.0, 6.0]
    outcomes = [outcome(v, seed=i, model__num_layers=2) for i, v in enumerate(values)]
    outcomes += [outcome(5.0, seed=0, model__num_layers=4)]
    outcomes += [outcome(None, "failed", seed=1, model__num_layers=4)]
    two, four = group_seeds(outcomes, "loss", "lowest")
    assert two.mean == 3.0 and two.error == pytest.approx(np.std(values, ddof=1) / 3**0.5)
    assert (four.mean, four.error, four.best, two.best) == (5.0, None, False, True)
    assert [g.best for g in group_seeds(outcomes, "loss", "highest")] == [False, True]
    swept = product(param("model.num_layers", [2, 4]), param("seed", [0, 1, 2]))
    table = markdown(Sweep("c", swept, "loss"), outcomes, "lowest")
    assert "| 2 | 3 | finished | 10, 10, 10 | 3:00 | 3.0000 ± 1.5275 best |" in table
    assert "| 4 | 1 | 1 finished, 1 failed | 10, 10 | 2:00 | 5.0000 |" in table


def test_a_loss_that_is_not_finite_is_never_the_best():
    outcomes = [outcome(float("nan"), a=1), outcome(3.0, a=2), outcome(1.0, "stopped", a=3)]
    assert [g.best for g in group_seeds(outcomes, "loss", "lowest")] == [False, True, False]
    assert "| 1 | finished | 10 | 1:00 | none |" in markdown(
        Sweep("c", param("a", [1, 2, 3]), "loss"), outcomes, "lowest"
    )


@pytest.mark.parametrize("values, logarithmic", [
    ((1e-3, 3e-3, 1e-2), True), ((2, 4, 8), True), ((1, 2, 3), False), ((1, 2), False),
    ((0, 1, 10), False), (("a", "b", "c"), False),
])  # fmt: skip
def test_geometric_values_have_a_logarithmic_axis(values, logarithmic):
    assert Axis(("a",), values).logarithmic is logarithmic


def test_keys_that_change_together_are_one_axis():
    width = zip(param("model.embed_dim", [64, 32]), param("model.num_heads", [2, 1]))
    space = product(width, param("optimizer.name", ["muon", "adamw"]), param("seed", [0, 1]))
    assert find_axes(space) == [
        Axis(("model.embed_dim", "model.num_heads"), (32, 64)),
        Axis(("optimizer.name",), ("muon", "adamw")),
    ]


def test_the_picture_has_a_panel_for_each_key_and_a_line_for_each_other_value(
    tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr("tools.plot.save_figure", lambda figure, output: drawn.append(figure))
    rates, layers = [1e-3, 1e-2, 1e-1], [1, 2]
    space = product(param("optimizer.learning_rate", rates), param("model.num_layers", layers))
    outcomes = [outcome(float(i), **point) for i, point in enumerate(space)]
    draw_metric(Sweep("c", space, "loss"), outcomes, "lowest", tmp_path / "a.png")
    rate, depth = drawn[0].axes
    assert (rate.get_xscale(), depth.get_xscale()) == ("log", "linear")
    assert rate.get_xlabel() == "optimizer.learning_rate"
    texts = [text.get_text() for text in rate.get_legend().get_texts()]
    assert texts == ["num_layers 1", "num_layers 2"]
    first, second = (container.lines[0] for container in rate.containers)
    np.testing.assert_array_equal(first.get_xydata(), [[1e-3, 0], [1e-2, 2], [1e-1, 4]])
    np.testing.assert_array_equal(second.get_xydata(), [[1e-3, 1], [1e-2, 3], [1e-1, 5]])
    assert len(depth.containers) == 3
