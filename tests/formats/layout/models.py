"""Random models under random layouts, cut by plain numpy indexing as a framework would cut them.

A model is a few families of tensors. For each family there are several ways to lay it out; a way gives the rules and,
apart from these, a function that makes the local tensors of a rank out of the whole ones. The second is the oracle: it
knows arrays only, no boxes and no intervals.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
from numpy.typing import NDArray

from ckpt_formats.layout import Cut, Flat, Layout, Mesh, Pad, Part, Rule, Split, Spread

Array = NDArray[np.int64]
At = dict[str, tuple[int, int]]
"""Axis -> where the rank stands on it, and its size."""
Locals = list[tuple[str, Array]]


@dataclass
class Way:
    """A way to lay out a family."""

    rules: list[Rule]
    cut: Callable[[dict[str, Array], At], Locals]
    spread: dict[str, Spread] = field(default_factory=dict)


@dataclass
class Case:
    """A layout on a mesh, and what the ranks hold by it."""

    layout: Layout
    mesh: Mesh
    ranks: list[dict[str, Array]]


# --- as a framework would cut an array


def share(array: Array, dim: int, parts: int, index: int) -> Array:
    """torch.chunk's part of a dimension."""
    step = math.ceil(array.shape[dim] / parts)
    return np.take(array, np.arange(array.shape[dim])[index * step : (index + 1) * step], axis=dim)


def place(at: At, axes: Sequence[str]) -> tuple[int, int]:
    """Number of ranks of a group of axes, and which this is, the first axis varying slowest."""
    sizes = [at[axis][1] for axis in axes]
    return math.prod(sizes), int(np.ravel_multi_index([at[axis][0] for axis in axes], sizes))


def pieces_of_parts(array: Array, dim: int, widths: Sequence[int]) -> list[Array]:
    return np.split(array, np.cumsum(widths)[:-1], axis=dim)


def sized(random: Random, total: int, parts: int) -> list[int]:
    """Random widths, zeros among them, that make up a total."""
    marks = sorted(random.randint(0, total) for _ in range(parts - 1))
    return [b - a for a, b in itertools.pairwise([0, *marks, total])]


# --- ways to lay out one tensor


def special(random: Random, axis: str, dim: int, extent: int, ranks: int) -> tuple[Cut, Callable[[Array, At], Array]]:
    """A cut that is not plain, of a dimension of two elements or more."""
    kind = random.choice(["parts", "pieces", "lists", "sizes", "unit"])
    if kind == "parts":
        widths = [width for width in sized(random, extent, 3) if width]

        def by_parts(a: Array, at: At) -> Array:
            return np.concatenate(
                [share(part, dim, *place(at, (axis,))) for part in pieces_of_parts(a, dim, widths)], dim
            )

        return Cut(axis=axis, dim=dim, parts=tuple(widths)), by_parts
    if kind == "pieces":
        first = random.randint(1, extent - 1)
        some = random.choice([n for n in range(1, ranks + 1) if ranks % n == 0])

        def fewer(a: Array, at: At) -> Array:
            one, two = pieces_of_parts(a, dim, [first, extent - first])
            index = at[axis][0]
            return np.concatenate([share(one, dim, ranks, index), share(two, dim, some, index * some // ranks)], dim)

        parts = (Part(width=first), Part(width=extent - first, pieces=some))
        return Cut(axis=axis, dim=dim, parts=parts), fewer
    if kind == "lists":
        ends = np.cumsum(sized(random, extent, ranks))[:-1]
        lists = [part.tolist() for part in np.split(np.array(random.sample(range(extent), extent)), ends)]
        return Cut(axis=axis, dim=dim, lists=tuple(map(tuple, lists))), lambda a, at: np.take(
            a, np.array(lists[at[axis][0]], np.int64), axis=dim
        )
    if kind == "sizes":
        widths = sized(random, extent, ranks)
        return Cut(axis=axis, dim=dim, sizes=tuple(widths)), lambda a, at: pieces_of_parts(a, dim, widths)[at[axis][0]]
    unit = random.choice([n for n in range(1, extent + 1) if extent % n == 0])

    def units(a: Array, at: At) -> Array:
        step = math.ceil(extent // unit / ranks) * unit
        return np.take(a, np.arange(extent)[at[axis][0] * step : (at[axis][0] + 1) * step], axis=dim)

    return Cut(axis=axis, dim=dim, unit=unit), units


def one_tensor(random: Random, name: str, shape: tuple[int, ...], sizes: dict[str, int], axes: list[str]) -> Way:
    """Replicated, cut plainly, padded, fused, split, by lists, by sizes; or a mix."""
    local = random.choice([None, f"local.{name}"])
    called = local or name
    pad, padded = None, list(shape)
    if shape and random.random() < 0.3:
        dim = random.randrange(len(shape))
        if random.random() < 0.5:
            pad = Pad(dim=dim, to=shape[dim] + random.randint(0, 5))
            padded[dim] = pad.to or 0
        else:
            pad = Pad(dim=dim, multiple=random.randint(1, 4), per=random.choice([None, axes[0]]))
            step = (pad.multiple or 1) * (sizes[axes[0]] if pad.per else 1)
            padded[dim] = math.ceil(shape[dim] / step) * step
    cuts: list[Cut] = []
    how: list[Callable[[Array, At], Array]] = []
    free = random.sample(axes, random.randint(0, min(2, len(axes)))) if shape else []
    for axis in free:
        dim = random.randrange(len(shape))
        if not cuts and padded[dim] >= 2 and random.random() < 0.8:
            cut, done = special(random, axis, dim, padded[dim], sizes[axis])
        else:
            spare = [other for other in axes if other not in free]
            group = (axis, *spare[: random.randint(0, 1)]) if cuts else (axis,)
            cut, done = Cut(axis=group, dim=dim), lambda a, at, d=dim, g=group: share(a, d, *place(at, g))
        cuts.append(cut)
        how.append(done)
    used = {axis for cut in cuts for axis in cut.axes}
    on: dict[str, tuple[int, ...]] = {}
    spare = [axis for axis in axes if axis not in used]
    if spare and random.random() < 0.3:
        axis = random.choice(spare)
        on[axis] = random.choice([(0,), (-1,), (0, -1)])
    split = None
    names = [called]
    if shape and random.random() < 0.2 and pad is None and not cuts:
        dim = random.randrange(len(shape))
        widths = [width for width in sized(random, shape[dim], 2) if width]
        if widths:
            split = Split(dim=dim, widths=tuple(widths))
            names = [f"{called}.{number}" for number in range(len(widths))]
    rule = Rule(
        match=name,
        local=tuple(names) if split else local,
        pad=(pad,) if pad else (),
        cut=tuple(cuts),
        on=on,
        split=split,
        replicas=random.choice(["equal", "first"]),
    )

    def cut(arrays: dict[str, Array], at: At) -> Locals:
        array = arrays[name]
        for axis, places in on.items():
            if at[axis][0] not in {index % at[axis][1] for index in places}:
                return []
        if split is not None:
            return list(zip(names, pieces_of_parts(array, split.dim, split.widths), strict=True))
        if shape:
            array = np.pad(array, [(0, b - a) for a, b in zip(shape, padded, strict=True)])
        for each in how:
            array = each(array, at)
        return [(called, array)]

    return Way([rule], cut)


# --- ways to lay out layers, experts, and query, key and value


def stages(random: Random, count: int, axis: str, ranks: int) -> tuple[Spread, list[list[list[int]]]]:
    """A spread of layers, and by rank the layers of each of its chunks."""
    chunks = random.randint(1, 2)
    order = random.choice(["loop", "v"])
    total = ranks * chunks
    if count % total == 0 and random.random() < 0.5:
        each = count // total
        lists = [list(range(stage * each, (stage + 1) * each)) for stage in range(total)]
        spread = Spread(axis=axis, count=count, chunks=chunks, order=order)
    else:
        numbers = random.sample(range(count), count)
        lists = [part.tolist() for part in np.split(np.array(numbers), np.cumsum(sized(random, count, total))[:-1])]
        spread = Spread(axis=axis, lists=tuple(map(tuple, lists)), chunks=chunks, order=order)
    by_rank: list[list[list[int]]] = [[] for _ in range(ranks)]
    for stage, numbers in enumerate(lists):
        turn, index = divmod(stage, ranks)
        by_rank[ranks - 1 - index if order == "v" and turn % 2 else index].append(numbers)
    return spread, by_rank


def layers(random: Random, prefix: str, count: int, sizes: dict[str, int]) -> Way:
    """A tensor per layer: as they are, on pipeline stages that count anew, or stacked on the ranks."""
    pattern = f"{prefix}.{{{prefix}}}.w"
    kind = random.choice(["kept", "staged", "global names", "stacked", "stacked on stages"])
    cuts = (Cut(axis="tp", dim=random.randint(0, 1)),) if random.random() < 0.6 else ()

    def taken(array: Array, at: At) -> Array:
        return share(array, cuts[0].dim, *reversed(at["tp"])) if cuts else array

    if kind == "kept":
        rule = Rule(match=pattern, cut=cuts)
        return Way([rule], lambda arrays, at: [(name, taken(a, at)) for name, a in arrays.items()])
    if kind == "stacked":
        rule = Rule(match=pattern, cut=cuts, stack=prefix, local=f"{prefix}.stack")
        return Way([rule], lambda arrays, at: [(f"{prefix}.stack", np.stack([taken(a, at) for a in arrays.values()]))])
    spread, by_rank = stages(random, count, "pp", sizes["pp"])
    if kind == "stacked on stages" and spread.chunks == 1:
        rule = Rule(match=pattern, cut=cuts, stack=prefix, local=f"{prefix}.stack")

        def stacked(arrays: dict[str, Array], at: At) -> Locals:
            (numbers,) = by_rank[at["pp"][0]]
            shape = taken(arrays[f"{prefix}.0.w"], at).shape
            held = [taken(arrays[f"{prefix}.{number}.w"], at) for number in numbers]
            return [(f"{prefix}.stack", np.stack(held) if held else np.empty((0, *shape), np.int64))]

        return Way([rule], stacked, {prefix: spread})
    own = kind == "staged"
    local = f"chunk{{{prefix}.chunk}}.{prefix}.{{{prefix}}}.w" if own else None
    rule = Rule(match=pattern, cut=cuts, local=local)

    def staged(arrays: dict[str, Array], at: At) -> Locals:
        held = {}
        for chunk, numbers in enumerate(by_rank[at["pp"][0]]):
            for position, number in enumerate(numbers):
                name = f"{prefix}.{number}.w"
                held[name] = f"chunk{chunk}.{prefix}.{position}.w" if own else name, taken(arrays[name], at)
        return [held[name] for name in arrays if name in held]

    return Way([rule], staged, {prefix: spread})


def stack(random: Random, name: str, sizes: dict[str, int], count: int) -> Way:
    """One tensor with a dimension of layers: cut as any other, or a tensor per layer on the ranks, on stages or not."""
    if random.random() < 0.3:
        return one_tensor(random, name, (count, 3, 2), sizes, ["tp", "pp"])
    capture = f"{name}layer"
    local = f"{name}.{{{capture}}}.w"
    rule = Rule(match=name, unstack=capture, local=local, cut=Cut(axis="tp", dim=0))
    if random.random() < 0.4:
        return Way(
            [rule],
            lambda arrays, at: [
                (f"{name}.{number}.w", share(a, 0, *reversed(at["tp"]))) for number, a in enumerate(arrays[name])
            ],
        )
    spread, by_rank = stages(random, count, "pp", sizes["pp"])
    rule = Rule(match=name, unstack=capture, local=f"{{{capture}.chunk}}.{local}", cut=Cut(axis="tp", dim=0))

    def staged(arrays: dict[str, Array], at: At) -> Locals:
        held = {
            number: (f"{chunk}.{name}.{position}.w", share(arrays[name][number], 0, *reversed(at["tp"])))
            for chunk, numbers in enumerate(by_rank[at["pp"][0]])
            for position, number in enumerate(numbers)
        }
        return [held[number] for number in sorted(held)]

    return Way([rule], staged, {capture: spread})


def experts(random: Random, count: int, sizes: dict[str, int]) -> Way:
    """A tensor per layer and expert: experts by lists on ranks, each by its local number, or stacked there."""
    numbers = random.sample(range(count), count)
    lists = [part.tolist() for part in np.split(np.array(numbers), np.cumsum(sized(random, count, sizes["ep"]))[:-1])]
    spread = {"expert": Spread(axis="ep", lists=tuple(map(tuple, lists)))}
    pattern = "moe.{moelayer}.{expert}.w"
    if random.random() < 0.5:
        rule = Rule(match=pattern, local="moe.{moelayer}.w{expert}")

        def one_by_one(arrays: dict[str, Array], at: At) -> Locals:
            mine = lists[at["ep"][0]]
            found = []
            for name, array in arrays.items():
                _, layer, expert, _ = name.split(".")
                if int(expert) in mine:
                    found.append((f"moe.{layer}.w{mine.index(int(expert))}", array))
            return found

        return Way([rule], one_by_one, spread)
    rule = Rule(match=pattern, local="moe.{moelayer}.w", stack="expert")

    def stacked(arrays: dict[str, Array], at: At) -> Locals:
        mine = lists[at["ep"][0]]
        by_layer = sorted({name.split(".")[1] for name in arrays}, key=int)
        shape = next(iter(arrays.values())).shape
        return [
            (
                f"moe.{layer}.w",
                np.array([arrays[f"moe.{layer}.{number}.w"] for number in mine], np.int64).reshape(len(mine), *shape),
            )
            for layer in by_layer
        ]

    return Way([rule], stacked, spread)


def attention(random: Random, heads: tuple[int, int, int], sizes: dict[str, int]) -> Way:
    """Query, key and value: apart, one after the other, or interleaved by group as Megatron holds them."""
    kind = random.choice(["apart", "joined", "interleaved", "joined whole"])
    names = [f"att.{what}" for what in "qkv"]
    tp = "tp"
    if kind == "apart":
        rules = [Rule(match="att.[qkv]", cut=Cut(axis=tp, dim=0))]
        return Way(rules, lambda arrays, at: [(name, share(arrays[name], 0, *reversed(at[tp]))) for name in names])
    if kind == "joined whole":
        rule = Rule(match=tuple(names), join=0, local="att.qkv", cut=Cut(axis=tp, dim=0))
        return Way(
            [rule],
            lambda arrays, at: [
                ("att.qkv", share(np.concatenate([arrays[name] for name in names]), 0, *reversed(at[tp])))
            ],
        )
    if kind == "joined":
        rule = Rule(match=tuple(names), join=0, local="att.qkv", cut=Cut(axis=tp, dim=0, parts="joined"))
        return Way(
            [rule],
            lambda arrays, at: [
                ("att.qkv", np.concatenate([share(arrays[name], 0, *reversed(at[tp])) for name in names]))
            ],
        )
    groups, _, width = heads
    rule = Rule(match=tuple(names), join=0, local="att.qkv", cut=Cut(axis=tp, dim=0, parts="joined", groups=groups))

    def interleaved(arrays: dict[str, Array], at: At) -> Locals:
        by_group = [arrays[name].reshape(groups, -1, width) for name in names]
        whole = np.concatenate(by_group, axis=1)
        mine = share(whole, 0, *reversed(at[tp]))
        return [("att.qkv", mine.reshape(-1, width))]

    return Way([rule], interleaved)


def tied(random: Random, sizes: dict[str, int]) -> Way:
    """An embedding, and the output layer that is the same tensor: on first and last stage."""
    cut = Cut(axis="tp", dim=0)
    on = {"pp": (0,)} if random.random() < 0.5 else {"pp": (0, -1)}
    rules = [
        Rule(match="embed", cut=cut, on=on),
        Rule(match="head", tied="embed", cut=Cut(axis="tp", dim=1), on={"pp": (-1,)}, local="out.head"),
    ]

    def both(arrays: dict[str, Array], at: At) -> Locals:
        index, ranks = at["pp"]
        found = []
        if index in {each % ranks for each in on["pp"]}:
            found.append(("embed", share(arrays["embed"], 0, *reversed(at["tp"]))))
        if index == ranks - 1:
            found.append(("out.head", share(arrays["embed"], 1, *reversed(at["tp"]))))
        return found

    return Way(rules, both)


# --- whole models


@dataclass
class Family:
    """Tensors and how to find a way to lay them out."""

    shapes: dict[str, tuple[int, ...]]
    way: Callable[[Random, dict[str, int]], Way]


def families(random: Random) -> list[Family]:
    """One to three random families of tensors."""
    count = random.randint(1, 5)
    shape = tuple(random.randint(0 if random.random() < 0.1 else 1, 9) for _ in range(random.randint(0, 3)))
    groups = random.randint(1, 4)
    heads = (groups, random.randint(1, 3), random.randint(1, 3))
    q, kv = (groups * heads[1], heads[2]), (groups, heads[2])
    n_experts = random.randint(1, 5)
    options = [
        Family({"one": shape}, lambda r, s: one_tensor(r, "one", shape, s, ["tp", "pp", "ep"])),
        Family({"two": (7, 6)}, lambda r, s: one_tensor(r, "two", (7, 6), s, ["tp", "ep"])),
        Family({f"dense.{k}.w": (4, 3) for k in range(count)}, lambda r, s: layers(r, "dense", count, s)),
        Family({"all": (count, 3, 2)}, lambda r, s: stack(r, "all", s, count)),
        Family(
            {f"moe.{layer}.{k}.w": (3, 2) for layer in range(2) for k in range(n_experts)},
            lambda r, s: experts(r, n_experts, s),
        ),
        Family({"att.q": q, "att.k": kv, "att.v": kv}, lambda r, s: attention(r, heads, s)),
        Family({"embed": (7, 4)}, tied),
    ]
    return random.sample(options, random.randint(1, 3))


def arrays_of(chosen: Sequence[Family]) -> dict[str, Array]:
    """The whole tensors: each element of the model is another number, none is 0, which is padding."""
    arrays = {}
    start = 1
    for family in chosen:
        for name, shape in family.shapes.items():
            arrays[name] = np.arange(start, start + math.prod(shape)).reshape(shape)
            start += math.prod(shape)
    return arrays


def case_of(random: Random, chosen: Sequence[Family], arrays: dict[str, Array]) -> Case:
    """The families under a random layout on a random mesh."""
    names = random.sample(["dp", "cp", "pp", "ep", "tp"], 5)
    while True:
        sizes = {name: random.choice([1, 1, 2, 2, 3, 4]) for name in names}
        if math.prod(sizes.values()) <= 8:
            break
    mesh = Mesh(tuple(names), tuple(sizes.values()))
    ways = [family.way(random, sizes) for family in chosen]
    flats: dict[str, Flat] = {}
    if random.random() < 0.6:
        flats["zero"] = flat_of(random, "zero")
    if random.random() < 0.2:
        flats["each"] = Flat(axis="dp", name="{name}", ragged=random.random() < 0.5)
    rules, spread = [], {}
    into: list[list[str | None]] = []
    for way in ways:
        of_way = []
        for rule in way.rules:
            flat = random.choice([None, *flats])
            of_way.append(flat)
            rules.append(dataclasses.replace(rule, flat=flat))
        into.append(of_way)
        spread |= way.spread
    used = {rule.flat for rule in rules}
    flats = {name: flat for name, flat in flats.items() if name in used}
    random.shuffle(rules)
    layout = Layout(rules=rules, spread=spread, flat=flats)
    ranks = []
    for rank in range(mesh.size):
        at = dict(zip(names, zip(mesh.coordinate(rank), mesh.shape, strict=True), strict=True))
        held: dict[str, Array] = {}
        flattened: dict[str, Locals] = {name: [] for name in flats}
        late: list[tuple[str, tuple[str, Array]]] = []
        for family, way, goes in zip(chosen, ways, into, strict=True):
            found = way.cut({name: arrays[name] for name in family.shapes}, at)
            for name, array in found:
                flat = goes[-1] if name == "out.head" else goes[0]
                if flat is None:
                    held[name] = array
                elif name == "out.head":  # a tied name that the checkpoint does not list comes last
                    late.append((flat, (name, array)))
                else:
                    flattened[flat].append((name, array))
        for flat, item in late:
            flattened[flat].append(item)
        for name, flat in flats.items():
            held |= flat_share(flat, flattened[name], *place(at, flat.axes))
        ranks.append({name: np.ascontiguousarray(array).reshape(array.shape) for name, array in held.items()})
    return Case(layout, mesh, ranks)


def flat_of(random: Random, name: str) -> Flat:
    bucket = random.choice([None, None, random.randint(1, 40)])
    ragged = random.random() < 0.3
    return Flat(
        axis=random.choice(["dp", ("dp", "cp"), ("cp", "dp")]),
        name=name + ("{bucket}" if bucket else ""),
        order=random.choice(["given", "reverse", "name"]),
        align=random.choice([1, 1, 4, 7]),
        total_multiple=1 if ragged else random.choice([1, 8]),
        share_multiple=1 if ragged else random.choice([1, 2]),
        ragged=ragged,
        bucket=bucket,
    )


def flat_share(flat: Flat, items: Locals, ranks: int, index: int) -> dict[str, Array]:
    """What a rank has of the buffers of these tensors, by numpy's concatenate."""
    if flat.order == "reverse":
        items = items[::-1]
    elif flat.order == "name":
        items = sorted(items, key=lambda item: item[0])
    buffers: dict[str, list[Array]] = {}
    bucket = 0
    for name, array in items:
        if flat.name == "{name}":
            called = name
        else:
            called = flat.name.replace("{bucket}", str(bucket))
            if flat.bucket and sum(map(len, buffers.get(called, []))) >= flat.bucket and called in buffers:
                bucket += 1
                called = flat.name.replace("{bucket}", str(bucket))
        parts = buffers.setdefault(called, [])
        filled = sum(map(len, parts))
        parts += [np.zeros(-filled % flat.align, np.int64), array.reshape(-1)]
    shares = {}
    for called, parts in buffers.items():
        whole = np.concatenate(parts)
        if not flat.ragged:
            step = math.lcm(flat.total_multiple, flat.share_multiple * ranks)
            whole = np.concatenate([whole, np.zeros(-len(whole) % step, np.int64)])
        shares[called] = share(whole, 0, ranks, index)
    return shares
