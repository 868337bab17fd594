"""What a compiled program does, told from its text, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.mesh import MESH_AXES, MeshConfig, make_mesh
from llm_jax.scaling import hlo, program
from llm_jax.scaling.program import Collective

MESH = {"stage": 1, "data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}


def module_of(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def entry(*lines, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(f"HloModule m\n\n{before}\nENTRY %main (x: f32[2]) -> f32[2] {{\n{body}\n}}\n")


# --- arithmetic -----------------------------------------------------------------------------------


def test_products_in_loops_count_as_often_as_they_run():
    def function(x, stacked):
        def outer(x, kernel):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ kernel), x), None

        return jax.lax.scan(outer, x, stacked)[0]

    module = module_of(function, (8, 32), (5, 32, 32))
    assert program.matrix_flops(module) == 5 * 3 * 2 * 8 * 32 * 32


@pytest.mark.parametrize("body, turns", [
    (["%one = s32[] constant(1)", "%next = s32[] add(%i, %one)"], 16),
    (["%two = s32[] constant(2)", "%next = s32[] add(%i, %two)"], 8),  # unrolled
    (["%one = s32[] constant(1)", "%half = s32[] add(%i, %one)", "%three = s32[] constant(3)",
      "%next = s32[] add(%half, %three)"], 4),
])  # fmt: skip
def test_turns_of_a_loop(body, turns):
    lines = "\n".join(f"  {line}" for line in body)
    before = f"""
%condition (p: (s32[], f32[4,4])) -> pred[] {{
  %p = (s32[], f32[4,4]) parameter(0)
  %c = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(17)
  ROOT %less = pred[] compare(%c, %limit), direction=LT
}}

%body (q: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {{
  %q = (s32[], f32[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %m = f32[4,4]{{1,0}} get-tuple-element(%q), index=1
{lines}
  %square = f32[4,4]{{1,0}} dot(%m, %m), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %both = (s32[], f32[4,4]) tuple(%next, %square)
}}
"""
    module = entry(
        "%start = s32[] constant(1)",
        "%x = f32[4,4]{1,0} parameter(0)",
        "%first = (s32[], f32[4,4]) tuple(%start, %x)",
        "ROOT %loop = (s32[], f32[4,4]) while(%first), condition=%condition, body=%body",
        before=before,
    )
    assert program.matrix_flops(module) == turns * 2 * 4**3


@pytest.mark.parametrize("attributes, left, right, result, products", [
    ("dim_labels=bf_io->bf", "f32[6,8]", "f32[8,10]", "f32[6,10]", 6 * 8 * 10),
    # 5 results of a window of 3 over 5 places with a place of padding at each end: 13 meet one.
    ("window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", "f32[2,5,7]", "f32[3,7,4]", "f32[2,5,4]",
     2 * 13 * 7 * 4),
    ("window={size=2 stride=2}, dim_labels=b0f_0io->b0f", "f32[1,6,3]", "f32[2,3,5]", "f32[1,3,5]",
     6 * 3 * 5),
    # A batched product as XLA lays it out: of the pairs of 4 results and 4 places, 4 meet.
    ("window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=b0f_0io->b0f", "f32[2,1,3]", "f32[4,3,5]",
     "f32[2,4,5]", 2 * 4 * 3 * 5),
])  # fmt: skip
def test_products_as_convolutions(attributes, left, right, result, products):
    module = entry(
        f"%a = {left} parameter(0)",
        f"%b = {right} parameter(1)",
        f"ROOT %y = {result} convolution(%a, %b), {attributes}",
    )
    assert program.matrix_flops(module) == 2 * products


def test_convolutions_agree_with_those_of_jax():
    """XLA's own count, for a convolution without padding."""

    def function(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID")

    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 3, 9, 9), (4, 3, 3, 3))]
    compiled = jax.jit(function).lower(*arguments).compile()
    assert program.matrix_flops(hlo.parse(compiled.as_text())) in (
        compiled.cost_analysis()["flops"],
        0,  # where the CPU calls a library
    )
    assert compiled.cost_analysis()["flops"] == 2 * 2 * 4 * 7 * 7 * 27


# --- exchanges ------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups, axes", [
    ("{{0,1,2,3},{4,5,6,7}}", ("fsdp",)),
    ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
    ("[2,4]<=[8]", ("fsdp",)),
    ("[4,2]<=[2,4]T(1,0)", ("data",)),
    ("[1,8]<=[8]", ("data", "fsdp")),
    ("mesh['a'=2,'b'=4] {'b'}", ("fsdp",)),
    ("mesh['a'=2,'b'=4] {'a'}", ("data",)),
    ("mesh['a'=8] {'a'}", ("data", "fsdp")),
])  # fmt: skip
def test_groups_of_devices_are_told_by_mesh_axes(groups, axes):
    module = entry(
        "%x = f32[16]{0} parameter(0)",
        f"ROOT %y = f32[16]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%sum",
    )
    (found,) = program.collectives(module, MESH)
    assert found.axes == axes


@pytest.mark.parametrize("kind, result, sent", [
    ("all-gather", "f32[64]", 3 * 64),
    ("all-reduce", "f32[16]", 2 * 64 * 3 / 4),
    ("reduce-scatter", "f32[4]", 64 * 3 / 4),
    ("all-to-all", "f32[16]", 64 * 3 / 4),
])  # fmt: skip
def test_bytes_that_a_device_sends(kind, result, sent):
    """Of 64 bytes held by each of four devices, round a ring."""
    module = entry(
        "%x = f32[16]{0} parameter(0)",
        f"ROOT %y = {result}{{0}} {kind}(%x), replica_groups=[2,4]<=[8], dimensions={{0}}",
    )
    assert program.collectives(module, MESH) == (Collective(kind, ("fsdp",), 1.0, sent),)


def test_a_permutation_sends_what_it_holds():
    module = entry(
        "%x = f32[16]{0} parameter(0)",
        "%go = (f32[16]{0}, f32[16]{0}) collective-permute-start(%x), "
        "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
        "ROOT %y = f32[16]{0} collective-permute-done(%go)",
    )
    assert program.collectives(module, MESH) == (
        Collective("collective-permute", ("fsdp",), 1.0, 64.0),
    )


SPREAD = """
%go (p: f32[16]) -> (f32[16], f32[64], u32[]) {
  %p = f32[16]{0} parameter(0)
  %g = f32[64]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %c = (f32[16]{0}, f32[64]{0}, u32[]{:S(2)}) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}

%on (p: f32[16], q: f32[64], s: u32[], x: f32[8]) -> (f32[8], f32[16], f32[64], u32[]) {
  %p = f32[16]{0} parameter(0)
  %q = f32[64]{0} parameter(1)
  %s = u32[]{:S(2)} parameter(2)
  %x = f32[8]{0} parameter(3)
  %n = f32[8]{0} negate(%x)
  %g = f32[64]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (f32[8]{0}, f32[16]{0}, f32[64]{0}, u32[]{:S(2)}) tuple(%n, %p, %g, %s)
}

%end (p: f32[16], q: f32[64], s: u32[]) -> f32[64] {
  %p = f32[16]{0} parameter(0)
  %q = f32[64]{0} parameter(1)
  %s = u32[]{:S(2)} parameter(2)
  %g = f32[64]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %c = f32[64]{0} custom-call(%p, %q, %g, %s), custom_call_target="AsyncCollectiveDone"
}
"""


def test_an_exchange_that_goes_on_while_fusions_compute_is_one():
    """It sends 3 x 64 bytes, and 64 are read and 256 written; beside it 32 are read and written."""
    handed = "(f32[16]{0}, f32[64]{0}, u32[]{:S(2)})"
    module = entry(
        "%x = f32[16]{0} parameter(0)",
        "%y = f32[8]{0} parameter(1)",
        f"%a = {handed} fusion(%x), kind=kCustom, calls=%go",
        *(f"%a.{i} = {t} get-tuple-element(%a), index={i}"
          for i, t in enumerate(("f32[16]{0}", "f32[64]{0}", "u32[]{:S(2)}"))),
        "%b = (f32[8]{0}, f32[16]{0}, f32[64]{0}, u32[]{:S(2)}) fusion(%a.0, %a.1, %a.2, %y), "
        "kind=kOutput, calls=%on",
        *(f"%b.{i} = {t} get-tuple-element(%b), index={i}"
          for i, t in enumerate(("f32[8]{0}", "f32[16]{0}", "f32[64]{0}", "u32[]{:S(2)}"))),
        "ROOT %c = f32[64]{0} fusion(%b.1, %b.2, %b.3), kind=kCustom, calls=%end",
        before=SPREAD,
    )  # fmt: skip
    assert program.collectives(module, MESH) == (
        Collective("all-gather", ("fsdp",), 1.0, 3 * 64.0),
    )
    assert program.memory_traffic(module) == (64 + 256) + (32 + 32)


def test_exchanges_of_a_program_of_jax():
    """What is summed over lies on both axes: its parts are reduced over them, in every turn."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    assert tuple(mesh.shape) == MESH_AXES
    where = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
    x, y = (jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=where) for _ in range(2))

    def function(x, y):
        return jax.lax.fori_loop(0, 6, lambda _, t: t + jnp.sum(x * jnp.tanh(y * t)), 0.0)

    module = hlo.parse(jax.jit(function).lower(x, y).compile().as_text())
    found = program.collectives(module, dict(mesh.shape))
    assert {c.kind for c in found} == {"all-reduce"}
    assert {axis for c in found for axis in c.axes} == {"data", "fsdp"}
    assert all(c.count == 6 for c in found)


# --- memory ---------------------------------------------------------------------------------------


def test_traffic_of_slices_is_that_of_the_slices():
    before = """
%inside (p: f32[10,8], i: s32[]) -> f32[1,8] {
  %p = f32[10,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
}
"""
    module = entry(
        "%x = f32[10,8]{1,0} parameter(0)",
        "%n = s32[] parameter(1)",
        "%row = f32[1,8]{1,0} fusion(%x, %n), kind=kLoop, calls=%inside",
        "ROOT %y = f32[1,8]{1,0} negate(%row)",
        before=before,
    )
    assert program.memory_traffic(module) == (32 + 4 + 32) + (32 + 32)


def test_what_stays_on_the_core_is_no_traffic():
    module = entry(
        "%x = f32[256]{0} parameter(0)",
        "%held = f32[256]{0:T(128)S(1)} negate(%x)",
        "ROOT %y = f32[256]{0} negate(%held)",
    )
    assert program.memory_traffic(module) == 2 * 1024


def test_sums_of_an_elementwise_program():
    module = module_of(lambda x, y: x + y, (1024,), (1024,))
    assert program.memory_traffic(module) == 3 * 4096


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.parse("HloModule nothing\n")


def test_arrays_have_the_bytes_of_their_dtypes():
    bits = {name: hlo.Array(name, (16,)).bytes for name in ("bf16", "f32", "s8", "pred", "s4")}
    assert bits == {"bf16": 32, "f32": 64, "s8": 16, "pred": 16, "s4": 8}
    assert np.isclose(hlo.Array("f32", ()).bytes, 4)
