"""Runs out of Hugging Face folders and back: tools.convert, and stages that start from a folder."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax import config as config_module
from llm_jax.data.chat_corpus import ChatDataConfig
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.preferences import PreferenceDataConfig
from llm_jax.data.prompts import PromptDataConfig
from llm_jax.errors import UserError
from llm_jax.interop.folder import is_published, open_folder
from llm_jax.interop.importer import import_folder
from llm_jax.interop.safetensors_files import TensorFolder
from llm_jax.interop.tokenizer_files import write_tokenizer
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.metrics import MetricsConfig
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.models.quantize import dequantise_all
from llm_jax.optim import OptimizerConfig
from llm_jax.rl.rewards import RewardTerm
from llm_jax.rl.rollouts import RolloutConfig
from llm_jax.runs import load_run
from llm_jax.stored import find
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.ppo import PPOConfig
from llm_jax.trainers.reward import RewardConfig
from llm_jax.trainers.sft import SFTConfig, SFTEvaluationConfig
from tools.convert.__main__ import main

FOLDERS = Path(__file__).parents[1] / "golden" / "families"


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def convert(*arguments):
    assert main(["tools.convert", *map(str, arguments)]) == 0


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def stored_tensors(folder):
    """Name → dtype and bytes."""
    files = folder.tensors
    return {
        name: (tensor.dtype, files.rows(name, 0, tensor.shape[0]).tobytes())
        for name, tensor in files.tensors.items()
    }


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "gpt_neox",
        "phi3",
        "mixtral",
        "gemma3_text",
        "llama_classifier",
        "llama_sharded_bf16",
    ],
)
@pytest.mark.parametrize("flags", [(), ("--scan_layers",)])
def test_there_and_back_again_is_bit_exact(name, flags, tmp_path, mesh):
    if flags and name == "gemma3_text":
        pytest.skip("seven layers are no multiple of its pattern")
    source = open_folder(FOLDERS / name)
    convert("import", f"--hf={FOLDERS / name}", f"--workdir={tmp_path / 'run'}", *flags)
    convert("export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'hf'}")
    exported = open_folder(tmp_path / "hf")
    assert stored_tensors(exported) == stored_tensors(source)
    assert exported.model == source.model and exported.heads == source.heads
    convert("import", f"--hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'again'}", *flags)
    same(*(find(str(tmp_path / run)).read(mesh) for run in ("run", "again")))
    if flags:
        assert find(str(tmp_path / "run")).model.scan_layers
    else:
        same(find(str(tmp_path / "run")).read(mesh), source.load(mesh))


def test_mups_factors_are_folded_into_what_is_exported(tmp_path, monkeypatch):
    convert("import", f"--hf={FOLDERS / 'llama'}", f"--workdir={tmp_path / 'run'}")
    convert("export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'plain'}")
    (meta,) = (tmp_path / "run").glob("checkpoints/*/meta/metadata")
    written = json.loads(meta.read_text())
    written["model"]["mup_base_width"] = written["model"]["embed_dim"] // 4
    meta.write_text(json.dumps(written))
    convert("export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'folded'}")
    plain, folded = (TensorFolder(tmp_path / name) for name in ("plain", "folded"))
    for name, tensor in plain.tensors.items():
        before, after = (folder.rows(name, 0, tensor.shape[0]) for folder in (plain, folded))
        np.testing.assert_array_equal(after, before / (4 if name == "model.norm.weight" else 1))
    assert open_folder(tmp_path / "folded").model == open_folder(tmp_path / "plain").model


def test_the_rest_of_config_json_comes_back(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(FOLDERS / "mistral", source)
    settings = json.loads((source / "config.json").read_text()) | {"my_note": "kept"}
    (source / "config.json").write_text(json.dumps(settings))
    convert("import", f"--hf={source}", f"--workdir={tmp_path / 'run'}")
    convert("export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'hf'}")
    settings["torch_dtype"] = settings.pop("dtype")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == settings


@pytest.mark.parametrize(
    ("name", "flag", "dtype"),
    [
        ("llama_sharded_bf16", None, "BF16"),
        ("llama_sharded_bf16", "float32", "F32"),
        ("llama", "bfloat16", "BF16"),
        ("llama", "float16", "F16"),
    ],
)
def test_the_dtype_is_that_of_the_source_or_the_one_asked_for(name, flag, dtype, tmp_path):
    convert("import", f"--hf={FOLDERS / name}", f"--workdir={tmp_path / 'run'}")
    asked = [] if flag is None else [f"--dtype={flag}"]
    convert("export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'hf'}", *asked)
    exported = open_folder(tmp_path / "hf")
    assert {tensor.dtype for tensor in exported.tensors.tensors.values()} == {dtype}
    written = json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"]
    assert written == {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}[dtype]


def test_large_exports_come_in_several_files(tmp_path, mesh):
    convert("import", f"--hf={FOLDERS / 'llama'}", f"--workdir={tmp_path / 'run'}")
    limit = 30_000 / 2**30
    convert("export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'hf'}",
            f"--max_file_gib={limit}")  # fmt: skip
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    same(open_folder(tmp_path / "hf").load(mesh), open_folder(FOLDERS / "llama").load(mesh))


# --- runs of ours ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_config, run_on, tmp_path_factory):
    """A run of two steps, with byte tokens."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    model = ModelConfig(
        embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=160, qk_norm="head"
    )
    phases = (PhaseConfig(length=32, batch=8, steps=2),)
    assert run_on(1, tiny_config(model=model, phases=phases), workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def published(trained):
    """That run as a Hugging Face folder."""
    folder = trained.parent / "published"
    convert("export", f"--workdir={trained}", f"--hf={folder}")
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"prompt": f"ask {i}", "completion": f"say {i % 3}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft(chats, model=None, **settings):
    return config_module.defaults(
        SFTConfig,
        model=model or ModelConfig(),
        data=ChatDataConfig(source=str(chats), validation_fraction=0.2),
        phases=(PhaseConfig(length=48, batch=8, steps=2),),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=0, schedule="constant"),
        evaluation=SFTEvaluationConfig(every=1000, rows=8, answers=0, at_start=False),
        metrics=MetricsConfig(every=1, tensorboard=False),
        sample=SampleConfig(max_new_tokens=0),
        **settings,
    )


def test_a_run_from_scratch_becomes_a_model_of_a_family(trained, published, mesh):
    folder = open_folder(published)
    assert folder.family.model_type == "qwen3"
    same(folder.load(mesh), load_run(str(trained)).params)
    assert is_published(published) and not is_published(trained)
    text = "Naïve café\n  def f(): pass"
    assert folder.tokenizer().encode(text) == load_run(str(trained)).tokenizer.encode(text)
    generation = json.loads((published / "generation_config.json").read_text())
    assert load_run(str(trained)).tokenizer.eos_id in np.atleast_1d(generation["eos_token_id"])


def test_a_folder_is_read_like_a_run(trained, published):
    folder, run = load_run(str(published)), load_run(str(trained))
    same(folder.params, run.params)
    assert folder.model.config.qk_norm == "head" and folder.path == published


def test_a_stage_starts_from_a_folder(published, trained, chats, run_on, tmp_path):
    settings = sft(chats, init_from_hf=str(published), init_from="runs/nowhere")
    assert run_on(1, settings, tmp_path / "sft") == 0
    run = load_run(str(tmp_path / "sft"))
    assert [stage["stage"] for stage in run.meta["lineage"]] == ["import"]
    assert run.meta["published"]["config"]["model_type"] == "qwen3"
    from_run = sft(chats, init_from=str(trained), model=ModelConfig())
    assert run_on(1, from_run, tmp_path / "other") == 0
    same(run.params, load_run(str(tmp_path / "other")).params)
    # It resumes from its own checkpoint, and goes back where it came from.
    assert run_on(1, settings, tmp_path / "sft") == 0
    convert("export", f"--workdir={tmp_path / 'sft'}", f"--hf={tmp_path / 'hf'}")
    assert open_folder(tmp_path / "hf").model == open_folder(published).model
    assert (tmp_path / "hf" / "chat_template.jinja").exists()


def test_adapters_on_a_folder_find_their_base_again(published, chats, run_on, tmp_path, mesh):
    model = ModelConfig(lora=LoraConfig(rank=2))
    for scan_layers in (False, True):
        workdir = tmp_path / f"scan_{scan_layers}"
        settings = sft(chats, init_from_hf=str(published), quantize_base="int8", model=model)
        settings.model.scan_layers = scan_layers
        assert run_on(1, settings, workdir) == 0
        stored = find(str(workdir))
        assert stored.model.scan_layers == scan_layers
        assert stored.meta["base"]["run"] == str(published)
        assert jax.tree.leaves(stored.read(mesh))
    convert("export", f"--workdir={workdir}", f"--hf={tmp_path / 'merged'}")
    exported = open_folder(tmp_path / "merged").load(mesh)
    before = open_folder(published).load(mesh)
    kernel = ("layer_0", "mlp", "down", "kernel")
    new, old = (leaf_of(tree, kernel) for tree in (exported, before))
    assert np.abs(new - old).max() > 0
    merged = dequantise_all(stored.read_merged(mesh)[0])
    same(open_folder(tmp_path / "merged", scan_layers=True).load(mesh), merged)


def test_peft_adapters_come_and_go(tmp_path, mesh):
    golden = FOLDERS.parent / "peft" / "llama_lora"
    convert("import", f"--hf={FOLDERS / 'llama'}", f"--workdir={tmp_path / 'base'}")
    convert("import", f"--hf={golden}", f"--base={tmp_path / 'base'}",
            f"--workdir={tmp_path / 'run'}")  # fmt: skip
    stored = find(str(tmp_path / "run"))
    assert stored.model.lora.rank == 4 and stored.heads == ()
    assert [stage["run"] for stage in stored.meta["lineage"]] == [str(tmp_path / "base")]
    convert("export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'back'}", "--adapters")
    tensors = (
        TensorFolder(folder / "adapter_model.safetensors") for folder in (golden, tmp_path / "back")
    )
    first, second = ({n: t.rows(n, 0, x.shape[0]) for n, x in t.tensors.items()} for t in tensors)
    same(first, second)
    settings = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(FOLDERS / "llama")
    # Folded in, they give peft's logits.
    convert("export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'merged'}")
    expected, inputs = np.load(golden / "expected.npz"), np.load(FOLDERS / "llama" / "expected.npz")
    run = load_run(str(tmp_path / "merged"))
    names = ("input_ids", "position_ids", "attention_mask")
    with jax.default_matmul_precision("highest"):
        hidden, _ = run.model.apply(run.params, *(inputs[name] for name in names))
        logits = np.asarray(run.model.logits(run.params, hidden))
    real = inputs["attention_mask"] > 0
    np.testing.assert_allclose(logits[real], expected["logits"][real], atol=1e-4, rtol=0)


def test_adapters_of_a_reward_model_take_its_head_along(tmp_path, mesh, published, run_on):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"ask {i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(20)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config_module.defaults(
        RewardConfig,
        init_from_hf=str(published),
        model=ModelConfig(lora=LoraConfig(rank=2)),
        data=PreferenceDataConfig(source=str(pairs), validation_fraction=0.2),
        phases=(PhaseConfig(length=48, batch=4, steps=2),),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=0, schedule="constant"),
        metrics=MetricsConfig(every=1, tensorboard=False),
        sample=SampleConfig(max_new_tokens=0),
    )
    assert run_on(1, settings, tmp_path / "reward") == 0
    stored = find(str(tmp_path / "reward"))
    convert("export", f"--workdir={tmp_path / 'reward'}", f"--hf={tmp_path / 'peft'}", "--adapters")
    convert("import", f"--hf={tmp_path / 'peft'}", f"--base={published}",
            f"--workdir={tmp_path / 'back'}")  # fmt: skip
    back = find(str(tmp_path / "back"))
    assert back.heads == ("reward_head",)
    same(back.read(mesh), stored.read(mesh))
    assert stored.template is not None and back.template is not None
    # Whole, it is a classifier.
    convert("export", f"--workdir={tmp_path / 'reward'}", f"--hf={tmp_path / 'whole'}")
    whole = open_folder(tmp_path / "whole")
    assert whole.config["architectures"] == ["Qwen3ForSequenceClassification"]
    merged, _ = stored.read_merged(mesh)
    same(whole.load(mesh)["reward_head"], merged["reward_head"])


def test_the_head_of_a_critic_stays_here(tmp_path, trained, chats, run_on):
    settings = config_module.defaults(
        PPOConfig,
        init_from=str(trained),
        data=PromptDataConfig(source=str(chats), validation_fraction=0.2),
        rewards=(RewardTerm("length"),),
        rollout=RolloutConfig(samples=2, max_new_tokens=4),
        phases=(PhaseConfig(length=48, batch=4, steps=1),),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=0, schedule="constant"),
        metrics=MetricsConfig(every=1, tensorboard=False),
        sample=SampleConfig(max_new_tokens=0),
    )
    assert run_on(1, settings, tmp_path / "ppo") == 0
    assert find(str(tmp_path / "ppo")).heads == ("value_head",)
    convert("export", f"--workdir={tmp_path / 'ppo'}", f"--hf={tmp_path / 'hf'}")
    assert open_folder(tmp_path / "hf").heads == ()


def leaf_of(tree, path):
    for name in path:
        tree = tree[name]
    return np.asarray(tree)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "--hf=x"], "--hf=DIR and --workdir=RUN are both needed"),
        (["import", "--hf={here}/nowhere", "--workdir={here}/new"], "is no folder"),
        (["import", "--hf={golden}", "--workdir={here}/full"], "is there already"),
        (["import", "--hf={golden}", "--workdir={here}/new", "--base=x"], "--base is for PEFT"),
        (["export", "--workdir={here}/full", "--hf={here}/new"], "no run directory"),
        (["export", "--workdir={golden}", "--hf={here}/full"], "is there already"),
        (["export", "--workdir={golden}", "--hf={here}/new", "--adapters"], "has no adapters"),
        (["export", "--workdir=x", "--hf=y", "--dtype=int8"], "dtype"),
        (["imprt"], "Did you mean 'import'"),
        (["plan"], "--preset=NAME or by --hf=DIR"),
        (["plan", "--preset=gpt3"], "--preset=gpt3 is unknown"),
        (["plan", "--preset=gpt2", "--mesh=row=3"], "'row=3' is not understood"),
        (["plan", "--preset=gpt2", "--mesh=tensor=5"], "do not divide"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    places = {"here": tmp_path, "golden": FOLDERS / "llama"}
    assert main(["tools.convert", *(a.format(**places) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_plan_needs_neither_weights_nor_devices(capsys):
    convert("plan", f"--hf={FOLDERS / 'llama'}", "--mesh=fsdp=2")
    shown = capsys.readouterr().out
    assert "on 2 chips (fsdp 2)" in shown and "layers/block_0/mlp/down/kernel" in shown


@pytest.fixture
def mismatched(trained, tmp_path):
    """A folder whose tokenizer has more tokens than its model has rows."""
    folder = tmp_path / "mismatched"
    shutil.copytree(FOLDERS / "llama", folder)
    write_tokenizer(load_run(str(trained)).tokenizer, None, folder)
    return folder


def test_a_tokenizer_larger_than_the_table_is_refused(mismatched, chats, run_on, tmp_path):
    with pytest.raises(UserError, match="has 264 tokens and the model's table 97 rows"):
        import_folder(mismatched, tmp_path / "run", print)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="has 264 tokens and the model's table 97 rows"):
        run_on(1, sft(chats, init_from_hf=str(mismatched)), tmp_path / "run")


def test_a_folder_that_cannot_be_read_whole_leaves_no_run(published, tmp_path, capsys):
    folder = tmp_path / "folder"
    shutil.copytree(published, folder)
    (folder / "chat_template.jinja").write_text("{% if %}")
    assert main(["tools.convert", "import", f"--hf={folder}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_all_ends_of_generations_are_kept(published, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(published, folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [257, 5]}
    (folder / "config.json").write_text(json.dumps(config))
    convert("import", f"--hf={folder}", f"--workdir={tmp_path / 'run'}")
    assert set(load_run(str(tmp_path / "run")).tokenizer.eos_ids) >= {257, 5}
    convert("export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'hf'}")
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert set(written["eos_token_id"]) >= {257, 5}


def test_a_plan_of_layers_that_no_pattern_divides(capsys):
    convert("plan", f"--hf={FOLDERS / 'gemma3_text'}", "--mesh=fsdp=1")
    assert "layer_*/mlp/down/kernel" in capsys.readouterr().out
