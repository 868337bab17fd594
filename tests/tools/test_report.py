"""The report: what the page says, that it stands for itself, and half a run."""

import dataclasses
import html.parser
import json
import math
import re

import pytest

from llm_jax.binding import binding
from llm_jax.config import digest
from tools.cli import run_tool
from tools.report.__main__ import define_flags, main
from tools.report.charts import POINTS, Series, draw, thinned, ticks
from tools.report.graph import BOX_HEIGHT, BOX_WIDTH, Edge, Node, lay_out
from tools.report.reading import read
from tools.report.sections import make_section
from tools.report.words import count, duration, measured, number

SAMPLE = "<script>alert(1)</script> & ``` | {{ page }}"


def report(*arguments):
    return run_tool(main, define_flags(), "", ["report", *map(str, arguments)], True)


@pytest.fixture
def write_run():
    """`write_run(folder, config, parent)`: a run that was finished, without its training."""

    def write(folder, parent=None, losses=(3.0, 2.0, 1.0), **config):
        folder.mkdir(parents=True)
        config = {"seed": 0, "init_from": None if parent is None else str(parent), **config}
        (folder / "config.json").write_text(json.dumps(config))
        lineage = []
        if parent is not None:
            before = json.loads((parent / "result.json").read_text())
            made_by = digest(binding(json.loads((parent / "config.json").read_text())))
            own = {"stage": before["stage"], "run": str(parent), "step": 3, "config": made_by}
            lineage = [*before["lineage"], own]
        result = {
            "status": "finished", "stage": config["trainer"], "step": len(losses),
            "tokens": 3_000_000, "seconds": 1800.0, "tokens_per_second": 1234.5,
            "lineage": lineage, "metrics": {},
            "hardware": {"platform": "gpu", "device": "H100", "devices": 4, "jax": "0.10.2"},
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
        lines = [{"step": i, "loss": loss, "tokens": i} for i, loss in enumerate(losses, start=1)]
        last = {"eval/validation/loss": losses[-1] + 0.5, "eval/validation/loss_stderr": 0.02}
        lines += [{"step": len(losses), **last}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        samples = [{"step": 2, "text": "earlier"}, {"step": 3, "text": SAMPLE}]
        (folder / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in samples))
        return folder

    return write


@pytest.fixture
def chain(write_run, tmp_path):
    """pretrain → sft → reward, dpo; the second and the last were evaluated."""
    work = tmp_path / "chat"
    pretrain = write_run(work / "pretrain", trainer="pretrain", optimizer={"learning_rate": 0.01})
    sft = write_run(work / "sft", pretrain, trainer="sft", optimizer={"learning_rate": 0.002})
    write_run(work / "reward", sft, trainer="reward", optimizer={"learning_rate": 0.002})
    dpo = write_run(work / "dpo", sft, trainer="dpo", optimizer={"learning_rate": 0.002},
                    beta=0.1, judge=f"{work / 'reward'}@3")  # fmt: skip
    for run, value in ((sft, 0.25), (dpo, 0.75)):
        task = {
            "metrics": {"accuracy": value, "accuracy_stderr": 0.03},
            "examples": [{"id": "a", "prompt": SAMPLE, "correct": True}],
        }
        tasks = {"sums": task, "broken": {"error": "no <file>"}}
        (run / "evaluation.json").write_text(json.dumps({"step": 3, "tasks": tasks}))
    return work


class Outline(html.parser.HTMLParser):
    """What stands in a page: ids, links, attributes that load something, texts by element."""

    VOID = ("meta",)

    def __init__(self, page):
        super().__init__()
        self.ids, self.links, self.loads, self.open, self.names = [], [], [], [], []
        self.texts = {}
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.loads += [v for k, v in attributes.items() if k in ("src", "srcset", "data")]
        self.names.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.names.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def test_the_page_of_a_chain_says_it_all_and_stands_for_itself(chain, tmp_path, capsys):
    output = tmp_path / "chat.html"
    assert report(chain, f"--output={output}", "--price_per_device_hour=2.5") == 0
    assert capsys.readouterr().out == f"{output}\n"
    page = output.read_text()
    outline = Outline(page)
    assert not outline.loads and "script" not in outline.names and "link" not in outline.names
    assert "url(http" not in page and "@import" not in page
    assert all(link[0] == "#" and link[1:] in outline.ids for link in outline.links)
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.texts["title"][0] == "chat: a chain of 4 stages"
    assert outline.texts["h1"] == ["chat"]
    assert outline.texts["h2"][-4:] == ["pretrain", "sft", "reward", "dpo"]  # parents first
    # 4 runs of half an hour on 4 devices.
    facts = dict(zip(outline.texts["dt"], outline.texts["dd"], strict=True))
    assert facts["device hours"] == "8" and facts["cost"] == "20.00"
    assert facts["finished"] == "4 of 4" and facts["tokens trained on"] == "12\u202fM"
    assert facts["hardware"] == "4 \N{MULTIPLICATION SIGN} H100"
    assert "0.750\u202f±\u202f0.030" in page and "1.500\u202f±\u202f0.020" in page
    assert page.count(SAMPLE) == 0 and page.count("&lt;script&gt;alert(1)") == 4 + 2
    assert "the task broken of evaluation.json failed: no &lt;file&gt;" in page
    labels = re.findall(r'<svg viewBox[^>]*aria-label="([^"]*)"', page)
    assert labels.count("loss over 3 steps: training from 3 to 1; validation from 1.5 to 1.5") == 4


def test_only_settings_that_differ_are_shown_and_the_best_figure_is_strong(chain, tmp_path):
    output = tmp_path / "chat.md"
    assert report(chain, f"--output={output}") == 0
    page = output.read_text()
    changes = page.partition("Settings other than pretrain's")[2].partition("##")[0]
    assert "optimizer.learning\\_rate | 0.01 | 0.002 |" in changes
    assert "trainer | pretrain | sft |" in changes and "seed" not in changes
    other = page.partition("\n## dpo\n")[2]
    assert "learning" not in other and "trainer | sft | dpo |" in other and "beta" not in other
    assert "| sums | accuracy | 0.250\u202f±\u202f0.030 | **0.750\u202f±\u202f0.030** |" in page
    assert f"````text\n{SAMPLE}\n````" in page  # a fence that the sample does not close
    assert "cost" not in page.lower().replace("time, cost, hardware", "")


def test_what_a_stage_inherits_is_no_difference(chain):
    parent, run = read(chain).runs[:2]
    meta = {"model": {"embed_dim": 64, "remat": "none"}}
    config = {"trainer": "sft", "model": {"embed_dim": 999}, "tokenizer": {"vocab_size": 9}}
    parent = dataclasses.replace(parent, meta=meta)
    meta = {"model": {"embed_dim": 64, "remat": "full"}, "lineage": run.lineage}
    changes = make_section(
        dataclasses.replace(run, config=config, meta=meta), parent, with_charts=False
    ).changes
    assert [[cell.text for cell in row] for row in changes.rows] == [
        ["trainer", "pretrain", "sft"],
        ["model.remat", "none", "full"],
    ]


def test_the_lineage_is_that_of_the_runs(chain):
    links = {(link.parent, link.child, link.kind) for link in read(chain).links}
    assert links == {
        ("pretrain", "sft", "parent"),
        ("sft", "reward", "parent"),
        ("sft", "dpo", "parent"),
        ("reward", "dpo", "judge"),
    }


def test_a_run_brings_the_runs_that_it_comes_from(chain):
    collection = read(chain / "dpo")
    assert [run.name for run in collection.runs] == ["pretrain", "sft", "dpo"]
    assert collection.kind == "chain" and collection.parent(collection.runs[2]).name == "sft"


def test_a_chain_that_was_moved_is_still_one(chain, tmp_path):
    moved = chain.rename(tmp_path / "elsewhere")
    collection = read(moved)
    assert not collection.outside and not collection.problems
    assert [run.name for run in collection.runs][:2] == ["pretrain", "sft"]


def test_a_parent_that_is_gone_or_made_anew_is_told(chain, write_run):
    config = json.loads((chain / "sft" / "config.json").read_text())
    (chain / "sft" / "config.json").write_text(json.dumps({**config, "seed": 7}))
    collection = read(chain)
    assert (
        sum("before that was made anew with another config" in p for p in collection.problems) == 2
    )
    (chain / "sft").rename(chain.parent / "away")
    collection = read(chain)
    assert collection.outside == (str(chain / "sft"),)
    assert report(chain) == 0 and "not in this folder" in (chain / "report.html").read_text()


def test_half_a_run_is_shown_as_far_as_it_goes(chain, capsys):
    (chain / "dpo" / "result.json").unlink()
    (chain / "dpo" / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "lo')
    (chain / "reward" / "result.json").write_text('{"status": "fin')
    (chain / "reward" / "metrics.jsonl").write_text("nonsense\n")
    (chain / "sft" / "samples.jsonl").unlink()
    (chain / "empty").mkdir()
    (chain / "begun").mkdir()
    (chain / "begun" / "config.json").write_text("{}")
    output = chain / "report.html"
    assert report(chain) == 0
    assert capsys.readouterr().err == ""
    page = output.read_text()
    Outline(page)
    assert "result.json cannot be read: Unterminated string" in page
    assert "metrics.jsonl:1 is no metrics record" in page
    for status in ("unfinished", "not begun"):
        assert f'<span class="status {status}">{status}</span>' in page
    assert "2 of 5" in page and "≥\u202f4" in page  # of three runs the time is not known


def test_a_set_of_runs_is_sorted_by_what_its_sweep_asks_for(write_run, tmp_path):
    work = tmp_path / "sweep"
    for rate, loss in ((0.1, 2.0), (0.2, 1.0), (0.3, math.inf)):
        losses = (3.0, loss) if math.isfinite(loss) else (3.0, 4.0)
        write_run(work / f"p{rate}", losses=losses, trainer="pretrain", rate=rate)
    (work / "p0.3" / "result.json").unlink()
    output = tmp_path / "sweep.md"
    assert report(work, f"--output={output}") == 0
    runs = output.read_text().partition("## Runs, the best first")[2].partition("##")[0]
    order = re.findall(r"^\| (p0\.\d) \| (0\.\d) \|", runs, re.MULTILINE)
    assert order == [("p0.2", "0.2"), ("p0.1", "0.1"), ("p0.3", "0.3")]
    points = [
        {"name": f"p{rate}", "overrides": {"rate": rate}, "status": status, "best": best,
         "metrics": metrics}
        for rate, status, best, metrics in (
            (0.1, "finished", True, {"score": 9.0}), (0.2, "finished", False, {"score": 8.0}),
            (0.3, "failed", False, {}), (0.4, "waiting", False, {}),
        )
    ]  # fmt: skip
    record = {"metric": "score", "direction": "highest", "points": points}
    (work / "sweep.json").write_text(json.dumps(record))
    assert report(work, f"--output={output}") == 0
    told = output.read_text().partition("## Points, the best first")[2].partition("##")[0]
    assert [line.strip().partition(" | ")[2] for line in told.strip().splitlines()] == [
        "rate | score | status |", "---: | ---: | --- |",
        "0.1 | **9** | finished |", "0.2 | 8 | finished |",
        "0.3 | \u2013 | failed |", "0.4 | \u2013 | waiting |",
    ]  # fmt: skip
    assert report(work) == 0
    page = (work / "report.html").read_text()
    assert (
        page.count('style="stroke: var(--c3)"') and "var(--c4)" not in page.partition("</style>")[2]
    )


def test_points_that_are_chains_are_told_by_what_the_sweep_knows(write_run, tmp_path):
    work = tmp_path / "sweep"
    points = []
    for rate, loss in ((0.1, 2.0), (0.2, 1.0)):
        name = f"p{rate}"
        first = write_run(work / name / "pretrain", trainer="pretrain")
        write_run(work / name / "sft", first, trainer="sft")
        points.append({"name": name, "overrides": {"sft.rate": rate}, "status": "finished",
                       "best": loss == 1.0, "metrics": {"sft/loss": loss}})  # fmt: skip
    record = {"metric": "sft/loss", "direction": "lowest", "points": points}
    (work / "sweep.json").write_text(json.dumps(record))
    output = tmp_path / "sweep.md"
    assert report(work, f"--output={output}") == 0
    told = output.read_text().partition("## Points, the best first")[2].partition("##")[0]
    assert [line.strip() for line in told.strip().splitlines()[2:]] == [
        "| p0.2 | 0.2 | **1** | finished |", "| p0.1 | 0.1 | 2 | finished |",
    ]  # fmt: skip


def test_parameters_are_those_of_the_checkpoint(save_run, tmp_path):
    run = save_run(tmp_path / "run", [4])
    (run / "config.json").write_text(json.dumps({"trainer": "pretrain"}))
    (collected,) = read(run).runs
    assert collected.checkpoint == 4 and collected.status == "unfinished"
    assert report(run) == 0
    shapes = 320 * 16 + 4 * 16 * 16 + 3 * 16 * 16 + 3 * 16  # tied embeddings, gated MLP, norms
    assert f">{shapes:,}<" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one folder is wanted"),
        (["RUN", "RUN"], "one folder is wanted"),
        (["nowhere"], "nowhere is no folder"),
        (["EMPTY"], "holds no run"),
        (["RUN", "--output=a.pdf"], "must end in .html or .md"),
        (["--output=missing/a.html", "RUN"], "cannot be written"),
        (["RUN", "--price_per_device_hour=-1"], "price_per_device_hour"),
    ],
)
def test_bad_input_is_one_line(write_run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    names = {"RUN": write_run(tmp_path / "run", trainer="pretrain"), "EMPTY": tmp_path / "empty"}
    names["EMPTY"].mkdir()
    assert report(*(names.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))


# --- the geometry ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0.13, 0.41, [0.2, 0.3, 0.4]), (-3, 7, [-2, 0, 2, 4, 6]),
     (5, 5, [5])],
)  # fmt: skip
def test_ticks_are_round_numbers_inside_the_range(low, high, expected):
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_a_curve_goes_from_corner_to_corner_and_breaks_where_it_is_not_finite():
    chart = draw("loss", [Series("training", [(0, 4.0), (5, math.nan), (10, 0.0)], 1)])
    assert (
        chart.curves[0].path
        == f"M{chart.left:.1f},{chart.top:.1f}M{chart.right:.1f},{chart.bottom:.1f}"
    )
    assert draw("loss", [Series("training", [(1, math.nan)], 1)]) is None


def test_a_long_curve_keeps_its_spikes():
    points = [(float(i), 1.0) for i in range(100_000)]
    points[31_415], points[27_182] = (31_415.0, 99.0), (27_182.0, -99.0)
    kept = thinned(points)
    assert len(kept) <= POINTS + 2 and points[31_415] in kept and points[27_182] in kept
    assert kept == sorted(kept)


def test_no_box_stands_on_another_or_on_an_arrow():
    names = ["base", "sft", "reward", "ppo", "grpo", "other"]
    edges = [
        Edge("base", "sft"), Edge("sft", "reward"), Edge("sft", "ppo"), Edge("sft", "grpo"),
        Edge("reward", "ppo", dashed=True),
    ]  # fmt: skip
    graph = lay_out({name: Node(name, (), None, "finished") for name in names}, edges)
    boxes = {box.node.name: box for box in graph.boxes}
    for parent, child in ((edge.parent, edge.child) for edge in edges):
        assert boxes[parent].x + BOX_WIDTH < boxes[child].x
    corners = {(box.x, box.y) for box in graph.boxes}
    assert len(corners) == len(names)
    # The straight end of the arrow from sft to ppo passes below reward.
    assert boxes["ppo"].y >= boxes["reward"].y + BOX_HEIGHT


def test_numbers_in_words():
    values = (0.0, -1.5, 1234.567, 3.4e-7, 140)
    expected = ["0", "\u22121.5", "1,235", "3.4e\u22127", "140"]
    assert [number(value) for value in values] == expected
    assert (count(None), count(12_345), count(1_234_567)) == ("\u2013", "12,345", "1.23\u202fM")
    assert (duration(28), duration(164), duration(4000)) == (
        "28\u202fs",
        "2:44\u202fmin",
        "1:06:40\u202fh",
    )
    assert measured(2.51149, 0.0903) == "2.511\u202f±\u202f0.090" and measured(0.5) == "0.5"
