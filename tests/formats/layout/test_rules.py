"""Rules that are wrong, ambiguous, unused, or leave holes or overlaps are refused, with the rule and the tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_formats.errors import LayoutError
from ckpt_formats.geometry import Box, check_cover
from ckpt_formats.layout import Cut, Flat, Layout, Mesh, Pad, Part, Piece, Resolved, Rule, Split, Spread
from ckpt_formats.layout.matching import Found, Logical
from ckpt_formats.layout.patterns import Pattern

MESH = Mesh.parse("dp=2,tp=2,pp=2")
SHAPES = {"layers.0.w": (6, 4), "layers.1.w": (6, 4), "norm.w": (6,), "step": ()}


def refused(toml: str, shapes: Mapping[str, tuple[int, ...]] = SHAPES, mesh: Mesh = MESH) -> str:
    """What a layout is refused with when it is applied to tensors, or written at all."""
    with pytest.raises(LayoutError) as caught:
        Layout.parse(toml, where="cut.toml").resolve(mesh, shapes)
    message = str(caught.value)
    assert message.startswith("cut.toml"), message
    return message


def rule(said: str, rest: str = "[otherwise]\n") -> str:
    return f"[[rule]]\n{said}\n{rest}"


# --- which rule counts


def test_a_tensor_that_two_rules_match_is_refused_with_both_and_unless_tells_them_apart() -> None:
    both = '[[rule]]\nmatch = "layers.*"\n[[rule]]\nmatch = "*.w"\ncut = {axis = "tp", dim = 0}\n'
    message = refused(both)
    assert "the tensor 'layers.0.w' is matched by two rules" in message
    assert 'rule {match = "layers.*"}' in message
    assert 'rule {match = "*.w", cut = {axis = "tp", dim = 0}}' in message
    assert "`unless`" in message
    resolved = Layout.parse(both.replace('"*.w"', '"*.w"\nunless = "layers.*"')).resolve(MESH, SHAPES)
    assert resolved.rule("layers.0.w") == 'rule {match = "layers.*"}'
    assert resolved.boxes("norm.w", 2) == [Box((3,), (3,))]


def test_the_order_of_rules_means_nothing() -> None:
    rules = [Rule(match="layers.0.*", cut=Cut(axis="tp", dim=0)), Rule(match="layers.1.*"), Rule(match="norm.w")]
    one, other = (Layout(rules=order).resolve(MESH, SHAPES) for order in (rules, rules[::-1]))
    assert [one.local(rank) for rank in range(8)] == [other.local(rank) for rank in range(8)]


def test_a_tensor_that_no_rule_matches_is_refused_unless_there_is_an_otherwise() -> None:
    assert "no rule matches the tensor 'norm.w' of shape [6]" in refused(rule('match = "layers.*"', ""))
    resolved = Layout.parse(rule('match = "layers.*"')).resolve(MESH, SHAPES)
    assert resolved.rule("norm.w") == "[otherwise] {}"


def test_a_rule_that_matches_nothing_is_refused() -> None:
    assert 'no tensor of the checkpoint matches rule {match = "layer.*"}' in refused(rule('match = "layer.*"'))


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        (
            rule('match = ["layers.*", "nrom.*"]'),
            'no tensor of the checkpoint matches \'nrom.*\' of rule {match = ["layers.*", "nrom.*"]}',
        ),
        (
            rule('match = "layers.*"\nunless = ["layers.0.*", "layers.9.*"]'),
            "is left out by 'layers.9.*' of its `unless`",
        ),
        (rule('match = "layers.*"\nunless = "norm.*"'), 'nothing that rule {match = "layers.*", unless = "norm.*"}'),
        (
            rule('match = "*"', '[otherwise]\ncut = {axis = "tp", dim = 0}\n'),
            '[otherwise] {cut = {axis = "tp", dim = 0}} is for nothing',
        ),
        (
            '[flat.f]\naxis = "dp"\nname = "f"\norder = ["layers.*", "layer.*"]\n'
            + rule('match = "layers.*"\nflat = "f"'),
            '[flat.f] {axis = "dp", name = "f", order = ["layers.*", "layer.*"]} has \'layer.*\' in its order',
        ),
    ],
)
def test_a_pattern_that_matches_nothing_beside_others_that_do_is_refused(toml: str, says: str) -> None:
    assert says in refused(toml)


def test_what_has_its_use_somewhere_is_no_unused_pattern() -> None:
    # a name that a wider pattern matches too, names of ties that the checkpoint does not list, an empty default
    layout = Layout(
        rules=[
            Rule(match=("layers.*", "layers.0.w", "tied", "entered"), unless=("layers.1.*", "entered")),
            Rule(match=("layers.1.w", "norm.w", "step")),
            Rule(match="entered", tied="norm.w"),
        ],
        otherwise=Rule(),
    )
    assert layout.resolve(MESH, SHAPES, aliases=["tied"]).aliases == {"entered": "norm.w"}
    # of a buffer's order each rank of a pipeline has a part
    flat = Flat(axis="dp", name="f", order=["layers.1.w", "layers.0.w"])
    spread = {"layer": Spread(axis="pp", count=2)}
    rules = [Rule(match="layers.{layer}.w", flat="f", local="layers.{layer.number}.w")]
    layout = Layout(rules=rules, otherwise=Rule(), spread=spread, flat={"f": flat})
    held = layout.resolve(MESH, SHAPES).local(0)["f"]
    assert {piece.tensor for piece in held.pieces} == {"layers.0.w"}


def test_slots_of_an_optimizer_lie_as_their_parameter_when_no_rule_matches_them() -> None:
    shapes = {
        **SHAPES,
        "layers.{odd}": (2, 2),
        "opt.layers.0.w.m": (6, 4),
        "opt.layers.0.w.step": (),
        "opt.odd.{m}": (2, 2),
    }
    owners = {"opt.layers.0.w.m": "layers.0.w", "opt.layers.0.w.step": "layers.0.w", "opt.odd.{m}": "layers.{odd}"}
    layout = Layout.parse(rule('match = "layers.*"\ncut = {axis = "tp", dim = 1}\nlocal = "on.{name}"'))
    held = layout.resolve(MESH, shapes, owners=owners).local(0)
    assert held["on.layers.0.w.m"].shape == held["on.layers.0.w"].shape == (6, 2)
    assert held["opt.layers.0.w.step"].shape == ()
    assert held["on.layers.{odd}.(m)"].shape == (2, 1)


def test_slots_of_joined_parameters_are_joined() -> None:
    shapes = {"q": (4, 2), "k": (2, 2), "opt.q.m": (4, 2), "opt.k.m": (2, 2)}
    layout = Layout(rules=[Rule(match=("q", "k"), join=0, local="qk", cut=Cut(axis="tp", dim=0, parts="joined"))])
    held = layout.resolve(Mesh.parse("tp=2"), shapes, owners={"opt.q.m": "q", "opt.k.m": "k"}).local(1)
    assert {name: tensor.shape for name, tensor in held.items()} == {"qk": (3, 2), "qk.m": (3, 2)}
    assert [str(piece.box) for piece in held["qk.m"].pieces] == ["[2:4,0:2]", "[1:2,0:2]"]


# --- rules that can't be

LAYERS = 'match = "layers.{layer}.w"\n'
SPREAD = '[spread.layer]\naxis = "pp"\n'


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        # words
        ('[[rule]]\nmatch = "*"\ncuts = 1', "rule can't say 'cuts'; it can say boxes, cut, flat"),
        ("[[rule]]\nmatch = 3", "rule: match = 3 has to be a text or a list of texts"),
        ("[rule]", "'rule' has to be tables, each headed [[rule]]"),
        ("[spread]\naxis = 1", "'spread' has to be tables with a name each, headed as [spread.name]"),
        ("otherwise = 1", "'otherwise' has to be a table"),
        ("[[rule]]\n", "it has to match something"),
        ('[otherwise]\nmatch = "*"', "it is for what no rule matches"),
        ('[otherwise]\ntied = "norm.w"', "it has no captures"),
        ('[tp]\n"*" = 0\n' + rule('match = "*"'), "has rules and the short form's table [tp]"),
        (rule('match = "*"\ncut = {dim = 0}'), "a cut {'dim': 0} has to say axis"),
        (rule('match = "*"\ncut = {axis = "tp", dim = -1}'), "a cut: dim = -1 has to be an integer of at least 0"),
        (rule('match = "*"\ncut = {axis = "tp", dim = true}'), "dim = True has to be an integer"),
        (rule('match = "*"\ncut = {axis = "tp", dim = 0, even = 1}'), "even = 1 has to be true or false"),
        (rule('match = "*"\nreplicas = "mean"'), 'has to be "equal" or "first" or "average"'),
        (rule('match = "*"\non = {pp = []}'), "such as {pp = [0, -1]}"),
        (rule('match = "*"\npad = 4'), "a table of dim and to or multiple"),
        (rule('match = "*"\nsplit = 4'), "split = 4 has to be a table of dim, widths"),
        (rule('match = "re:("'), "the pattern 're:(' is no regular expression"),
        (rule('match = "{layer"'), "has a brace that makes no capture"),
        (rule('match = "*"\nlocal = "{layer"'), "has a brace that is no field"),
        (rule('match = "*"\ntied = "layer}"'), "has a brace that is no field"),
        # contradictions
        (
            rule('match = "*"\ncut = {axis = "tp", dim = 0, parts = 2, sizes = [1]}'),
            "say one of parts, sizes and lists",
        ),
        (rule('match = "*"\ncut = {axis = "tp", dim = 0, groups = 2}'), "groups interleave parts; say the parts too"),
        (
            rule('match = "*"\ncut = {axis = "tp", dim = 0, parts = [{width = 2, pieces = 1}], groups = 2}'),
            "groups are cut whole",
        ),
        (
            rule('match = "*"\ncut = {axis = "tp", dim = 0, parts = [{width = 4, sizes = [1, 2]}]}'),
            "its sizes make 3 together, not its width",
        ),
        (
            rule('match = "*"\ncut = {axis = "tp", dim = 0, parts = [{width = 4, sizes = [4], pieces = 1}]}'),
            "say pieces or sizes, not both",
        ),
        (rule('match = "*"\npad = {dim = 0}'), "say either the extent that it pads to, or a multiple"),
        (rule('match = "*"\npad = {dim = 0, to = 8, per = "tp"}'), "per belongs to a multiple"),
        (rule('match = "*"\nlocal = ["a", "b"]'), "local has 2 names for 1 tensors on a rank"),
        (rule('match = "*"\nstack = "layer"'), "needs a name on the ranks"),
        (rule('match = "*"\njoin = 0\nlocal = "a"'), "join needs a pattern for each tensor"),
        (rule('match = "*"\nlike = "a"\non = {pp = [0]}'), "say only local, flat and replicas"),
        (rule('match = "*"\ncut = {axis = "tp", dim = 0, parts = "joined"}'), "say join too"),
        (rule('match = "*"\ntied = "a"\nstack = "b"\nlocal = "c"'), "a tied tensor can't be joined, split or stacked"),
        (rule('match = "*"\ncut = {axis = ["tp", "tp"], dim = 0}'), "names an axis twice"),
        (
            rule('match = "*"\ncut = [{axis = "tp", dim = 0}, {axis = ["dp", "tp"], dim = 0}]'),
            "it uses the axis 'tp' twice",
        ),
        (rule('match = "*"\ncut = {axis = "pp", dim = 0}\non = {pp = [0]}'), "it uses the axis 'pp' twice"),
        (SPREAD + "count = 9999999\n", "count = 9999999 has to be an integer of at least 1 and at most 1048576"),
        (SPREAD, "say either the lists of numbers, or their count"),
        (SPREAD + "lists = [[0], [1, 0]]\n", "the number 0 is in the lists 0 and 1: an overlap"),
        (rule('match = "*"\nflat = "zero"'), "there is no [flat.zero]"),
        ('[flat.zero]\naxis = "dp"\nname = "f"\n' + rule('match = "*"'), "no rule speaks of [flat.zero]"),
        ('[flat.f]\naxis = "dp"\nname = "f{bucket}"\n', "a bucket's size and {bucket} in the name belong together"),
        ('[flat.f]\naxis = "dp"\nname = "f{"\n', "has a brace that is no field"),
        ('[flat.f]\naxis = "dp"\nname = "f"\nragged = true\nshare_multiple = 2\n', "multiples mean nothing"),
        (rule('match = "*"\nboxes = {axis = "tp", held = [["0:1"]]}'), "'0:1' is not a box"),
        (
            rule('match = "*"\nboxes = {axis = "tp", held = [[{box = "[0:1]", at = [0, 0]}]]}'),
            "at has 2 dimensions, and the box 1",
        ),
        (
            rule('match = "*"\nboxes = {axis = "tp", held = [["[0:1]"]], shapes = [[1], [1]]}'),
            "2 shapes and boxes for 1 ranks",
        ),
        (
            rule('match = "*"\nboxes = {axis = "tp", held = [["[0:1]"]]}\ncut = {axis = "dp", dim = 0}'),
            "leave out cut, pad",
        ),
        # on this mesh
        (rule(LAYERS + 'boxes = {axis = "tp", held = [["[0:6,0:4]"]]}'), "it has boxes for 1 ranks, and there are 2"),
        (
            rule(LAYERS + 'boxes = {axis = "tp", held = [["[0:6,0:4]"], ["[6:7,0:4]"]]}'),
            "the box [6:7,0:4] leaves its shape",
        ),
        (
            rule(LAYERS + 'boxes = {axis = "tp", held = [["[0:3,0:4]"], ["[4:6,0:4]"]]}'),
            "the tensor 'layers.0.w': no box covers [3:4,0:4]",
        ),
        (rule(LAYERS + 'boxes = {axis = "tp", held = [["[0:4,0:4]"], ["[3:6,0:4]"]]}'), "overlap in [3:4,0:4]"),
        (
            rule(LAYERS + 'boxes = {axis = "tp", held = [["[0:3,0:4]", "[3:4,0:4]"], ["[4:6,0:4]"]]}'),
            "boxes overlap in the tensor of rank 0",
        ),
        (
            rule(LAYERS + 'boxes = {axis = "tp", held = [["[0:3,0:4]"], ["[3:6,0:4]"]], shapes = [[3, 4], [2, 4]]}'),
            "a box leaves the shape [2, 4] of the tensor of rank 1",
        ),
        (
            rule('match = "layers.*"\ncut = {axis = "ep", dim = 0}'),
            "speaks of the axis 'ep', which the mesh dp=2,tp=2,pp=2",
        ),
        (rule('match = "layers.*"\non = {ep = [0]}'), "speaks of the axis 'ep'"),
        (rule('match = "layers.*"\npad = {dim = 0, multiple = 2, per = "ep"}'), "speaks of the axis 'ep'"),
        (
            '[spread.layer]\naxis = "ep"\ncount = 2\n' + rule(LAYERS),
            '[spread.layer] {axis = "ep", count = 2} speaks of',
        ),
        ('[flat.f]\naxis = "ep"\nname = "f"\n' + rule('match = "layers.*"\nflat = "f"'), "speaks of the axis 'ep'"),
        (rule('match = "layers.*"\non = {pp = [2]}'), "the axis 'pp' has no index 2"),
        (SPREAD + "lists = [[0, 1]]\n" + rule(LAYERS), "has 1 lists, and the mesh dp=2,tp=2,pp=2 needs 2"),
        (SPREAD + "count = 3\n" + rule(LAYERS), "3 can't be spread evenly over 2 stages; say the lists"),
        (SPREAD + "count = 2\n" + rule(LAYERS + "on = {pp = [0]}"), "it is placed on the axis 'pp' twice"),
        (SPREAD + "count = 2\n" + rule(LAYERS + 'cut = {axis = "pp", dim = 0}'), "it uses the axis 'pp' twice"),
        (
            '[flat.f]\naxis = "dp"\nname = "f"\n'
            + rule('match = "layers.*"\nflat = "f"\ncut = {axis = "dp", dim = 0}'),
            "it uses the axis 'dp', and [flat.f] cuts over the same",
        ),
        # for these tensors
        (
            rule('match = "norm.w"\ncut = {axis = "tp", dim = 1}'),
            "the tensor 'norm.w': there is no dimension 1: it has 1",
        ),
        (rule('match = "step"\ncut = {axis = "tp", dim = 0}'), "the tensor 'step': there is no dimension 0: it has 0"),
        (
            rule(LAYERS + 'cut = {axis = "tp", dim = 0, parts = [3, 2]}'),
            "its parts have 5 elements of dimension 0 together, and there are 6",
        ),
        (rule(LAYERS + 'cut = {axis = "tp", dim = 0, parts = 4}'), "6 elements of dimension 0 can't be 4 equal parts"),
        (
            rule(LAYERS + 'cut = {axis = "tp", dim = 0, parts = [4, 2], groups = 4}'),
            "a part of 2 elements can't be made of 4 equal groups",
        ),
        (
            rule(LAYERS + 'cut = {axis = "tp", dim = 0, parts = [3, 3], groups = 3, even = true}'),
            "3 groups don't cut evenly for 2 ranks",
        ),
        (rule(LAYERS + 'cut = {axis = "tp", dim = 0, sizes = [4, 1]}'), "for 2 ranks and 5 elements of dimension 0"),
        (rule(LAYERS + 'cut = {axis = "tp", dim = 0, sizes = [3, 2, 1]}'), "its sizes are for 3 ranks"),
        (
            rule(LAYERS + 'cut = {axis = "tp", dim = 0, parts = [4, {width = 2, pieces = 3}]}'),
            "3 pieces can't be held by 2 ranks",
        ),
        (rule(LAYERS + 'cut = {axis = "tp", dim = 0, unit = 4}'), "are not a multiple of the unit 4"),
        (rule(LAYERS + 'cut = {axis = "tp", dim = 0, unit = 2, even = true}'), "in units of 2 don't cut evenly in 2"),
        (rule(LAYERS + 'cut = {axis = "tp", dim = 0, lists = [[0, 1, 2]]}'), "it has 1 lists for 2 ranks"),
        (
            rule(LAYERS + 'cut = {axis = "tp", dim = 0, lists = [[0, 1], [3, 4, 5]]}'),
            "leave a hole: none has the index 2",
        ),
        (
            rule(LAYERS + 'cut = {axis = "tp", dim = 0, lists = [[0, 1, 2], [2, 3, 4, 5]]}'),
            "its lists 0 and 1 overlap: both have the index 2",
        ),
        (rule(LAYERS + 'cut = {axis = "tp", dim = 0, lists = [[0], [6]]}'), "has the index 6, and the extent is 6"),
        (rule(LAYERS + "pad = {dim = 0, to = 5}"), "has the extent 6 and can't be padded to 5"),
        (rule(LAYERS + 'split = {dim = 0, widths = [4, 1]}\nlocal = ["a{layer}", "b{layer}"]'), "widths of 5 together"),
        (rule('match = "norm.w"\nunstack = ["a", "b"]\nlocal = "{a}.{b}"'), "can't be unstacked 2 times"),
        (
            SPREAD + "lists = [[0], []]\n" + rule(LAYERS),
            "the tensor 'layers.1.w': no list of [spread.layer] has the number 1: a hole",
        ),
        (
            SPREAD + "lists = [[0], []]\n" + rule(LAYERS + 'stack = "layer"\nlocal = "w"'),
            "no list of [spread.layer] has the number 1: a hole",
        ),
        (SPREAD + "lists = [[0], [1, 2]]\n" + rule(LAYERS), "has the number 2, which no tensor that rules match has"),
        (
            SPREAD + "lists = [[0], [1, 2]]\n" + rule(LAYERS + 'stack = "layer"\nlocal = "w"'),
            "has the number 2, and nothing of it can be stacked: a hole",
        ),
        (
            SPREAD + "count = 4\nchunks = 2\n" + rule(LAYERS + 'stack = "layer"\nlocal = "w"'),
            "of which each rank has several stages",
        ),
        (SPREAD + "count = 2\n" + rule('match = "layers.*"'), "is used by no rule; write {layer} in patterns"),
        (
            rule(LAYERS + 'local = "w"'),
            "the tensors 'layers.0.w' and 'layers.1.w' overlap: on the same ranks both are called 'w'",
        ),
        (rule(LAYERS + 'local = "{stage}"'), "has the field 'stage', and it captures none"),
        (
            rule('match = "{part}.w"\nunless = "layers.*"\nstack = "part"\nlocal = "w"'),
            "no tensor of the checkpoint matches",
        ),
        (
            rule('match = "re:(?P<part>norm)[.]w"\nstack = "part"\nlocal = "w"'),
            "which its pattern captures no number as",
        ),
        (
            rule('match = ["layers.{layer}.w", "layers.{layer}.b"]\njoin = 0\nlocal = "wb"'),
            "the tensor 'layers.0.w': nothing that it can be joined with matches 'layers.{layer}.b': a hole",
        ),
        (
            rule('match = ["re:layers.*", "norm.w"]\njoin = 0\nlocal = "all"'),
            "can't be told from 'layers.0.w'; capture more",
        ),
        (
            rule('match = ["layers.0.*", "layers.[01].w"]\njoin = 0\nlocal = "all"'),
            "two of the patterns that it joins match",
        ),
        (rule('match = ["re:layers.0.*", "norm.w"]\njoin = 0\nlocal = "all"'), "can't be joined along dimension 0"),
        (rule('match = "norm.w"\ntied = "nothing"'), "it is tied to 'nothing', which is no other tensor"),
        (rule('match = "norm.w"\ntied = "layers.0.w"'), "it is tied to 'layers.0.w', which has another shape"),
        (
            rule('match = "layers.0.w"\ntied = "layers.1.w"', rule('match = "layers.1.w"\ntied = "layers.0.w"')),
            "which is tied itself",
        ),
        (rule('match = "norm.w"\nlike = "layers.0.w"'), "has the shape [6], not [6, 4]; leave it to another rule"),
        (rule('match = "norm.w"\nlike = "norm.v"'), "it lies as 'norm.v', which is no tensor with a rule of its own"),
        (
            rule('match = "layers.0.w"\nlocal = "w"', rule('match = "layers.1.w"\nlike = "layers.0.w"')),
            "what it lies as has another name on the ranks; say its own as local",
        ),
        (
            '[flat.f]\naxis = "dp"\nname = "f"\norder = ["layers.0.w"]\n' + rule('match = "layers.*"\nflat = "f"'),
            "its order does not have the tensor 'layers.1.w'",
        ),
        (
            '[flat.f]\naxis = "dp"\nname = "{slot}"\n' + rule('match = "layers.*"\nflat = "f"'),
            'has the field \'slot\', and rule {match = "layers.*", flat = "f"} captures none',
        ),
    ],
)
def test_what_can_not_be_is_refused(toml: str, says: str) -> None:
    message = refused(toml)
    assert says in message


def test_a_rank_can_not_have_a_buffer_and_a_tensor_of_one_name() -> None:
    layout = Layout(
        rules=[Rule(match="layers.*", flat="f"), Rule(match="norm.w")], flat={"f": Flat(axis="dp", name="norm.w")}
    )
    with pytest.raises(LayoutError, match=r"a rank has two tensors of the name 'norm\.w'"):
        layout.resolve(MESH, SHAPES)


def test_stacks_with_a_missing_combination_have_a_hole() -> None:
    shapes = {"0.0": (2,), "0.1": (2,), "1.0": (2,)}
    message = refused(rule('match = "{layer}.{expert}"\nstack = ["layer", "expert"]\nlocal = "all"', ""), shapes)
    assert "there is no tensor of layer 1, expert 1 to stack: a hole" in message


def test_stacks_without_a_spread_have_no_number_left_out_but_before_the_first() -> None:
    stacked = rule('match = "layers.{layer}.w"\nstack = "layer"\nlocal = "w"', "")
    message = refused(stacked, {"layers.0.w": (2,), "layers.2.w": (2,), "layers.4.w": (2,)})
    assert "there is no tensor of layer 1 to stack: a hole; if there should be none, say by the lists" in message
    # whose first layers are of another kind
    held = Layout.parse(stacked).resolve(MESH, {"layers.2.w": (2,), "layers.3.w": (2,)}).local(0)
    assert held["w"].shape == (2, 2)
    spread = '[spread.layer]\naxis = "pp"\nlists = [[0, 4], [2]]\n'
    shapes = {f"layers.{layer}.w": (2,) for layer in (0, 2, 4)}
    assert Layout.parse(spread + stacked).resolve(MESH, shapes).local(0)["w"].shape == (2, 2)


def test_what_leaves_holes_or_overlaps_is_refused_by_its_geometry_alone() -> None:
    """Whatever the rules' own checks let through: here, what they say is replaced by something else."""
    rule = Rule(match="w", split=Split(dim=0, widths=[3, 3]), local=["a", "b"])

    def check(*windows: tuple[int, int]) -> None:
        found = Found(rules={"w": rule})
        for number, window in enumerate(windows):
            found.logicals.append(
                Logical(
                    rule=rule,
                    by=rule,
                    local=str(number),
                    captures={},
                    sources={(): ("w",)},
                    shapes=((6, 2),),
                    window=window,
                )
            )
        Resolved(MESH, {"w": (6, 2)}, found, {}, {}, "cut.toml").check()

    check((0, 3), (3, 6))
    with pytest.raises(LayoutError, match=r"rule .*'w': no box covers \[3:4,0:2\]") as caught:
        check((0, 3), (4, 6))
    assert caught.value.tensor == "w"
    with pytest.raises(LayoutError, match=r"rule .*'w': boxes .* overlap in \[2:3,0:2\]"):
        check((0, 3), (2, 6))


def test_a_dimension_that_is_no_number_of_layers_is_not_unstacked() -> None:
    message = refused(rule('match = "w"\nunstack = "layer"\nlocal = "{layer}"'), {"w": (1 << 40, 2)})
    assert "it would be unstacked into more than 1048576 tensors" in message


# --- patterns


@pytest.mark.parametrize(
    ("pattern", "name", "captures"),
    [
        ("a.*.w", "a.b.c.w", {"__0": "b.c"}),
        ("a.?.[!x]", "a.b.y", {"__0": "b", "__1": "y"}),
        ("a.?.[!x]", "a.b.x", None),
        ("{layer}.w", "12.w", {"layer": "12"}),
        ("{layer}.w", "x.w", None),
        ("{any}.w", "x.y.w", None),
        ("{any*}.w", "x.y.w", {"any": "x.y"}),
        ("{a}.{a}", "x.x", {"a": "x"}),
        ("{a}.{a}", "x.y", None),
        ("a+b", "aab", None),
        ("[^a]", "^", {"__0": "^"}),
        ("re:l(?P<layer>\\d)\\..*", "l3.w", {"layer": "3"}),
        ("re:l", "l3", None),
    ],
)
def test_patterns(pattern: str, name: str, captures: dict[str, str] | None) -> None:
    assert Pattern(pattern, {"layer"}).match(name) == captures


# --- words in TOML and Python

numbers = st.integers(0, 2**40)
axes = st.sampled_from(["tp", "dp"])
words = st.text(min_size=1, max_size=8)
names = st.text(st.characters(exclude_characters="{}"), min_size=1, max_size=8)  # braces need a pattern
parts = st.builds(Part, width=st.integers(1, 99)) | st.builds(Part, width=st.just(8), pieces=st.integers(1, 9))
cuts = st.builds(
    Cut, axis=axes, dim=numbers, parts=st.none() | st.integers(1, 9) | st.lists(parts, min_size=1, max_size=3)
)
plain = st.text("abc.", min_size=1, max_size=5)
any_rule = st.builds(
    Rule,
    match=plain | st.lists(plain, min_size=1, max_size=3),
    unless=st.just(()) | plain,
    local=st.none() | names,
    on=st.just({})
    | st.dictionaries(st.sampled_from(["pp", "x y"]), st.lists(st.integers(-3, 3), min_size=1), min_size=1),
    pad=st.just(()) | st.builds(Pad, dim=numbers, to=numbers),
    cut=st.just(()) | cuts | st.lists(cuts, min_size=1, max_size=1),
    tied=st.none() | names,
    replicas=st.sampled_from(["equal", "first", "average"]),
)
spreads = st.builds(
    Spread, axis=words, count=st.integers(1, 99), chunks=st.integers(1, 3), order=st.sampled_from(["loop", "v"])
)


@given(st.lists(any_rule, min_size=1, max_size=4), st.dictionaries(words, spreads, max_size=2), st.booleans())
def test_what_is_written_as_toml_is_read_the_same(rules: list[Rule], spread: dict[str, Spread], rest: bool) -> None:
    layout = Layout(rules=rules, spread=spread, otherwise=Rule() if rest else None)
    assert Layout.parse(layout.to_toml()) == layout


@given(st.dictionaries(words, st.dictionaries(plain, st.integers(0, 9) | st.just("replicate")), max_size=3))
def test_the_short_form_is_written_and_read_the_same(tables: dict[str, dict[str, int | str]]) -> None:
    reserved = {"rule", "otherwise", "spread", "flat"}
    layout = Layout({axis: table for axis, table in tables.items() if axis not in reserved})
    assert Layout.parse(layout.to_toml()) == layout


def test_words_that_can_not_be_are_refused_in_python_too() -> None:
    with pytest.raises(LayoutError, match="dim = '0' has to be an integer"):
        Cut(axis="tp", dim="0")  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="widths = \\[\\] has to be a list of widths"):
        Split(dim=0, widths=[])  # type: ignore[arg-type]


# --- the short form comes to the same


@given(
    st.tuples(st.integers(0, 20), st.integers(0, 20)), st.lists(st.sampled_from([None, 0, 1]), min_size=3, max_size=3)
)
def test_the_short_form_and_rules_come_to_the_same_boxes(shape: tuple[int, int], dims: list[int | None]) -> None:
    short = Layout(
        {axis: {"w": "replicate" if dim is None else dim} for axis, dim in zip(MESH.names, dims, strict=True)}
    )
    cuts_of = [Cut(axis=axis, dim=dim) for axis, dim in zip(MESH.names, dims, strict=True) if dim is not None]
    rules = Layout(rules=[Rule(match="w", cut=cuts_of[::-1])])
    one, other = short.resolve(MESH, {"w": shape}), rules.resolve(MESH, {"w": shape})
    assert one.cut("w") == other.cut("w")
    for rank in range(MESH.size):
        assert one.boxes("w", rank) == other.boxes("w", rank)
        assert one.local(rank) == other.local(rank)


# --- how a layout is told where a manifest has words for it, and where it has none


def test_cuts_are_told_in_a_manifests_words_where_these_say_enough() -> None:
    layout = Layout(
        rules=[
            Rule(match="a", cut=[Cut(axis="tp", dim=0), Cut(axis="dp", dim=0)]),
            Rule(match="b", cut=Cut(axis="tp", dim=0, parts=2), on={"pp": [1]}),
            Rule(match="c", cut=Cut(axis="tp", dim=1), flat="f"),
        ],
        flat={"f": Flat(axis="dp", name="f")},
    )
    resolved = layout.resolve(MESH, {"a": (8,), "b": (8,), "c": (2, 2)})
    assert resolved.cut("a") == "SS(0,2)@dp S(0)@tp R@pp"
    assert resolved.cut("b") == "R@dp cut(0)@tp placed@pp"
    assert resolved.cut("c") == "flat@dp S(1)@tp R@pp"


def test_a_recorded_cut_that_is_more_than_a_dimension_is_not_taken_up_silently() -> None:
    with pytest.raises(LayoutError, match=r"was cut by cut\(0\)@tp, which is more than a dimension; say how"):
        Layout().cuts(Mesh.parse("tp=2"), {"w": (4,)}, recorded={"w": "cut(0)@tp"})


# --- pieces


def test_a_piece_can_not_be_seen_outside_of_memory_or_in_what_is_not_contiguous() -> None:
    piece = Piece("w", Box((0, 0), (2, 2)), 1, (3, 1))
    assert piece.view(np.arange(6)).tolist() == [[1, 2], [4, 5]]
    assert piece.view(np.arange(6).reshape(2, 3)).tolist() == [[1, 2], [4, 5]]
    with pytest.raises(ValueError, match="contiguous"):
        piece.view(np.arange(12)[::2])
    with pytest.raises((ValueError, TypeError)):
        piece.view(np.arange(5))
    empty = Piece("w", Box((0, 0), (0, 2)), 9, (3, 1))
    assert empty.view(np.arange(2)).shape == (0, 2)


@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 4))
def test_any_dimension_is_cut_without_holes(extent: int, ranks: int, unit: int) -> None:
    resolved = Layout(rules=[Rule(match="w", cut=Cut(axis="tp", dim=0, unit=unit))]).resolve(
        Mesh(("tp",), (ranks,)), {"w": (extent * unit,)}
    )
    boxes = [box for rank in range(ranks) for box in resolved.boxes("w", rank)]
    check_cover(
        (extent * unit,),
        np.array([box.offsets for box in boxes], np.int64).reshape(-1, 1),
        np.array([box.sizes for box in boxes], np.int64).reshape(-1, 1),
    )
