"""What is promised of saving from GPUs: the values of the step, without the host waiting, whatever the GPU still does.

Needs a GPU; skipped where there is none.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def trained(width: int = 2048) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4))).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    data = torch.randn(256, model[0].in_features, device="cuda")  # type: ignore[index]
    model(data).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_steps_that_are_enqueued_at_once_do_not_reach_what_is_saved(tmp_path: Path) -> None:
    model, optimizer = trained()
    pending = []
    expected = []
    for k in range(8):
        expected.append({name: value.clone() for name, value in model.state_dict().items()})
        pending.append(ckpt.async_save({"model": model, "optimizer": optimizer}, tmp_path / str(k)))
        step(model, optimizer)
    for k, save in enumerate(pending):
        save.wait(120)
        with ckpt.open(tmp_path / str(k)) as saved:
            for name, value in expected[k].items():
                assert torch.equal(saved[f"model.{name}"][...], value.cpu()), (k, name)


def test_buffers_may_be_changed_right_after_the_call(tmp_path: Path) -> None:
    held = {"buffer": torch.zeros(1 << 24, device="cuda")}
    for k in range(8):
        held["buffer"].fill_(k)
        pending = ckpt.async_save(held, tmp_path / str(k))
        held["buffer"].fill_(-1)
        pending.wait(120)
        with ckpt.open(tmp_path / str(k)) as saved:
            assert saved["buffer"][...].eq(k).all(), k


def test_a_change_by_somebody_else_is_found_out(tmp_path: Path) -> None:
    model, optimizer = trained()
    ckpt.async_save({"model": model, "optimizer": optimizer}, tmp_path / "first").wait(120)
    step(model, optimizer)
    # what the GPU computes meanwhile keeps the copies from being done before the weight is changed
    for _ in range(200):
        model(torch.randn(4096, 2048, device="cuda"))
    pending = ckpt.async_save({"model": model, "optimizer": optimizer}, tmp_path / "second")
    with torch.no_grad():
        model[0].weight.add_(1)  # type: ignore[index,union-attr]
    with pytest.raises(ckpt.CheckpointError, match="was changed while it was captured"):
        pending.wait(120)


def test_a_save_reads_what_another_stream_has_computed(tmp_path: Path) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        value = torch.ones(4096, 4096, device="cuda")
        for _ in range(50):
            value = value @ torch.eye(4096, device="cuda")
        value += 1
        ckpt.save({"value": value}, tmp_path / "saved")
    with ckpt.open(tmp_path / "saved") as saved:
        assert saved["value"][...].eq(2).all()
