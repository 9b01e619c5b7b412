"""Layouts say what each rank of a mesh holds; what they don't say clearly is refused with the remedy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt.state.dtensor import lower
from ckpt_formats.errors import LayoutError
from ckpt_formats.geometry import Box, check_cover
from ckpt_formats.layout import Layout, Mesh, boxes, cut_words

TENSORS = {
    "model.layers.0.qkv.weight": (12, 4),
    "model.layers.1.qkv.weight": (12, 4),
    "model.layers.0.out.weight": (4, 4),
    "model.norm.weight": (4,),
    "optimizer.state.layers.0.out.weight.exp_avg": (4, 4),
    "optimizer.state.layers.0.out.weight.row": (4,),
    "optimizer.state.layers.0.out.weight.step": (),
}
OWNERS = {name: "model.layers.0.out.weight" for name in TENSORS if name.startswith("optimizer.")}
TP = """
[tp]
"model.*.qkv.weight" = 0
"model.*.out.weight" = 1
"""


# --- meshes


def test_ranks_are_counted_along_the_last_axis_first():
    mesh = Mesh.parse("dp=2, tp=3")
    assert (mesh.names, mesh.shape, mesh.size, str(mesh)) == (("dp", "tp"), (2, 3), 6, "dp=2,tp=3")
    assert [mesh.coordinate(rank) for rank in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    with pytest.raises(ValueError, match="no rank 6"):
        mesh.coordinate(6)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "'' in the mesh '' is not an axis"),
        ("dp", "'dp' in the mesh"),
        ("dp=2,", "'' in the mesh"),
        ("dp=2;tp=4", "'dp=2;tp=4' in the mesh"),
        ("dp=-1", "'dp=-1' in the mesh"),
        ("dp=2.5", "'dp=2.5' in the mesh"),
        ("dp=٢", "in the mesh"),
        ("2", "written as names and sizes.*like dp=2,tp=4"),
        ("dp=0,tp=2", "the axis 'dp' of the mesh 'dp=0,tp=2' has size 0"),
        ("dp=2,dp=2", "the axis 'dp' is in the mesh 'dp=2,dp=2' twice"),
    ],
)
def test_a_mesh_that_is_not_one_is_refused(text, match):
    with pytest.raises(LayoutError, match=match):
        Mesh.parse(text)


# --- what a rank holds


@st.composite
def cut_tensors(draw):
    shape = draw(st.lists(st.integers(0, 30), max_size=3).map(tuple))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    dims = st.none() | st.integers(0, len(shape) - 1) if shape else st.none()
    return shape, tuple(draw(dims) for _ in sizes), Mesh(("a", "b", "c")[: len(sizes)], sizes)


@given(cut_tensors())
@example(((101,), (0, 0), Mesh(("dp", "tp"), (2, 2))))
def test_the_ranks_together_hold_each_element_once_but_for_replicas(case):
    shape, cuts, mesh = case
    held: dict[Box, int] = {}
    for rank in range(mesh.size):
        found = boxes(shape, cuts, mesh, rank)
        assert len(found) <= 1
        for box in found:
            held[box] = held.get(box, 0) + 1
    check_cover(
        shape,
        np.array([box.offsets for box in held], dtype=np.int64).reshape(len(held), len(shape)),
        np.array([box.sizes for box in held], dtype=np.int64).reshape(len(held), len(shape)),
    )
    replicas = math.prod(size for dim, size in zip(cuts, mesh.shape, strict=True) if dim is None)
    assert set(held.values()) <= {replicas}


@given(cut_tensors())
@example(((101,), (0, 0), Mesh(("dp", "tp"), (2, 2))))
@example(((7,), (0, 0), Mesh(("dp", "tp"), (3, 2))))
@example(((27, 3), (0, 0), Mesh(("dp", "tp"), (3, 4))))
def test_a_rank_holds_what_the_same_rank_of_fsdp2_over_tensor_parallelism_holds(case):
    shape, cuts, mesh = case
    full = torch.arange(math.prod(shape)).reshape(shape)
    placements = [
        Replicate() if word[0] == "R" else Shard(dim) if word[:2] == "S(" else _StridedShard(dim, split_factor=factor)
        for word in cut_words(cuts, mesh).split()
        for dim, factor in [_numbers(word)]
    ]
    for rank in range(mesh.size):
        found = boxes(shape, cuts, mesh, rank)
        local = full
        for axis in reversed(range(len(cuts))):
            if cuts[axis] is not None:
                chunks = list(local.chunk(mesh.shape[axis], cuts[axis]))
                chunks += [local.narrow(cuts[axis], 0, 0)] * mesh.shape[axis]
                local = chunks[mesh.coordinate(rank)[axis]]
        assert [full[box.slices()].tolist() for box in found] == ([local.tolist()] if local.numel() else [])

        distributed.init_process_group("fake", rank=rank, world_size=mesh.size, store=FakeStore())
        try:
            grid = DeviceMesh("cpu", torch.arange(mesh.size).reshape(mesh.shape), mesh_dim_names=mesh.names)
            live = lower(
                DTensor.from_local(local, grid, placements, run_check=False, shape=full.shape, stride=full.stride())
            )
        finally:
            distributed.destroy_process_group()
        assert [box for box, _ in live.pieces] == found
        assert live.cut == cut_words(cuts, mesh)


def _numbers(word: str) -> tuple[int, int]:
    inner = word[word.find("(") + 1 : word.find(")")] if "(" in word else "0"
    dim, _, factor = inner.partition(",")
    return int(dim), int(factor or 1)


def test_a_cut_is_told_as_a_manifest_records_it():
    mesh = Mesh.parse("pp=2,dp=2,tp=4")
    assert cut_words((None, 0, 1), mesh) == "R@pp S(0)@dp S(1)@tp"
    assert cut_words((0, 0, 0), mesh) == "SS(0,8)@pp SS(0,4)@dp S(0)@tp"


# --- layouts


def test_data_parallel_axes_cut_dimension_zero_and_replicas_nothing():
    for axis in ("dp", "fsdp", "dp_shard"):
        cuts = Layout().cuts(Mesh.parse(f"dp_replicate=2,{axis}=2"), TENSORS)
        assert cuts.pop("optimizer.state.layers.0.out.weight.step") == (None, None)
        assert set(cuts.values()) == {(None, 0)}


def test_a_table_says_what_its_axis_cuts_and_replicates_the_rest():
    cuts = Layout.parse(TP).cuts(Mesh.parse("dp=2,tp=4"), TENSORS)
    assert cuts["model.layers.0.qkv.weight"] == cuts["model.layers.1.qkv.weight"] == (0, 0)
    assert cuts["model.layers.0.out.weight"] == (0, 1)
    assert cuts["model.norm.weight"] == (0, None)


def test_a_table_for_dp_replaces_its_default():
    cuts = Layout({"dp": {"model.layers.*": 1}}).cuts(Mesh.parse("dp=2"), TENSORS)
    assert cuts["model.layers.0.qkv.weight"] == (1,)
    assert cuts["model.norm.weight"] == (None,)


def test_slots_of_an_optimizer_follow_their_parameter_when_they_have_its_shape():
    cuts = Layout.parse(TP).cuts(Mesh.parse("tp=2"), TENSORS, owners=OWNERS)
    assert cuts["optimizer.state.layers.0.out.weight.exp_avg"] == (1,)
    assert cuts["optimizer.state.layers.0.out.weight.row"] == (None,)
    assert cuts["optimizer.state.layers.0.out.weight.step"] == (None,)


def test_a_pattern_for_a_slot_itself_comes_before_its_parameters():
    layout = Layout.parse(TP + '"optimizer.*.exp_avg" = 0\n"optimizer.*.row" = 0')
    cuts = layout.cuts(Mesh.parse("tp=2"), TENSORS, owners=OWNERS)
    assert cuts["optimizer.state.layers.0.out.weight.exp_avg"] == (0,)
    assert cuts["optimizer.state.layers.0.out.weight.row"] == (0,)


def test_an_axis_without_a_table_does_what_it_did_in_the_source():
    recorded = {
        "model.layers.0.qkv.weight": "SS(0,2)@dp S(0)@tp",
        "model.layers.0.out.weight": "S(0)@dp S(1)@tp",
        "model.norm.weight": "S(0)@dp",
        "model.layers.1.qkv.weight": "S(1)@dp R@tp",
    }
    cuts = Layout().cuts(Mesh.parse("dp=4,tp=2"), TENSORS, recorded=recorded, owners=OWNERS)
    assert cuts["model.layers.0.qkv.weight"] == (0, 0)
    assert cuts["model.layers.0.out.weight"] == (0, 1)
    assert cuts["optimizer.state.layers.0.out.weight.exp_avg"] == (0, 1)
    assert cuts["model.norm.weight"] == (0, None)
    assert cuts["model.layers.1.qkv.weight"] == (0, None)


def test_a_layout_that_was_recorded_can_be_taken_up_again():
    mesh = Mesh.parse("pp=2,tp=4")
    tables = {"pp": {"model.layers.*": 0}, "tp": {"*.qkv.weight": 0, "*.norm.weight": "replicate"}}
    cuts = Layout(tables).cuts(mesh, TENSORS)
    recorded = {name: cut_words(cut, mesh) for name, cut in cuts.items()}
    assert Layout().cuts(mesh, TENSORS, recorded=recorded) == cuts


def test_an_axis_that_nothing_is_known_of_is_refused_with_an_example():
    with pytest.raises(LayoutError) as caught:
        Layout().cuts(Mesh.parse("dp=2,tp=4"), TENSORS, recorded={"model.norm.weight": "S(0)@dp"})
    assert "mesh axis 'tp'" in str(caught.value)
    assert "--layout" in str(caught.value)
    # the example is a layout that works on this checkpoint
    example = "\n".join(line for line in str(caught.value).splitlines() if line.startswith(("[", '"')))
    cuts = Layout.parse(example).cuts(Mesh.parse("dp=2,tp=4"), TENSORS)
    assert cuts["model.layers.1.qkv.weight"] == (0, 0)


def test_an_axis_of_one_rank_needs_no_rule():
    assert Layout().cuts(Mesh.parse("dp=2,tp=1"), TENSORS)["model.norm.weight"] == (0, None)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[tp", "is not TOML"),
        ("tp = 1", "'tp' stands outside of a table"),
        ("[tp]\nmodel.norm.weight = 0", "begins with 'model' is not in quotes"),
        ('[tp]\n"*" = -1', r"\[tp\] '\*' = -1 is not a rule"),
        ('[tp]\n"*" = true', "= True is not a rule"),
        ('[tp]\n"*" = 0.0', "= 0.0 is not a rule"),
        ('[tp]\n"*" = "split"', "= 'split' is not a rule; its value is the dimension.*or \"replicate\""),
    ],
)
def test_a_layout_file_that_is_not_one_is_refused(tmp_path, text, match):
    path = tmp_path / "cut.toml"
    path.write_text(text)
    with pytest.raises(LayoutError, match=match) as caught:
        Layout.read(path)
    assert str(path) in str(caught.value)


def test_a_layout_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LayoutError, match=r"cut\.toml can't be read"):
        Layout.read(tmp_path / "cut.toml")


def test_a_layout_is_read_from_a_file(tmp_path):
    path = tmp_path / "cut.toml"
    path.write_text(TP)
    cuts = Layout.read(path).cuts(Mesh.parse("tp=2"), TENSORS)
    assert cuts["model.layers.0.out.weight"] == (1,)


@pytest.mark.parametrize(
    ("tables", "match"),
    [
        ({"ep": {"*": 0}}, "table for the axis 'ep', which the mesh dp=2,tp=2 has not"),
        ({"tp": {"model.*.vqk.weight": 0}}, r'no tensor of the checkpoint matches \[tp\] "model\.\*\.vqk\.weight" = 0'),
        (
            {"tp": {"model.*.out.*": 0, "model.layers.0.*": "replicate"}},
            r'\[tp\] "model\.\*\.out\.\*" = 0 and \[tp\] "model\.layers\.0\.\*" = "replicate" disagree about',
        ),
        (
            {"tp": {"model.*": 1}},
            r'\[tp\] "model\.\*" = 1 matches the tensor \'model\.norm\.weight\', whose shape \[4\] has no such',
        ),
    ],
)
def test_rules_that_are_wrong_are_named(tables, match):
    with pytest.raises(LayoutError, match=match):
        Layout(tables).cuts(Mesh.parse("dp=2,tp=2"), TENSORS)


def test_rules_that_agree_may_both_match():
    cuts = Layout({"tp": {"model.*": 0, "*.norm.weight": 0}}).cuts(Mesh.parse("tp=2"), TENSORS)
    assert cuts["model.norm.weight"] == (0,)


def test_a_recorded_cut_that_can_not_be_is_refused():
    with pytest.raises(LayoutError, match=r"'model\.norm\.weight' was cut by S\(7\)@tp, but its shape \[4\]"):
        Layout().cuts(Mesh.parse("tp=2"), TENSORS, recorded={"model.norm.weight": "S(7)@tp"})
