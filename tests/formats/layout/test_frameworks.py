"""Layouts of real frameworks, each cut by numpy as the framework cuts, and found again by the rules."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ckpt_formats.errors import LayoutError, ValuesDifferError
from ckpt_formats.layout import Cut, Flat, Layout, Mesh, Resolved, Rule, Spread, assemble
from ckpt_formats.layout.words import from_tree

Array = NDArray[np.int64]
PAGE = (Path(__file__).parents[3] / "docs/layout.md").read_text()
MEGATRON, FSDP2, ZERO = (text for text in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if "[[rule]]" in text)


def numbered(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Whole tensors whose elements are all different, and never 0."""
    arrays, start = {}, 1
    for name, shape in shapes.items():
        arrays[name] = np.arange(start, start + math.prod(shape)).reshape(shape)
        start += math.prod(shape)
    return arrays


def held_by(resolved: Resolved, arrays: Mapping[str, Array], rank: int) -> dict[str, Array]:
    """A rank's tensors, made by the rules; padding is 0."""
    held = {}
    for tensor in resolved.local(rank).values():
        array = np.zeros(tensor.shape, np.int64)
        for piece in tensor.pieces:
            piece.view(array)[...] = arrays[piece.tensor][piece.box.slices()]
        held[tensor.name] = array
    return held


def same(held: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert {name: array.shape for name, array in held.items()} == {
        name: array.shape for name, array in expected.items()
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(held[name], array, err_msg=name)


# --- Megatron


def megatron_shapes() -> dict[str, tuple[int, ...]]:
    hidden, heads, groups, width, ffn, experts = 6, 16, 8, 2, 10, 4
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (101, hidden), "lm_head.weight": (101, hidden)}
    for layer in range(8):
        attention = f"model.layers.{layer}.self_attn"
        shapes[f"{attention}.q_proj.weight"] = (heads * width, hidden)
        shapes[f"{attention}.k_proj.weight"] = shapes[f"{attention}.v_proj.weight"] = (groups * width, hidden)
        for expert in range(experts):
            for what in ("gate", "up"):
                shapes[f"model.layers.{layer}.mlp.experts.{expert}.{what}_proj.weight"] = (ffn, hidden)
    return shapes


def megatron_model(arrays: Mapping[str, Array], pp: int, tp: int, ep: int) -> dict[str, Array]:
    """A rank's weights as Megatron-core lays them out for pp=2, two virtual stages, tp=2, ep=2."""
    held: dict[str, Array] = {}
    vocabulary = np.vstack([np.zeros((256 - 101, 6), np.int64)])

    def vocabulary_part(whole: Array) -> Array:
        return np.vstack([whole, vocabulary])[tp * 128 : (tp + 1) * 128]

    if pp == 0:
        held["embedding.word_embeddings.weight"] = vocabulary_part(arrays["model.embed_tokens.weight"])
    for chunk in range(2):
        for own in range(2):
            layer = chunk * 4 + pp * 2 + own
            theirs, ours = f"model.layers.{layer}.self_attn", f"model{chunk}.decoder.layers.{own}"
            q, k, v = (arrays[f"{theirs}.{what}_proj.weight"] for what in "qkv")
            groups = []
            for group in range(tp * 4, tp * 4 + 4):  # 8 groups of 2 query heads of width 2
                groups += [q[group * 4 : group * 4 + 4], k[group * 2 : group * 2 + 2], v[group * 2 : group * 2 + 2]]
            held[f"{ours}.self_attention.linear_qkv.weight"] = np.vstack(groups)
            for local, expert in enumerate((ep * 2, ep * 2 + 1)):
                gate, up = (
                    arrays[f"model.layers.{layer}.mlp.experts.{expert}.{what}_proj.weight"] for what in ["gate", "up"]
                )
                held[f"{ours}.mlp.experts.linear_fc1.weight{local}"] = np.vstack(
                    [gate[tp * 5 : tp * 5 + 5], up[tp * 5 : tp * 5 + 5]]
                )
    if pp == 1:
        held["output_layer.weight"] = vocabulary_part(arrays["lm_head.weight"])
    return held


def test_megatron_with_groups_interleaved_padding_virtual_stages_experts_and_its_distributed_optimizer() -> None:
    mesh = Mesh.parse("pp=2,ep=2,dp=3,tp=2")
    shapes = megatron_shapes()
    arrays = numbered(shapes)
    resolved = Layout.parse(MEGATRON).resolve(mesh, shapes)
    locals_of = []
    for rank in range(mesh.size):
        pp, ep, dp, tp = mesh.coordinate(rank)
        model = megatron_model(arrays, pp, tp, ep)
        experts = {name: array for name, array in model.items() if ".experts." in name}
        # the buffer: parameters in reverse order, each at a multiple of 64, all together of 128 and of dp
        order = ["embedding", "output", "model0.decoder.layers.0", "model0.decoder.layers.1"]
        order += ["model1.decoder.layers.0", "model1.decoder.layers.1"]
        dense = sorted(
            (name for name in model if name not in experts),
            key=lambda name: [place for place, begin in enumerate(order) if name.startswith(begin)],
        )
        parts: list[Array] = []
        for name in reversed(dense):
            parts += [np.zeros(-sum(map(len, parts)) % 64, np.int64), model[name].reshape(-1)]
        filled = sum(map(len, parts))
        buffer = np.concatenate([*parts, np.zeros(-filled % 384, np.int64)])
        expected = {**experts, "buffer.0": np.split(buffer, 3)[dp]}
        same(held_by(resolved, arrays, rank), expected)
        locals_of.append(expected)
    for name, array in arrays.items():
        np.testing.assert_array_equal(assemble(resolved, name, lambda rank, local: locals_of[rank][local]), array)


def test_fewer_heads_of_keys_than_ranks_are_shared_by_neighbours() -> None:
    rule = Rule(match="qkv", cut=Cut(axis="tp", dim=0, parts=[8, {"width": 4, "pieces": 2}, {"width": 4, "pieces": 2}]))
    resolved = Layout(rules=[rule]).resolve(Mesh.parse("tp=4"), {"qkv": (16, 3)})
    arrays = numbered({"qkv": (16, 3)})
    q, k, v = np.split(arrays["qkv"], [8, 12])
    for rank in range(4):
        half = slice(rank // 2 * 2, rank // 2 * 2 + 2)
        same(held_by(resolved, arrays, rank), {"qkv": np.vstack([q[rank * 2 : rank * 2 + 2], k[half], v[half]])})
    homes = [
        holder.where for holder in resolved.holders("qkv") if not holder.piece.copy and holder.piece.box.offsets[0] >= 8
    ]
    assert homes == [(0,), (0,), (2,), (2,)]


def test_boxes_that_no_cut_says_are_said_one_by_one() -> None:
    text = """
    [flat.f]
    axis = "dp"
    name = "flat"
    [[rule]]
    match = "qkv"
    flat = "f"
    [rule.boxes]
    axis = "tp"
    held = [["[0:3,0:2]", {box = "[5:6,0:2]", at = [3, 0]}], [{box = "[3:5,0:2]", at = [1, 0]}]]
    shapes = [[4, 2], [3, 2]]
    """
    layout = Layout.parse(text)
    assert Layout.parse(layout.to_toml()) == layout
    arrays = numbered({"qkv": (6, 2)})
    resolved = layout.resolve(Mesh.parse("dp=2,tp=2"), {"qkv": (6, 2)})
    rows = arrays["qkv"]
    for rank in range(4):
        dp, tp = divmod(rank, 2)
        whole = [rows[[0, 1, 2, 5]], np.vstack([[[0, 0]], rows[3:5]])][tp].reshape(-1)
        same(held_by(resolved, arrays, rank), {"flat": np.split(whole, 2)[dp]})
    assert resolved.cut("qkv") == "flat@dp boxes@tp"


# --- FSDP2, ZeRO and FSDP1


def test_fsdp2_over_tensor_parallelism_is_what_the_short_form_says() -> None:
    shapes = {"model.layers.0.wo.weight": (7, 8), "model.layers.0.wq.weight": (101, 2), "norm": (5,)}
    mesh = Mesh.parse("dp=2,tp=2")
    rules = Layout.parse(FSDP2).resolve(mesh, shapes)
    short = Layout({"tp": {"*.wo.weight": 1, "*.wq.weight": 0}}).resolve(mesh, shapes)
    for rank in range(4):
        assert rules.local(rank) == short.local(rank)
    # as torch cuts 101 rows on 2x2: crossed
    rows = [box for rank in range(4) for box in rules.boxes("model.layers.0.wq.weight", rank)]
    assert [(box.offsets[0], box.stops[0]) for box in rows] == [(0, 26), (51, 76), (26, 51), (76, 101)]


def test_zero_1_flat_over_data_parallel_ranks_of_tensor_parallel_slices() -> None:
    mesh = Mesh.parse("dp=3,tp=2")
    shapes = {"model.0.wo.weight": (5, 6), "model.0.norm.weight": (7,), "model.1.wo.weight": (5, 6)}
    slots = {
        f"optimizer.state.{name[6:]}.{slot}": shape for name, shape in shapes.items() for slot in ("fp32", "exp_avg")
    }
    arrays = numbered(shapes | slots)
    resolved = Layout.parse(ZERO).resolve(mesh, shapes | slots)
    for rank in range(mesh.size):
        dp, tp = mesh.coordinate(rank)
        expected = {}
        for name in shapes:
            expected[name] = arrays[name][:, tp * 3 : tp * 3 + 3] if "wo" in name else arrays[name]
        for slot in ("fp32", "exp_avg"):
            whole = [arrays[f"optimizer.state.{name[6:]}.{slot}"] for name in shapes]
            cut = [array[:, tp * 3 : tp * 3 + 3] if array.ndim == 2 else array for array in whole]
            flat = np.concatenate([array.reshape(-1) for array in cut])
            padded = np.concatenate([flat, np.zeros(-len(flat) % 6, np.int64)])  # to a multiple of 2 * dp
            expected[slot] = np.split(padded, 3)[dp]
        same(held_by(resolved, arrays, rank), expected)


def test_zero_1_with_a_gap_after_each_parameter_in_the_order_of_a_list() -> None:
    flat = Flat(axis="dp", name="group0", align=4, order=["c", "a", "b*"])
    layout = Layout(rules=[Rule(match="*", flat="zero")], flat={"zero": flat})
    shapes = {"a": (3,), "b1": (2, 3), "c": (5,), "b2": (1,)}
    arrays = numbered(shapes)
    resolved = layout.resolve(Mesh.parse("dp=2"), shapes)
    whole = np.concatenate(
        [arrays["c"], [0, 0, 0], arrays["a"], [0], arrays["b1"].reshape(-1), [0, 0], arrays["b2"], [0]]
    )
    for rank in range(2):
        same(held_by(resolved, arrays, rank), {"group0": np.split(whole, 2)[rank]})


@pytest.mark.parametrize("ragged", [False, True])
def test_zero_3_pads_each_parameter_by_itself(ragged: bool) -> None:
    layout = Layout(rules=[Rule(match="*", flat="each")], flat={"each": Flat(axis="dp", name="{name}", ragged=ragged)})
    shapes = {"a": (3, 3), "b": (2,), "c": ()}
    arrays = numbered(shapes)
    resolved = layout.resolve(Mesh.parse("dp=4"), shapes)
    for rank in range(4):
        expected = {}
        for name, array in arrays.items():
            step = -(-array.size // 4)
            flat = (
                array.reshape(-1)
                if ragged
                else np.concatenate([array.reshape(-1), np.zeros(-array.size % 4, np.int64)])
            )
            expected[name] = flat[rank * step : (rank + 1) * step]
        same(held_by(resolved, arrays, rank), expected)


def test_fsdp1_has_a_flat_parameter_for_each_wrapped_layer() -> None:
    layout = Layout(
        rules=[Rule(match="layers.{layer}.*", flat="unit"), Rule(match="norm", flat="root")],
        flat={
            "unit": Flat(axis="fsdp", name="layers.{layer}._flat_param"),
            "root": Flat(axis="fsdp", name="_flat_param"),
        },
    )
    shapes = {"layers.0.a": (3, 2), "layers.0.b": (3,), "layers.1.a": (3, 2), "layers.1.b": (3,), "norm": (5,)}
    arrays = numbered(shapes)
    resolved = layout.resolve(Mesh.parse("fsdp=2"), shapes)
    for rank in range(2):
        expected = {}
        for unit, names in {"layers.0.": ["a", "b"], "layers.1.": ["a", "b"], "": ["norm"]}.items():
            flat = np.concatenate([arrays[unit + name].reshape(-1) for name in names])
            padded = np.concatenate([flat, np.zeros(len(flat) % 2, np.int64)])
            expected[f"{unit}_flat_param"] = np.split(padded, 2)[rank]
        same(held_by(resolved, arrays, rank), expected)


# --- a checkpoint of stacked layers and experts, as Megatron's torch_dist has them


def test_layers_and_experts_in_one_tensor_are_a_tensor_each_on_stages_and_expert_ranks() -> None:
    layout = Layout(
        rules=[
            Rule(
                match="decoder.layers.mlp.experts.fc1",
                unstack=("layer", "expert"),
                local="layers.{layer}.experts.{expert}.fc1",
                cut=Cut(axis="tp", dim=0, parts=2),
            )
        ],
        spread={
            "layer": Spread(axis="pp", lists=[[0, 1, 2], [3]]),
            "expert": Spread(axis="ep", lists=[[2, 0], [1, 3]]),
        },
    )
    shapes = {"decoder.layers.mlp.experts.fc1": (4, 4, 8, 3)}
    arrays = numbered(shapes)
    mesh = Mesh.parse("pp=2,ep=2,tp=2")
    resolved = layout.resolve(mesh, shapes)
    whole = arrays["decoder.layers.mlp.experts.fc1"]
    for rank in range(mesh.size):
        pp, ep, tp = mesh.coordinate(rank)
        expected = {}
        for own, layer in enumerate([[0, 1, 2], [3]][pp]):
            for position, expert in enumerate([[2, 0], [1, 3]][ep]):
                gate, up = np.split(whole[layer, expert], 2)
                part = slice(tp * 2, tp * 2 + 2)
                expected[f"layers.{own}.experts.{position}.fc1"] = np.vstack([gate[part], up[part]])
        same(held_by(resolved, arrays, rank), expected)


# --- Universal Checkpointing: its merging of slices, and the rule beside its pattern in the documentation


def concatenated(dim: int) -> Callable[[list[Array]], Array]:
    return lambda slices: np.concatenate(slices, axis=dim)


def two_parts(slices: list[Array]) -> Array:
    halves = [np.split(each, 2) for each in slices]
    return np.concatenate([half[part] for part in range(2) for half in halves])


def vocabulary(slices: list[Array]) -> Array:
    return np.concatenate(slices)[:101]


def parts_of(*widths: tuple[int, int]) -> Callable[[list[Array]], Array]:
    """Sub-parameters of these widths on the two ranks."""

    def merged(slices: list[Array]) -> Array:
        pieces = [np.split(each, np.cumsum([width[rank] for width in widths])[:-1]) for rank, each in enumerate(slices)]
        return np.concatenate([pieces[rank][part] for part in range(len(widths)) for rank in range(2)])

    return merged


def first(slices: list[Array]) -> Array:
    return slices[0]


def mean(slices: list[Array]) -> Array:
    return sum(slices[1:], slices[0]) / len(slices)


@pytest.mark.parametrize(
    ("pattern", "name", "shape", "slices", "merge"),
    [
        ("none:", "a.wq", (8, 6), (4, 6), concatenated(0)),
        ("row_parallelism", "a.wo", (8, 6), (8, 3), concatenated(1)),
        ("tp_replicated", "a.norm", (8,), (8,), first),
        ("to_average", "a.norm", (8,), (8,), mean),
        ("vocabulary", "embed", (101, 3), (128, 3), vocabulary),
        ("2_sub_params", "a.w13", (12, 4), (6, 4), two_parts),
        ("`parameter_with_sub_params`", "a.qkv", (48, 2), (24, 2), parts_of((16, 16), (4, 4), (4, 4))),
        ("sub_param_shard_widths", "a.qkv", (48, 2), (28, 2), parts_of((20, 12), (4, 4), (4, 4))),
    ],
)
def test_what_universal_checkpointing_merges_the_rule_beside_its_pattern_puts_together(
    pattern: str,
    name: str,
    shape: tuple[int, ...],
    slices: tuple[int, ...],
    merge: Callable[[list[Array]], Array],
) -> None:
    (row,) = (line for line in PAGE.splitlines() if line.startswith("|") and pattern in line.split("|")[1])
    text = re.findall(r"`(match = .*?)`", row)[0]
    rule = from_tree(Rule, tomllib.loads(f"rule = {{{text}}}")["rule"])
    resolved = Layout(rules=[rule]).resolve(Mesh.parse("tp=2"), {name: shape})
    sizes = [slices, (20, 2)] if pattern == "sub_param_shard_widths" else [slices, slices]
    ranks = [np.random.default_rng(seed).random(size) for seed, size in enumerate(sizes)]
    if merge is first:
        ranks[1] = ranks[0]
    whole = assemble(resolved, name, lambda rank, _: ranks[rank])
    np.testing.assert_array_equal(whole, merge(ranks))


# --- replicas that disagree


def test_replicas_that_disagree_are_an_error_unless_a_rule_says_what_holds() -> None:
    mesh, shapes = Mesh.parse("dp=2,tp=2"), {"norm": (4,), "other": (2,)}
    ranks = [{"norm": np.full(4, 1.0 + rank, np.float32), "other": np.zeros(2)} for rank in range(4)]

    def whole(replicas: str) -> Array:
        rule = from_tree(Rule, {"match": "norm", "replicas": replicas})
        resolved = Layout(rules=[rule], otherwise=Rule()).resolve(mesh, shapes)
        return assemble(resolved, "norm", lambda rank, name: ranks[rank][name])

    with pytest.raises(ValuesDifferError) as caught:
        whole("equal")
    assert (caught.value.tensor, caught.value.rank) == ("norm", 1)
    assert "'norm' should be the same on all ranks that hold [0:4] of it" in str(caught.value)
    assert 'rule {match = "norm"} has to say replicas = "first" or "average"' in str(caught.value)
    assert whole("first").tolist() == [1.0] * 4
    averaged = whole("average")
    assert (averaged.tolist(), averaged.dtype) == ([2.5] * 4, np.dtype(np.float32))


def test_integers_have_no_average() -> None:
    rule = Rule(match="count", replicas="average")
    resolved = Layout(rules=[rule]).resolve(Mesh.parse("dp=2"), {"count": (1,)})
    with pytest.raises(LayoutError, match="asks for the average of replicas, and the tensor 'count' is int64"):
        assemble(resolved, "count", lambda *_: np.zeros(1, np.int64))


# --- size


def test_thousands_of_tensors_on_thousands_of_ranks_are_resolved_without_walking_them() -> None:
    layers, hidden = 96, 12288
    shapes: dict[str, tuple[int, ...]] = {"model.embed": (50257, hidden)}
    for layer in range(layers):
        for what, shape in {
            "wq": (hidden, hidden),
            "wo": (hidden, hidden),
            "w1": (4 * hidden, hidden),
            "norm": (hidden,),
        }.items():
            shapes[f"model.layers.{layer}.{what}"] = shape
    for name, shape in list(shapes.items()):
        for slot in ("fp32", "exp_avg", "exp_avg_sq"):
            shapes[f"optimizer.{name[6:]}.{slot}"] = shape
    layout = Layout(
        rules=[
            Rule(match="model.embed", on={"pp": [0]}, cut=Cut(axis="tp", dim=0)),
            Rule(match="model.layers.{layer}.*", unless=["*.wo", "*.norm"], cut=Cut(axis="tp", dim=0)),
            Rule(match="model.layers.{layer}.wo", cut=Cut(axis="tp", dim=1)),
            Rule(match="model.layers.{layer}.norm"),
            Rule(match="optimizer.{name*}.{slot}", like="model.{name}", local="{like}.{slot}", flat="zero"),
        ],
        spread={"layer": Spread(axis="pp", count=layers)},
        flat={"zero": Flat(axis="dp", name="{slot}", share_multiple=2)},
    )
    mesh = Mesh.parse("pp=8,dp=256,tp=8")
    assert (len(shapes), mesh.size) == (1540, 16384)
    resolved = layout.resolve(mesh, shapes)
    for rank in (0, 9_999):
        held = resolved.local(rank)
        assert {"fp32", "exp_avg", "exp_avg_sq"} <= held.keys()
    name = "optimizer.layers.40.w1.exp_avg"
    holders = list(resolved.holders(name))
    assert sum(holder.piece.box.numel for holder in holders) == 4 * hidden * hidden
    assert len(holders) < 3 * 8 * 256
