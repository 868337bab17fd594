"""The pre-training stage: what it inherits, what its phases decide, and what it writes."""

import json

import jax
import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax.binding import binding_digest
from llm_jax.config import build as build_config
from llm_jax.data.corpus import DataConfig
from llm_jax.data.needle import NeedleConfig
from llm_jax.data.phases import GateConfig, PhaseConfig
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.metrics import read_metrics_file
from llm_jax.models.config import ModelConfig
from llm_jax.models.pipeline import PipelineConfig
from llm_jax.models.rope import RopeConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.trainers import pretrain
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.pretrain import PretrainConfig, PretrainEvaluationConfig

SMALL = {"embed_dim": 32, "num_layers": 2, "num_heads": 2, "mlp_dim": 64, "max_length": 128}
FROZEN = OptimizerConfig(learning_rate=0.0, warmup_steps=0)


@pytest.fixture(scope="module")
def build(tiny_config, tmp_path_factory):
    """`build(**sections)`: the trainer on one device, and what it logged."""

    def make(workdir=None, **sections):
        lines = []
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        config = build_config(PretrainConfig, tiny_config(**sections))
        workdir = workdir or tmp_path_factory.mktemp("workdir") / "run"
        with jax.set_mesh(mesh):
            return pretrain.build(config, mesh, workdir, lines.append), lines

    return make


@pytest.fixture(scope="module")
def parent(tiny_config, run_on, tmp_path_factory):
    """The folder of a finished run with an average, to start from."""
    workdir = tmp_path_factory.mktemp("parent") / "run"
    config = tiny_config(
        model=ModelConfig(**SMALL, qk_norm="head"),
        phases=(
            PhaseConfig(length=32, batch=8, steps=2),
            PhaseConfig(length=32, batch=8, steps=2, rope_theta=40_000.0),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, ema_decay=0.5),
    )
    assert run_on(1, config, workdir) == 0
    return workdir


# --- the architecture -----------------------------------------------------------------------------


def shapes(trainer):
    boxed = jax.eval_shape(trainer.init_params, jax.random.key(0))
    return {str(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(boxed)}


def embedding(trainer):
    return next(shape for path, shape in shapes(trainer).items() if "embedding" in path)


def test_the_vocabulary_is_the_tokenizers_rounded_up(build):
    trainer, _ = build()  # 264 bytes and specials
    assert trainer.tokenizer.vocab_size == 264 and embedding(trainer) == (320, 32)
    trainer, _ = build(model=ModelConfig(**SMALL, vocab_size=300))
    assert embedding(trainer) == (300, 32)
    with pytest.raises(UserError, match=r"tokenizer has 264 tokens and config\.model\.vocab_size"):
        build(model=ModelConfig(**SMALL, vocab_size=263))


def test_what_is_read_and_what_is_built_is_logged(build):
    _, lines = build()
    assert any("documents" in line and "held out" in line for line in lines)
    assert any("parameters" in line and "attention by" in line for line in lines)


def test_a_phase_decides_rope_length_and_evaluations(build):
    trainer, _ = build(
        model=ModelConfig(**SMALL, rope=RopeConfig(original_length=32)),
        phases=(
            PhaseConfig(length=32, batch=8, steps=4),
            PhaseConfig(length=64, batch=4, steps=2, rope_theta=9e4, gate=GateConfig()),
            PhaseConfig(
                length=64, batch=4, steps=2, rope_scaling="yarn", rope_factor=2.0,
                gate=GateConfig(needle_accuracy=None),
            ),
        ),
    )  # fmt: skip
    settings = [trainer.setting(phase) for phase in trainer.phases]
    names = [[evaluation.name for evaluation in setting.evaluations] for setting in settings]
    assert names == [["validation"], ["validation", "short", "needle"], ["validation", "short"]]
    ropes = [setting.meta["model"]["rope"] for setting in settings]
    assert [rope["theta"] for rope in ropes] == [10_000.0, 9e4, 9e4]
    assert [rope["scaling"] for rope in ropes] == ["none", "none", "yarn"]
    assert [setting.meta["length"] for setting in settings] == [32, 64, 64]
    assert settings[0].flops_per_token < settings[1].flops_per_token
    assert "yarn scaling by 2" in settings[2].facts[0]


def test_the_needle_is_evaluated_where_the_config_says_so(build):
    trainer, _ = build(evaluation=PretrainEvaluationConfig(needle=True, needle_depths=2),
                       phases=(PhaseConfig(length=64, batch=8, steps=2),))  # fmt: skip
    names = [evaluation.name for evaluation in trainer.setting(trainer.phases[0]).evaluations]
    assert names == ["validation", "needle"]


def test_needle_rows_are_a_component_of_the_mixture(build, corpus):
    trainer, _ = build(
        data=DataConfig(
            source=str(corpus), validation_fraction=0.1, needle=NeedleConfig(),
            weights={"text": 1.0, "needle": 3.0},
        ),
        phases=(PhaseConfig(length=64, batch=8, steps=2),),
    )  # fmt: skip
    assert "mixture needle 3, text 1" in trainer.setting(trainer.phases[0]).facts
    trainer.source.start(trainer.phases[0], 0)
    assert trainer.source.next(None, 0).tokens.shape == (8, 64)
    assert set(trainer.source.progress(1)) == {"epoch/text", "epoch/needle"}


@pytest.mark.parametrize("phase, message", [
    (PhaseConfig(length=129, batch=8, steps=1), "length 129 is past the positions"),
    (PhaseConfig(length=32, batch=8, steps=1, weights={"txet": 1.0}), "Did you mean 'text'"),
    (PhaseConfig(length=16, batch=8, steps=1, gate=GateConfig()), "needle"),
    (PhaseConfig(length=32, batch=8, steps=1, rope_scaling="yran"),
     r"config\.phases\[1\]\.rope_scaling='yran' is not one of none, linear, ntk, dynamic, yarn"),
    (PhaseConfig(length=32, batch=8, steps=1, rope_scaling="yarn"), r"rope\.original_length"),
])  # fmt: skip
def test_what_does_not_fit_the_last_phase_is_refused_before_the_first(build, phase, message):
    with pytest.raises(UserError, match=message):
        build(phases=(PhaseConfig(length=32, batch=8, steps=4), phase))


# --- inheritance ----------------------------------------------------------------------------------


def test_a_stage_inherits_architecture_tokenizer_and_the_average(build, parent):
    trainer, lines = build(
        init_from=str(parent),
        model=ModelConfig(embed_dim=64, num_layers=1, max_length=64, residual_dropout=0.1),
        tokenizer=TokenizerConfig(vocab_size=300),
        phases=(PhaseConfig(length=64, batch=8, steps=4),),
    )
    assert trainer.tokenizer.kind == "bytes"
    assert embedding(trainer) == (320, 32)
    meta = trainer.setting(trainer.phases[0]).meta
    assert meta["model"]["qk_norm"] and meta["model"]["num_layers"] == 2
    assert meta["model"]["rope"]["theta"] == 40_000.0  # that of the parent's last phase
    # What the run itself decides
    assert meta["model"]["max_length"] == 64 and meta["model"]["residual_dropout"] == 0.1
    before = {"stage": "pretrain", "run": str(parent), "step": 4, "config": binding_digest(parent)}
    assert meta["lineage"] == [before]
    (line,) = [line for line in lines if "architecture and tokenizer come from" in line]
    for key in ("embed_dim", "num_layers"):
        assert key in line.partition("gives way in")[2]
    assert "qk_norm" not in line  # a field at its default asks for nothing

    boxed = jax.eval_shape(trainer.init_params, jax.random.key(0))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), boxed)
    abstract = jax.tree.map(lambda box: box.value, abstract, is_leaf=lambda x: hasattr(x, "names"))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), abstract
    )
    loaded = trainer.load_params(abstract)
    expected = checkpoint.read_params(parent, 4, abstract)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_a_run_starts_from_a_step_of_another_and_keeps_its_ancestry(
    tiny_config, run_on, parent, tmp_path, capsys
):
    config = tiny_config(
        init_from=f"{parent}@2", phases=(PhaseConfig(length=32, batch=8, steps=1),),
        optimizer=FROZEN,
    )  # fmt: skip
    assert run_on(1, config, tmp_path / "child") == 0
    assert f"come from {parent}@2" in capsys.readouterr().out
    first = evaluated(parent)[0]  # of the average, at step 2
    assert evaluated(tmp_path / "child")[0] == pytest.approx(first, rel=1e-6)
    result = json.loads((tmp_path / "child" / "result.json").read_text())
    assert result["parent"] == f"{parent}@2" and result["tokens"] == 32 * 8

    config = tiny_config(
        init_from=str(tmp_path / "child"), phases=(PhaseConfig(length=32, batch=8, steps=1),),
        optimizer=FROZEN,
    )  # fmt: skip
    assert run_on(1, config, tmp_path / "grandchild") == 0
    meta = checkpoint.read_meta(tmp_path / "grandchild", 1)
    assert [(ancestor["run"], ancestor["step"]) for ancestor in meta["lineage"]] == [
        (str(parent), 2), (str(tmp_path / "child"), 1),
    ]  # fmt: skip


def evaluated(workdir):
    records = read_metrics_file(workdir / "metrics.jsonl")
    return [r["eval/validation/loss"] for r in records if "eval/validation/loss" in r]


# --- what it says ---------------------------------------------------------------------------------


def test_the_sample_is_text_of_the_model(build):
    trainer, _ = build(sample=SampleConfig(prompt="ka", max_new_tokens=3))
    setting = trainer.setting(trainer.phases[0])
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        boxed = trainer.init_params(jax.random.key(0))
        params = jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda x: hasattr(x, "names"))
        sample = setting.sample(params)
        assert isinstance(sample, str) and sample == setting.sample(params)
    trainer, _ = build(sample=SampleConfig(max_new_tokens=0))
    assert trainer.setting(trainer.phases[0]).sample is None


def test_a_pipeline_is_described_and_what_does_not_fit_it_is_refused(tiny_config, tmp_path):
    def lines_of(batch=16, **model):
        lines = []
        config = build_config(
            PretrainConfig,
            tiny_config(
                model=ModelConfig(**{**SMALL, "num_layers": 8, **model}),
                phases=(PhaseConfig(length=32, batch=batch, steps=2),),
            ),
        )
        mesh = make_mesh(MeshConfig(data=1, stage=4), jax.devices()[:4])
        with jax.set_mesh(mesh):
            pretrain.build(config, mesh, tmp_path / "run", lines.append)
        return lines

    scanned = {"scan_layers": True, "pipeline": PipelineConfig(8, 2)}
    assert (
        "pipeline of 4 stages with 2 groups of layers each, 8 micro-batches, 16% bubble"
        in lines_of(**scanned)
    )
    assert "pipeline of 4 stages, 4 micro-batches, 43% bubble" in lines_of(scan_layers=True)
    with pytest.raises(UserError, match=r"set model\.scan_layers=True"):
        lines_of()
    with pytest.raises(UserError, match=r"12 sequences .* a multiple of 8, such as 16"):
        lines_of(batch=12, **scanned)


def test_the_fingerprint_is_of_the_data(build, corpus, other_corpus):
    fingerprints = [
        build(data=DataConfig(source=str(source), validation_fraction=fraction))[0].data_fingerprint
        for source, fraction in [(corpus, 0.1), (corpus, 0.1), (other_corpus, 0.1), (corpus, 0.2)]
    ]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3


def test_the_trainer_knows_how_much_wider_than_its_base_the_model_is(build):
    assert build(model=ModelConfig(**SMALL))[0].width_multiplier == 1
    assert build(model=ModelConfig(**SMALL, mup_base_width=8))[0].width_multiplier == 4
