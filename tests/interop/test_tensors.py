"""Tensors in and out: every kind of correspondence, any sharding, bit for bit, and bad folders."""

import json
import math
import os
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import checkpoint
from llm_jax.errors import UserError
from llm_jax.interop import tensors as tensors_module
from llm_jax.interop.floats import narrow, widen
from llm_jax.interop.pieces import Leaf, Piece
from llm_jax.interop.safetensors_files import TensorFolder
from llm_jax.interop.tensors import check, deferred, load, tensor_shapes, write
from llm_jax.mesh import MeshConfig, make_mesh

SIZES = {"L": 4, "V": 12, "D": 8, "K": 2, "G": 2, "H": 4, "F": 3, "M": 6, "E": 2}
L, V, D, K, G, H, F, M, E = SIZES.values()
DTYPES = [np.float32, np.float16, jnp.bfloat16]


def piece(tensor, factors, axes, start, rows=None):
    """`factors` and `axes` are spelled like "KGH D" and "1DKGH"."""
    return Piece(tensor, tuple(map(tuple, factors.split())), tuple(axes), SIZES, start, rows)


def make_leaves():
    """A matrix as it is; stacked norms; queries, keys and values in three tensors, in one after one
    another, and interleaved in one, both ways round; and experts."""
    separate, fused, experts = [], [], []
    ends = {"q": (0, K * G * H), "k": (K * G * H, K * (G + 1) * H)}
    ends["v"] = (ends["k"][1], K * (G + 2) * H)
    for i in range(L):
        for name, factors, axes, place in (
            ("q", "KGH D", "1DKGH", 0), ("k", "KH D", "1DK1H", G), ("v", "KH D", "1DK1H", G + 1),
        ):  # fmt: skip
            start = (i, 0, 0, place, 0)
            separate.append(piece(f"layers.{i}.{name}.weight", factors, axes, start))
            fused.append(piece(f"layers.{i}.qkv.weight", factors, axes, start, ends[name]))
        experts += [piece(f"layers.{i}.expert.{e}.weight", "M D", "11DM", (i, e, 0, 0))
                    for e in range(E)]  # fmt: skip
    each = [(i, (i, 0, 0, 0, 0)) for i in range(L)]
    return (
        Leaf(("embedding",), (V, D), (piece("embed.weight", "V D", "VD", (0, 0)),)),
        Leaf(("layers", "norm"), (L, D), tuple(
            piece(f"layers.{i}.norm.weight", "D", "1D", (i, 0)) for i in range(L))),
        Leaf(("layers", "separate"), (L, D, K, G + 2, H), tuple(separate)),
        Leaf(("layers", "fused"), (L, D, K, G + 2, H), tuple(fused)),
        Leaf(("layers", "interleaved"), (L, D, K, F, H), tuple(
            piece(f"layers.{i}.interleaved.weight", "KFH D", "1DKFH", start) for i, start in each)),
        Leaf(("layers", "conv"), (L, D, K, F, H), tuple(
            piece(f"layers.{i}.conv.weight", "D FKH", "1DKFH", start) for i, start in each)),
        Leaf(("layers", "experts"), (L, E, D, M), tuple(experts)),
    )  # fmt: skip


LEAVES = make_leaves()


def make_params(tensors):
    """The same correspondence, written as reshapes of whole tensors."""

    def stack(name, turn):
        return np.stack([turn(widen(tensors[f"layers.{i}.{name}.weight"])) for i in range(L)])

    def group(q, k, v):
        heads = (q.reshape(K, G, H, D), k.reshape(K, 1, H, D), v.reshape(K, 1, H, D))
        return np.concatenate(heads, axis=1).transpose(3, 0, 1, 2)

    q, k, v = (stack(name, lambda x: x) for name in "qkv")
    return {
        "embedding": widen(tensors["embed.weight"]),
        "layers": {
            "norm": stack("norm", lambda x: x),
            "separate": np.stack([group(q[i], k[i], v[i]) for i in range(L)]),
            "fused": stack("qkv", lambda x: group(*np.split(x, [K * G * H, K * (G + 1) * H]))),
            "interleaved": stack(
                "interleaved", lambda x: x.reshape(K, F, H, D).transpose(3, 0, 1, 2)
            ),
            "conv": stack("conv", lambda x: x.reshape(D, F, K, H).transpose(0, 2, 1, 3)),
            "experts": np.stack(
                [stack(f"expert.{e}", lambda x: x.T) for e in range(E)], axis=1
            ),
        },
    }  # fmt: skip


def make_tensors(dtype):
    """Random bits: NaNs with payloads, infinities, denormals and negative zeros among them."""
    random = np.random.default_rng(0)
    dtype = np.dtype(dtype)
    return {
        name: np.frombuffer(random.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
        for name, shape in tensor_shapes(LEAVES).items()
    }


def save(folder, tensors, files=1):
    """With the library: one file, or several and an index."""
    folder.mkdir(exist_ok=True)
    if files == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(files):
        name = f"part{number}.safetensors"
        held = sorted(tensors)[number::files]
        safetensors.numpy.save_file({n: tensors[n] for n in held}, folder / name)
        weight_map |= dict.fromkeys(held, name)
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def read_back(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


SPECS = {
    "embedding": ("tensor", "fsdp"),
    "layers": {
        "norm": (None, "fsdp"),
        "separate": (None, "fsdp", "tensor"),
        "fused": (None, None, "tensor", None, "fsdp"),
        "interleaved": (None, "fsdp", None, None, "tensor"),
        "conv": (None, "tensor", "fsdp"),
        "experts": ("fsdp", "tensor"),
    },
}


def make_abstract(specs=SPECS):
    """On 8 devices in a mesh of data 2, fsdp 2, tensor 2."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shapes = {leaf.path: leaf.shape for leaf in LEAVES}
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: jax.ShapeDtypeStruct(
            shapes[tuple(key.key for key in path)],
            jnp.float32,
            sharding=NamedSharding(mesh, PartitionSpec(*spec)),
        ),
        specs,
        is_leaf=lambda x: isinstance(x, tuple),
    )


REPLICATED = jax.tree.map(lambda _: (), SPECS, is_leaf=lambda x: isinstance(x, tuple))


def assert_same_bits(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == wanted.dtype and leaf.shape == wanted.shape
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes()


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 300, 2**22])
@pytest.mark.parametrize("specs", [SPECS, REPLICATED], ids=["sharded", "replicated"])
def test_leaves_are_loaded_into_their_shardings(tmp_path, monkeypatch, specs, block_bytes):
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", block_bytes)
    tensors = make_tensors(np.float32)
    folder = TensorFolder(save(tmp_path, tensors, files=3))
    check(folder, LEAVES)
    abstract = make_abstract(specs)
    params = load(folder, LEAVES, abstract)
    assert_same_bits(params, make_params(tensors))
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(
        lambda x: x.sharding, abstract
    )


def test_no_more_is_read_than_the_rows_of_a_shard(tmp_path, monkeypatch):
    folder = TensorFolder(save(tmp_path, make_tensors(np.float32)))
    read = []
    rows = TensorFolder.rows
    monkeypatch.setattr(
        TensorFolder, "rows", lambda self, *cut: read.append(cut) or rows(self, *cut)
    )
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", 4 * D * H)
    fused = next(leaf for leaf in LEAVES if leaf.path[-1] == "fused")
    box = ((2, 3), (0, D), (1, 2), (0, G + 1), (0, H))  # layer 2, second head: queries and keys
    part = tensors_module.read(folder, fused, box)
    assert part.ctypes.data % 64 == 0  # what a CPU device asks of memory that it takes as it is
    name, keys = "layers.2.qkv.weight", K * G * H
    assert read == [(name, 8, 12), (name, 12, 16), (name, keys + H, keys + 2 * H)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_bytes", [1, 300, 2**22])
def test_what_is_read_is_written_bit_for_bit(tmp_path, monkeypatch, dtype, block_bytes):
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", block_bytes)
    tensors = make_tensors(dtype)
    params = load(TensorFolder(save(tmp_path / "in", tensors)), LEAVES, make_abstract())
    write(tmp_path / "out", LEAVES, params, dtype)
    assert_same_bits(read_back(tmp_path / "out"), tensors)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_large_checkpoint_is_several_files_and_an_index(tmp_path):
    tensors = make_tensors(np.float32)
    params = jax.tree.map(jnp.asarray, make_params(tensors))
    write(tmp_path, LEAVES, params, np.float32, max_shard_bytes=2000)
    assert_same_bits(read_back(tmp_path), tensors)
    files = sorted(tmp_path.glob("*.safetensors"))
    for number, file in enumerate(files, start=1):
        assert file.name == f"model-{number:05}-of-{len(files):05}.safetensors"
        with safetensors.safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert sum(4 * opened.get_tensor(name).size for name in opened.keys()) <= 2000  # noqa: SIM118
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert_same_bits(load(TensorFolder(tmp_path), LEAVES, make_abstract()), make_params(tensors))


def test_a_checkpoint_is_streamed_into_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_module, "PART_BYTES", 100)
    tensors = make_tensors(jnp.bfloat16)
    tree = deferred(TensorFolder(save(tmp_path / "hf", tensors)), LEAVES)
    assert max(4 * math.prod(leaf.part) for leaf in jax.tree.leaves(tree)) <= 4 * D * H
    checkpoint.write_streamed(tmp_path / "run", 0, tree, {"stage": "import"})
    params = checkpoint.read_params(tmp_path / "run", 0, make_abstract())
    assert_same_bits(params, make_params(tensors))
    assert checkpoint.read_meta(tmp_path / "run", 0) == {"stage": "import"}


def test_a_large_model_is_streamed_in_few_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_module, "PART_BYTES", 1)
    folder = TensorFolder(save(tmp_path, make_tensors(np.float32)))
    parts = sum(len(list(leaf.boxes())) for leaf in jax.tree.leaves(deferred(folder, LEAVES)))
    monkeypatch.setattr(tensors_module, "MAX_PARTS", 16)
    fewer = sum(len(list(leaf.boxes())) for leaf in jax.tree.leaves(deferred(folder, LEAVES)))
    assert fewer < 40 < parts


# --- casts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_narrow_floats_survive_float32(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    assert narrow(widen(every), np.dtype(dtype)).tobytes() == every.tobytes()
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(widen(every), every.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_float32_is_rounded_as_numpy_rounds_it_and_a_nan_stays_one(dtype):
    bits = np.random.default_rng(0).integers(0, 2**32, 10_000, np.uint32)
    bits[:2] = 0x7F800001, 0xFF800001  # their payload stands in the low bits alone
    values = bits.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded, expected = narrow(values, np.dtype(dtype)), values.astype(dtype)
        np.testing.assert_array_equal(rounded.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("dtype, value", [(np.float16, 65_520.0), (jnp.bfloat16, 3.4e38)])
def test_a_value_that_does_not_fit_the_dtype_is_refused(tmp_path, dtype, value):
    params = jax.tree.map(jnp.zeros_like, make_params(make_tensors(np.float32)))
    params["layers"]["norm"] = params["layers"]["norm"].at[1, 2].set(value).at[1, 3].set(jnp.nan)
    with pytest.raises(UserError, match=r"layers\.1\.norm\.weight has values up to .* float32"):
        write(tmp_path / "out", LEAVES, params, dtype, max_shard_bytes=1000)
    assert list((tmp_path / "out").iterdir()) == []
    infinite = jax.tree.map(lambda x: x * jnp.inf, params)
    write(tmp_path / "out", LEAVES, infinite, dtype)


def test_weights_that_exist_are_not_overwritten(tmp_path):
    save(tmp_path, {"x": np.zeros(1, np.float32)})
    params = jax.tree.map(jnp.asarray, make_params(make_tensors(np.float32)))
    with pytest.raises(
        UserError, match=r"model\.safetensors exists: give a folder without weights"
    ):
        write(tmp_path, LEAVES, params, np.float32)


def test_parameters_that_other_processes_hold_are_not_exported(tmp_path):
    leaf = Leaf(("x",), (D,), (piece("x", "D", "D", (0,)),))
    elsewhere = mock.Mock(is_fully_addressable=False)
    with pytest.raises(UserError, match="export with one"):
        write(tmp_path, [leaf], {"x": elsewhere}, np.float32)


# --- bad folders ----------------------------------------------------------------------------------


def test_a_tensor_that_is_missing_left_over_or_of_another_shape_is_named(tmp_path):
    tensors = make_tensors(np.float32)
    extra = {"rotary.inv_freq": np.zeros((2, 3), np.float32), "a.masked": np.ones(2, bool)}
    folder = TensorFolder(save(tmp_path / "extra", {**tensors, **extra}))
    check(folder, LEAVES, [r".*\.inv_freq", r"a\.masked"])
    with pytest.raises(UserError, match=r"holds the tensor rotary\.inv_freq \[2, 3\], for which"):
        check(folder, LEAVES, [r"inv_freq", r"a\.masked"])
    with pytest.raises(UserError, match=r"holds the tensor .* has no place \(and 1 more\): "):
        check(folder, LEAVES)

    fewer = {name: x for name, x in tensors.items() if ".norm." not in name}
    with pytest.raises(
        UserError, match=rf"lacks the tensor layers\.0\.norm\.weight \[{D}\] \(and 3 more\): "
    ):
        check(TensorFolder(save(tmp_path / "fewer", fewer)), LEAVES)

    other = {**tensors, "embed.weight": np.zeros((V + 1, D), np.float32)}
    with pytest.raises(UserError, match=rf"embed\.weight in .* is \[13, {D}\], .* \[{V}, {D}\]: "):
        check(TensorFolder(save(tmp_path / "other", other)), LEAVES)

    whole = {**tensors, "embed.weight": np.zeros((V, D), np.int8)}
    with pytest.raises(UserError, match=r"embed\.weight in .* is stored as I8, and only F32, F16"):
        check(TensorFolder(save(tmp_path / "whole", whole)), LEAVES)


def truncate(folder):
    os.truncate(folder / "part1.safetensors", (folder / "part1.safetensors").stat().st_size - 1)


def truncate_header(folder):
    os.truncate(folder / "part1.safetensors", 40)


def scramble_header(folder):
    path = folder / "part1.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape"', b'"shipe"', 1))


def misstate_a_shape(folder):
    path = folder / "part1.safetensors"
    path.write_bytes(re.sub(rb'("shape":\[)\d', rb"\g<1>9", path.read_bytes(), count=1))


def delete_a_file(folder):
    (folder / "part1.safetensors").unlink()


def damage_the_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 1}')


def move_a_tensor(folder):
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("part1", "part0", 1))


def delete_the_index_and_repeat_a_file(folder):
    (folder / "model.safetensors.index.json").unlink()
    (folder / "part3.safetensors").write_bytes((folder / "part1.safetensors").read_bytes())


def leave_torch_alone(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "pytorch_model.bin").touch()


def leave_nothing(folder):
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize("damage, message", [
    (truncate, r"part1\.safetensors has [\d,]+ bytes, and its header speaks of"),
    (truncate_header, r"part1\.safetensors is cut short"),
    (scramble_header, r"part1\.safetensors has a damaged header \('shape'\)"),
    (misstate_a_shape, r"part1\.safetensors has a damaged header \(layers.* has \d+ bytes\)"),
    (delete_a_file, r"index\.json names part1\.safetensors, which is not there"),
    (damage_the_index, r"index\.json has no readable weight_map"),
    (move_a_tensor, r"index\.json says that part0\.safetensors holds the tensor .* it does not"),
    (delete_the_index_and_repeat_a_file, r"part3.* and .*part1.* both hold the tensor"),
    (leave_torch_alone, r"pytorch_model\.bin, which only torch reads: convert"),
    (leave_nothing, r"holds no \*\.safetensors file"),
])  # fmt: skip
def test_a_damaged_folder_is_refused(tmp_path, damage, message):
    folder = save(tmp_path / "hf", make_tensors(np.float32), files=3)
    TensorFolder(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        TensorFolder(folder)
    assert "\n" not in str(caught.value)


def test_files_without_an_index_are_all_read(tmp_path):
    tensors = make_tensors(np.float32)
    folder = save(tmp_path, tensors, files=3)
    (folder / "model.safetensors.index.json").unlink()
    check(TensorFolder(folder), LEAVES)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    folder = TensorFolder(save(tmp_path, make_tensors(np.float32)))
    last = max(folder.tensors, key=lambda name: folder.tensors[name].begin)
    os.truncate(tmp_path / "model.safetensors", folder.tensors[last].begin + 4)
    with pytest.raises(UserError, match=r"model\.safetensors ends within the tensor"):
        folder.rows(last, 0, folder.tensors[last].shape[0])
