"""Whole models: exactness, budgets, gates, every arm, bad input, saving and rebuilding."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_prep.errors import UserError
from pipeline.inherit import inherit, rebuild
from pipeline.inherit.factorize import ARMS
from pipeline.inherit.layers import InheritedConv2d, InheritedLinear

RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "patch_size": None},
    "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 64, "heads": 4, "layers": 2},
}
VIT = RESNET | {
    "vision_cfg": {"layers": 2, "width": 64, "head_width": 16, "image_size": 32, "patch_size": 8}
}
PACKED = RESNET | {"vision_cfg": VIT["vision_cfg"] | {"block_type": "custom"}}
TIMM = RESNET | {
    "vision_cfg": {
        "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear",
        "image_size": 160,
    }
}  # fmt: skip


def build(config: dict) -> nn.Module:
    from open_clip.model import CLIP

    torch.manual_seed(0)
    model = CLIP(**copy.deepcopy(config), nonscalar_logit_scale=True)
    with torch.no_grad():  # a little training in miniature: statistics that belong to the data
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                module.momentum = None
        model.train().encode_image(pairs(config, 16, seed=9)[0])
    return model.eval()


def pairs(config: dict, count: int = 8, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size, text = config["vision_cfg"]["image_size"], config["text_cfg"]
    images = torch.randn(count, 3, size, size, generator=generator)
    tokens = torch.randint(1, 590, (count, text["context_length"]), generator=generator)
    ends = torch.randint(3, text["context_length"], (count,), generator=generator)
    for row, end in zip(tokens, ends, strict=True):
        row[end], row[end + 1 :] = 599, 0
    return images, tokens


@torch.no_grad()
def outputs(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    both = [model.encode_image(batch[0]), model.encode_text(batch[1])]
    return torch.cat([nn.functional.normalize(t, dim=-1) for t in both])


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return build(RESNET)


@pytest.mark.parametrize(
    "config", [RESNET, VIT, PACKED, TIMM], ids=["resnet", "vit", "packed", "timm"]
)
@pytest.mark.parametrize("heads", [1, 3])
def test_full_rank_equals_the_teacher(config: dict, heads: int) -> None:
    model = build(config)
    before = copy.deepcopy(model.state_dict())
    calibration = pairs(config)
    for arm in ("svd", "activation", "sequential"):
        new, plan = inherit(model, "rank=1.0", calibration, heads, arm, batchnorm=False)
        other = pairs(config, seed=5)
        assert (outputs(new, other) - outputs(model, other)).abs().max() < 1e-4
        assert all(layer.rank is not None for layer in plan.layers)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"the teacher's {key} changed"


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_rebuilds_and_all_its_parameters_learn(teacher: nn.Module, arm: str) -> None:
    batch = pairs(RESNET)
    new, plan = inherit(teacher, "params=0.5", batch, 3, arm)
    assert plan.notes["audit"] < 1e-5
    assert plan.total_after == sum(p.numel() for p in new.parameters())
    assert plan.total_after == sum(t["after"] for t in plan.towers.values())
    assert 0.49 * plan.total_before <= plan.total_after <= 0.5 * plan.total_before
    json.dumps(plan.to_dict())
    fresh = build(RESNET)
    rebuild(fresh, json.loads(json.dumps(plan.structure)))
    fresh.load_state_dict(new.state_dict())
    torch.testing.assert_close(outputs(fresh, batch), outputs(new, batch))
    new.train()
    loss = new.encode_image(batch[0]).square().mean() + new.encode_text(batch[1]).square().mean()
    loss.backward()
    missing = [n for n, p in new.named_parameters() if p.grad is None and n != "logit_scale"]
    assert not missing
    assert all(p.is_contiguous() for p in new.parameters())


@pytest.mark.parametrize(
    ("arm", "moves"), [("svd", False), ("activation", True), ("sequential", True)]
)
def test_gates_learn_only_where_the_heads_differ(teacher: nn.Module, arm: str, moves: bool) -> None:
    new, _ = inherit(teacher, "params=0.5", pairs(RESNET), 3, arm)
    images, tokens = pairs(RESNET, seed=3)
    v, t = new.encode_image(images, normalize=True), new.encode_text(tokens, normalize=True)
    nn.functional.cross_entropy(10 * v @ t.T, torch.arange(len(v))).backward()
    layers = [m for m in new.modules() if isinstance(m, InheritedConv2d | InheritedLinear)]
    gradients = [float(m.gate.weight.grad.abs().max()) for m in layers]
    if moves:
        assert min(gradients) > 0
    else:
        assert max(gradients) < 1e-7


@pytest.mark.parametrize("unit", ["params", "weights", "macs"])
@pytest.mark.parametrize("allocator", ["fraction", "energy", "sensitivity", "balanced"])
def test_budgets_of_models_hold(teacher: nn.Module, unit: str, allocator: str) -> None:
    batch = pairs(RESNET)
    for share, heads in ((0.35, 1), (0.6, 3), (0.5, "auto")):
        _, plan = inherit(
            teacher, f"{unit}={share}", batch, heads, "activation", allocator=allocator
        )
        if unit == "params":
            achieved = plan.total_after / plan.total_before
        elif unit == "macs":
            achieved = plan.macs_after / plan.macs_before
        else:
            gone = plan.total_before - plan.total_after
            dense = sum(torch.Size(layer.shape).numel() for layer in plan.layers)
            achieved = 1 - gone / dense
        assert share - 0.01 <= achieved <= share + 1e-9


def test_the_default_arm_follows_from_the_calibration_data(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inherit(teacher, "params=0.5")[1].arm == "svd"
    assert inherit(teacher, "params=0.5", pairs(RESNET))[1].arm == "sequential"
    monkeypatch.setattr("pipeline.inherit.sequential.LARGEST", 1000)
    assert inherit(teacher, "params=0.5", pairs(RESNET))[1].arm == "activation"


def test_padding_never_enters(teacher: nn.Module) -> None:
    images, tokens = pairs(RESNET)
    longer = tokens.clone()
    for row in longer:
        row[int(row.argmax()) + 1 :] = 7  # other padding: causal attention hides it from the output
    one, _ = inherit(teacher, "params=0.5", (images, tokens), 1)
    two, _ = inherit(teacher, "params=0.5", (images, longer), 1)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_activation_beats_svd_on_data_with_structure() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 30))
    x = torch.randn(512, 4) @ torch.randn(4, 40) + 0.05 * torch.randn(512, 40)
    errors = {}
    for arm in ("svd", "activation", "sequential"):
        new, plan = inherit(model, "weights=0.4", x, 1, arm, include=("0", "2"))
        errors[arm] = float((new(x) - model(x)).square().mean().detach())
    assert errors["activation"] < 0.5 * errors["svd"]
    assert errors["sequential"] < 1.1 * errors["activation"]
    assert [layer.name for layer in plan.layers] == ["0", "2"]
    assert plan.layers[1].error is not None


def test_fidelity_and_latency_budgets(teacher: nn.Module) -> None:
    batch = pairs(RESNET, 16)
    new, plan = inherit(teacher, "fidelity=0.95", batch, 1)
    cosine = (outputs(new, batch) * outputs(teacher, batch)).sum(dim=-1).mean()
    assert cosine >= 0.95 - 1e-4
    assert plan.total_after < plan.total_before
    fast, _ = inherit(teacher, "latency=1.0", batch, 1)
    assert sum(p.numel() for p in fast.parameters()) > 0


def test_cached_moments_give_the_same_model(teacher: nn.Module, tmp_path: Path) -> None:
    batch = pairs(RESNET)
    one, _ = inherit(teacher, "params=0.5", batch, 3, cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    two, plan = inherit(teacher, "params=0.5", batch, 3, cache=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert plan.macs_before
    inherit(teacher, "params=0.5", pairs(RESNET, seed=4), 3, cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_bad_input_is_refused_by_name(teacher: nn.Module) -> None:
    batch = pairs(RESNET)
    broken = copy.deepcopy(teacher)
    broken.visual.layer2[0].conv1.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"visual\.layer2\.0\.conv1.*NaN"):
        inherit(broken, "params=0.5", batch)
    broken.visual.layer2[0].conv1.weight.data[0, 0] = float("-inf")
    with pytest.raises(UserError, match=r"visual\.layer2\.0\.conv1.*NaN or Inf"):
        inherit(broken, "params=0.5", arm="svd")
    with pytest.raises(UserError, match="rank 1 everywhere needs"):
        inherit(teacher, "params=0.001", batch)
    for budget in ("params=0", "params=1.5", "params", "size=0.3", "params=nan"):
        with pytest.raises(UserError, match="is not a budget"):
            inherit(teacher, budget, batch)
    with pytest.raises(UserError, match="needs calibration data"):
        inherit(teacher, "params=0.5", arm="activation")
    with pytest.raises(UserError, match="is empty"):
        inherit(teacher, "params=0.5", [])
    with pytest.raises(UserError, match=r"no layer is left"):
        inherit(teacher, "params=0.5", batch, include=("nothing.*",))
    with pytest.raises(UserError, match="unknown arm"):
        inherit(teacher, "params=0.5", batch, arm="magic")
    images = batch[0].clone()
    images[0] = float("inf")
    with pytest.raises(UserError, match="NaN or infinite"):
        inherit(teacher, "params=0.5", (images, batch[1]))
    with pytest.raises(UserError, match=r"no layer 'visual\.nowhere'"):
        rebuild(build(RESNET), [{"name": "visual.nowhere", "kind": "conv", "rank": 2, "heads": 1}])
    entry = {"name": "transformer.resblocks.0.mlp.c_fc", "kind": "linear", "rank": 0, "heads": 1}
    with pytest.raises(UserError, match="rank and heads must be at least 1"):
        rebuild(build(RESNET), [entry])
    entry = {"name": "transformer.resblocks.0.mlp.c_fc", "kind": "conv", "rank": 2, "heads": 1}
    with pytest.raises(UserError, match="it is a linear layer"):
        rebuild(build(RESNET), [entry])


def test_dead_singular_and_unsupported_layers() -> None:
    torch.manual_seed(0)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zero, self.live = nn.Linear(20, 30), nn.Linear(30, 40)
            self.tied, self.twin = nn.Linear(40, 40), nn.Linear(40, 40)
            self.twin.weight = self.tied.weight
            self.unused, self.conv1d = nn.Linear(9, 9), nn.Conv1d(1, 4, 3)
            nn.init.zeros_(self.zero.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.twin(self.tied(self.live(self.zero(x))))
            return self.conv1d(y[:, None]).mean(dim=1)

    model = Odd()
    x = torch.zeros(16, 20)  # singular, even zero, moments
    for arm in ("svd", "activation", "sequential"):
        new, plan = inherit(model, "rank=0.5", x, 1, arm)
        assert torch.isfinite(new(x)).all()
        by_name = {layer.name: layer for layer in plan.layers}
        assert "shares its weight" in by_name["tied"].reason
        assert "never ran" in by_name["unused"].reason
        assert by_name["zero"].rank is not None
        assert plan.notes["unsupported"][0]["name"] == "conv1d"


def test_sequence_gates_ignore_padding_and_survive_copies(teacher: nn.Module) -> None:
    images, tokens = pairs(RESNET)
    new, plan = inherit(teacher, "params=0.5", (images, tokens), 3, gate="sequence")
    with torch.no_grad():  # gates that do look at their input
        for module in new.modules():
            if isinstance(module, InheritedLinear) and module.gate is not None:
                nn.init.normal_(module.gate.weight)
    longer = tokens.clone()
    for row in longer:
        row[int(row.argmax()) + 1 :] = 7
    fresh = build(RESNET)
    rebuild(fresh, plan.structure)
    fresh.load_state_dict(new.state_dict())
    expected = outputs(new, (images, tokens))
    for model in (new, copy.deepcopy(new), fresh):
        torch.testing.assert_close(outputs(model, (images, longer)), expected)


def test_groups_of_layers_have_their_own_budgets(teacher: nn.Module) -> None:
    batch = pairs(RESNET)
    shares = {"visual.*": "params=0.6", "*": "params=0.4"}
    new, plan = inherit(teacher, shares, batch, 1)
    for tower, share in (("visual", 0.6), ("text", 0.4)):
        counts = plan.towers[tower]
        assert share - 0.01 <= counts["after"] / counts["before"] <= share
    assert [part["group"] for part in plan.notes["groups"]] == ["visual.*:params=0.6", "params=0.4"]
    assert plan.notes["groups"][0]["after"] == plan.towers["visual"]["after"]
    assert "budget visual.*:params=0.6: " in plan.table()
    again, _ = inherit(teacher, ["visual.*:params=0.6", "params=0.4"], batch, 1)
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), again.parameters(), strict=True))
    # the first glob that matches counts; what none matches stays dense
    first = {"visual.layer3.*": "weights=0.7", "visual.*": "macs=0.5"}
    _, plan = inherit(teacher, first, batch, 1)
    for layer in plan.layers:
        if not layer.name.startswith("visual."):
            assert layer.rank is None
            assert "no group" in layer.reason
    own = [x for x in plan.layers if x.name.startswith("visual.layer3.")]
    kept = sum(layer.params_after for layer in own) / sum(layer.params_before for layer in own)
    assert 0.69 <= kept <= 0.7


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"visual.*": "latency=0.5", "*": "params=0.4"}, "latency belongs to a whole model"),
        (["*:params=0.5", "params=0.4"], "exactly one share"),
        ({}, "exactly one share"),
        ({"visual.*": "params=2"}, "is not a budget"),
        ({"*": "params=0.5", "visual.*": "params=0.6"}, r"visual.*no layer is left"),
    ],
)
def test_wrong_budgets_of_groups_are_refused(teacher: nn.Module, budget: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        inherit(teacher, budget, pairs(RESNET), 1)
