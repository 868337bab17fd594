"""Distillation on given data: what a student learns, what is kept, and who may be a teacher."""

import shutil
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from llm_jax.checkpoint import CheckpointConfig
from llm_jax.data.chat_corpus import ChatDataConfig
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.objectives.distill import LossConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.stored import find
from llm_jax.trainers.sft import SFTEvaluationConfig
from llm_jax.trainers.teacher import TeacherConfig
from llm_jax.trainers.teacher_cache import TeacherCache

SMALL = ModelConfig(embed_dim=8, num_layers=1, num_heads=2, mlp_dim=16, max_length=64)
FAST = OptimizerConfig(learning_rate=0.02, warmup_steps=0, schedule="constant")
SOFT = LossConfig(alpha=0.0, temperature=2.0)


@pytest.fixture(scope="module")
def teacher(start):
    """A run that knows some answers."""
    return start("sft", phases=(PhaseConfig(length=32, batch=8, steps=12),), optimizer=FAST)


@pytest.fixture(scope="module")
def sections(examples, teacher, tmp_path_factory):
    """`sections(**more)`: those of a distillation, with a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")

    def make(**more):
        data = {"source": str(examples / "chats.jsonl"), "validation_fraction": 0.2}
        settings = {
            "data": ChatDataConfig(**data, cache_dir=str(cache)),
            "evaluation": SFTEvaluationConfig(every=1000, rows=8, answers=0),
            "teacher": TeacherConfig(run=str(teacher)),
            "init_from": None,
            "model": SMALL,
        }
        return {**settings, **more}

    return make


@pytest.fixture(scope="module")
def distilled(start, opened, sections):
    """`distilled(**sections)`: a finished run; one for all tests that ask for the same."""

    known = {}

    def make(*, devices=1, **more):
        key = repr((devices, more))
        if key not in known:
            known[key] = opened(start("distill", devices=devices, **sections(**more)))
        return known[key]

    return make


def taught(run, key):
    return run.logged(f"eval/distillation/{key}")


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [None, 16])
def test_a_student_comes_to_say_what_its_teacher_says(top_k, distilled):
    run = distilled(
        top_k=top_k,
        seed=2,
        loss=SOFT,
        optimizer=FAST,
        phases=(PhaseConfig(length=32, batch=8, steps=24),),
    )
    before, after = taught(run, "distill_loss")
    assert after < 0.5 * before
    before, after = taught(run, "token_agreement")
    assert after > before + 0.1
    assert run.logged("eval/validation/loss")[-1] < run.logged("eval/validation/loss")[0]
    assert run.logged("loss") == pytest.approx(run.logged("distill_loss"))


def test_all_tokens_on_disk_are_as_good_as_the_teacher_at_hand(distilled):
    settings = {"loss": LossConfig(temperature=2.0)}
    whole, kept = distilled(**settings), distilled(top_k=10_000, **settings)
    for key in ("loss", "distill_loss", "cross_entropy", "token_agreement"):
        assert kept.logged(key) == pytest.approx(whole.logged(key), rel=1e-4)
    few = distilled(top_k=2, **settings)
    assert few.logged("distill_loss")[0] < whole.logged("distill_loss")[0] * 0.999
    assert few.logged("cross_entropy")[0] == pytest.approx(whole.logged("cross_entropy")[0])


def test_the_teacher_is_its_own_best_student(distilled, teacher):
    """From its weights there is nothing to learn."""
    run = distilled(init_from=str(teacher), model=ModelConfig(), loss=SOFT)
    assert taught(run, "distill_loss")[0] == pytest.approx(0, abs=1e-4)
    assert taught(run, "token_agreement")[0] == 1


def test_adapters_learn_too(distilled, pretrained, opened):
    run = distilled(
        init_from=str(pretrained), model=ModelConfig(lora=LoraConfig(rank=2)), loss=SOFT,
        optimizer=FAST, phases=(PhaseConfig(length=32, batch=8, steps=12),),
    )  # fmt: skip
    before, after = taught(run, "distill_loss")
    assert after < before
    assert all("lora" in name for name in run.params)
    assert find(str(run.workdir)).model.lora.rank == 2


def test_plain_text_is_learnt_from(distilled, corpus):
    run = distilled(data=ChatDataConfig(source=str(corpus)), top_k=4)
    assert taught(run, "distill_loss")[-1] > 0


# --- the run --------------------------------------------------------------------------------------


def test_the_run_holds_the_student_alone(distilled, start, teacher, opened):
    run = distilled()
    assert not any("teacher" in name for name in run.params)
    meta = find(str(run.workdir)).meta
    assert meta["teacher"]["run"] == str(teacher) and len(meta["teacher"]["weights"]) == 16
    tokenizers = [opened(folder).result["hashes"]["tokenizer"] for folder in (run.workdir, teacher)]
    assert tokenizers[0] == tokenizers[1]
    assert meta["template"] == find(str(teacher)).meta["template"]
    assert start("sft", init_from=str(run.workdir))  # and the next stage takes it up


@pytest.mark.slow
def test_devices_change_nothing(distilled):
    one = distilled()
    mesh = MeshConfig(data=2, fsdp=2)
    many = [distilled(devices=4, mesh=mesh), distilled(devices=4, mesh=mesh, top_k=10_000)]
    for run in many:
        assert run.logged("loss") == pytest.approx(one.logged("loss"), rel=1e-4)
        assert taught(run, "loss") == pytest.approx(taught(one, "loss"), rel=1e-4)


class Computed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [None, 4])
def test_a_killed_run_ends_bit_for_bit_as_if_it_had_not_been(
    top_k, distilled, sections, configure, run_on, opened, killed_at, tmp_path
):
    """Through two epochs and two lengths, so that rows come in many orders."""
    more = {
        "top_k": top_k,
        "model": ModelConfig(**{**vars(SMALL), "residual_dropout": 0.1}),
        "phases": (
            PhaseConfig(length=32, batch=8, steps=4), PhaseConfig(length=48, batch=8, steps=4),
        ),
        "checkpoint": CheckpointConfig(every=2, keep_latest=10),
    }  # fmt: skip
    whole = distilled(**more)
    config = configure("distill", **sections(**more))
    with killed_at(5):
        run_on(1, config, tmp_path / "run")
    assert run_on(1, config, tmp_path / "run") == 0
    resumed = opened(tmp_path / "run")
    for item in ("params", "train"):
        found, expected = resumed.item(item), whole.item(item)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].tobytes() == value.tobytes(), name
    assert resumed.logged("loss") == whole.logged("loss")


# --- the cache ------------------------------------------------------------------------------------


def test_what_is_on_disk_is_not_computed_again(build, sections):
    build("distill", **sections(top_k=3))
    with mock.patch.object(TeacherCache, "_write", side_effect=Computed):
        build("distill", **sections(top_k=3, loss=LossConfig(alpha=0.1, divergence="jsd")))
        for other in ({"top_k": 5}, {"top_k": 3, "loss": LossConfig(temperature=3.0)}):
            with pytest.raises(Computed):
                build("distill", **sections(**other))


def test_a_damaged_file_is_computed_again(build, beginning, sections, tmp_path):
    data = ChatDataConfig(**{**vars(sections()["data"]), "cache_dir": str(tmp_path)})
    _, batch = beginning(build("distill", **sections(top_k=3, data=data))[0])
    for path in (tmp_path / "teacher").iterdir():
        path.write_bytes(path.read_bytes()[:-8])
    _, again = beginning(build("distill", **sections(top_k=3, data=data))[0])
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    assert len(list((tmp_path / "teacher").iterdir())) == 2  # training and validation


def test_the_teacher_need_not_be_there_to_resume_from_the_disk(
    sections, configure, run_on, teacher, killed_at, tmp_path
):
    """Its weights, that is: what it is must still be known."""
    gone = tmp_path / "teacher"
    shutil.copytree(teacher, gone)
    more = sections(
        top_k=4, teacher=TeacherConfig(run=str(gone)), checkpoint=CheckpointConfig(every=1),
        phases=(PhaseConfig(length=32, batch=8, steps=4),),
    )  # fmt: skip
    config = configure("distill", **more)
    with killed_at(3):
        run_on(1, config, tmp_path / "run")
    (checkpoint,) = (gone / "checkpoints").iterdir()
    shutil.rmtree(checkpoint / "params")
    assert run_on(1, config, tmp_path / "run") == 0


def test_padding_has_what_means_nothing_and_the_rest_what_the_teacher_says(
    build, beginning, sections
):
    trainer, _ = build("distill", **sections(top_k=3))
    _, batch = beginning(trainer)
    counted = np.asarray(batch.rows.loss_weights) > 0
    assert batch.likeliest.shape == (*counted.shape, 3)
    np.testing.assert_allclose(np.exp(batch.logprobs[counted]).sum(-1), 1, rtol=1e-5)
    assert not np.asarray(batch.logprobs)[~counted].any()


# --- who may be a teacher -------------------------------------------------------------------------


def refused(build, sections, match, **more):
    with pytest.raises(UserError, match=match) as error:
        build("distill", **sections(**more))
    assert "\n" not in str(error.value)


def test_a_teacher_must_be_named(build, sections):
    refused(build, sections, "config.teacher.run is not given", teacher=TeacherConfig())


def test_a_teacher_that_is_not_there(build, sections, tmp_path):
    refused(build, sections, "nowhere", teacher=TeacherConfig(run=str(tmp_path / "nowhere")))


def test_a_reward_model_is_no_teacher(build, start, sections, pretrained):
    reward = start("reward", init_from=str(pretrained))
    refused(build, sections, "is a reward model", teacher=TeacherConfig(run=str(reward)))


def test_another_tokenizer_is_refused(build, start, sections, pretrained, tiny_config, run_on):
    other = pretrained.parent / "other_tokenizer"
    config = tiny_config(
        tokenizer=TokenizerConfig(vocab_size=300),
        model=SMALL,
        phases=(PhaseConfig(length=32, batch=8, steps=2),),
    )
    assert run_on(1, config, other) == 0
    refused(
        build, sections, "has another tokenizer than the student",
        teacher=TeacherConfig(run=str(other)), init_from=str(pretrained), model=ModelConfig(),
    )  # fmt: skip


def test_rows_longer_than_a_teacher_reads_are_refused(build, sections):
    longer = ModelConfig(**{**vars(SMALL), "max_length": 512})
    phases = (PhaseConfig(length=256, batch=8, steps=1),)
    refused(build, sections, "config.teacher.run=.*length 256", model=longer, phases=phases)


def test_a_number_of_tokens_below_one_is_refused(build, sections):
    refused(build, sections, "config.top_k=0 must be positive", top_k=0)


def test_a_teacher_that_has_changed_is_refused(
    sections, configure, run_on, teacher, killed_at, tmp_path, start
):
    mine = tmp_path / "teacher"
    shutil.copytree(teacher, mine)
    more = sections(
        teacher=TeacherConfig(run=str(mine)), checkpoint=CheckpointConfig(every=1),
        phases=(PhaseConfig(length=32, batch=8, steps=4),),
    )  # fmt: skip
    config = configure("distill", **more)
    with killed_at(3):
        run_on(1, config, tmp_path / "run")
    other = start("sft", phases=(PhaseConfig(length=32, batch=8, steps=12),))
    shutil.rmtree(mine / "checkpoints")
    shutil.copytree(Path(other) / "checkpoints", mine / "checkpoints")
    with pytest.raises(UserError, match="other weights than the teacher that this run began"):
        run_on(1, config, tmp_path / "run")
