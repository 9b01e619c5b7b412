"""A layout applied to the tensors of a checkpoint. Reads the manifest only, no files."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_formats.describing import cut_of
from ckpt_formats.layout.layout import Layout
from ckpt_formats.layout.mesh import Mesh
from ckpt_formats.layout.resolved import Resolved
from ckpt_formats.manifest import Manifest

__all__ = ["resolve", "slot_owners"]


def resolve(manifest: Manifest, mesh: Mesh, layout: Layout) -> Resolved:
    """What a layout says about a checkpoint's tensors on a mesh. LayoutError as of Layout.resolve."""
    metas = manifest.model_tensors
    recorded = {name: cut for name, meta in metas.items() if (cut := cut_of(manifest, meta)) is not None}
    shapes = {name: meta.shape for name, meta in metas.items()}
    return layout.resolve(mesh, shapes, recorded=recorded, owners=slot_owners(manifest), aliases=manifest.aliases)


def slot_owners(manifest: Manifest) -> dict[str, str]:
    """Name of each optimizer slot -> name of the parameter that it belongs to."""
    owners: dict[str, str] = {}
    for entry, facts in manifest.entries.items():
        modules = facts.get("modules")
        if facts.get("kind") != "optimizer" or not isinstance(modules, Mapping):
            continue
        prefix = f"{entry}.state."
        home = f"{modules['']}." if "" in modules else ""
        for name in manifest.tensors:
            if not name.startswith(prefix):
                continue
            parameter = home + name[len(prefix) :]
            # slots have no dots as a rule, but nothing forbids them
            while "." in parameter:
                parameter = parameter.rpartition(".")[0]
                if parameter in manifest.tensors or parameter in manifest.aliases:
                    owners[name] = manifest.aliases.get(parameter, parameter)
                    break
    return owners
