"""Every loss against an independent derivation, its gradient against finite differences."""

from __future__ import annotations

from typing import Any

import objective_formulas as naive
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.errors import UserError
from pipeline.objectives import REGISTRY, Features, Objective, bounded_scale, build
from pipeline.objectives import mask_patches as hide

B, D, WIDE = 5, 4, 6
# those that look inside are tested in a training: tests/pipeline/test_training_options.py
ON_EMBEDDINGS = [name for name, entry in REGISTRY.items() if not entry.inside]


def rows(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wild = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return F.normalize(wild, dim=1).requires_grad_()


def features(width: int, seed: int, scale: float, count: int = B) -> Features:
    factor = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    return Features(rows(count, width, seed), rows(count, width, seed + 1), factor)


def objective(config: Any, teacher_dim: int = D) -> Objective:
    return build(config, D, teacher_dim).double()


def value(name: str, student: Features, teacher: Features, **views: Tensor) -> Tensor:
    return objective({name: 1}, teacher.image.shape[1])(student, teacher, **views)[name]


@pytest.fixture
def student() -> Features:
    return features(D, 10, 7.0)


@pytest.fixture
def teacher() -> Features:
    return features(D, 20, 13.0)


def spread(student: Features, teacher: Features) -> tuple[Tensor, ...]:
    return (
        *(student.image, student.text, student.scale),
        *(teacher.image, teacher.text, teacher.scale),
    )


def expected(name: str, student: Features, teacher: Features, masked: Tensor) -> Tensor:
    v, t, s, V, T, sT = spread(student, teacher)
    modules = objective({name: 1}).losses[name]
    own = torch.tensor(1 / 0.07, dtype=torch.float64)
    if name == "task":
        return naive.info_nce(s, v, t)
    if name == "crd":
        return naive.relational(v, t, s, V, T, sT)
    if name == "fd":
        return naive.squared_distance(v, V) + naive.squared_distance(t, T)
    if name == "mfd":
        return naive.squared_distance(masked, V) + naive.squared_distance(t, T)
    if name == "gd":
        return naive.gradient_distance(v, t, s, V, T, sT)
    if name == "icl":
        return 0.5 * (naive.cross_entropy(own, v, T) + naive.cross_entropy(own, t, V))
    if name == "afd":
        image, text = naive.fused(modules.image, v, V), naive.fused(modules.text, t, T)
        return naive.info_nce(own, image, text)
    if name == "logit_kl":
        entropy = naive.kl_rows(sT * V @ T.T, 0 * V @ T.T) + naive.kl_rows(
            sT * T @ V.T, 0 * V @ V.T
        )
        constant = torch.log(torch.tensor(float(B), dtype=torch.float64)) - 0.5 * entropy
        return naive.relational(v, t, s, V, T, sT) + constant
    assert name == "kd"
    soft = naive.relational(v, t, s / 2, V, T, sT / 2)
    return 0.5 * naive.info_nce(s, v, t) + 0.5 * 4 * soft


@pytest.mark.parametrize("name", ON_EMBEDDINGS)
def test_value_and_gradient_are_the_formula(
    name: str, student: Features, teacher: Features
) -> None:
    masked = rows(B, D, 30)
    inputs = [student.image, student.text, student.scale, masked]
    views = {"masked_image": masked} if REGISTRY[name].view else {}
    ours, right = value(name, student, teacher, **views), expected(name, student, teacher, masked)
    # 1/0.07 is kept as a float32 logarithm: 1e-7 of its own
    torch.testing.assert_close(ours, right, rtol=2e-7, atol=1e-12)
    got = torch.autograd.grad(ours, inputs, allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(right, inputs, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("width", [D, WIDE])
@pytest.mark.parametrize("name", ON_EMBEDDINGS)
def test_gradcheck_of_features_and_parameters(name: str, width: int) -> None:
    module = objective({name: {"weight": 3} if name != "gd" else 100}, width)
    student, teacher = features(D, 1, 3.0, 3), features(width, 2, 4.0, 3)
    masked = rows(3, D, 3)
    views = {"masked_image": masked} if REGISTRY[name].view else {}
    parameters = list(module.parameters())

    def run(image: Tensor, text: Tensor, scale: Tensor, *_: Tensor) -> Tensor:
        return module(Features(image, text, scale), teacher, **views)[name]

    inputs = (student.image, student.text, student.scale, *views.values(), *parameters)
    assert torch.autograd.gradcheck(run, inputs, atol=1e-5)


def test_distill_is_open_clips_loss(student: Features, teacher: Features) -> None:
    v, t, s, V, T, sT = spread(student, teacher)
    theirs = open_clip.loss.DistillClipLoss()(v, t, s, V, T, sT, output_dict=True)
    ours = objective("distill")(student, teacher)
    torch.testing.assert_close(ours["task"], theirs["contrastive_loss"])
    torch.testing.assert_close(ours["logit_kl"], theirs["distill_loss"])


def test_terms_carry_their_weights_and_clip_kd_is_its_four_terms(
    student: Features, teacher: Features
) -> None:
    terms = objective("clip_kd")(student, teacher)
    assert list(terms) == ["task", "crd", "fd", "icl"]
    torch.testing.assert_close(terms["fd"], 2000 * value("fd", student, teacher))
    torch.testing.assert_close(terms["crd"], value("crd", student, teacher))


@pytest.mark.parametrize("width", [D, WIDE])
def test_every_parameter_and_feature_gets_a_gradient_and_the_teacher_none(width: int) -> None:
    for config in ["task", "clip_kd", "kd", *({name: 1} for name in ON_EMBEDDINGS)]:
        module = objective(config, width)
        student, teacher = features(D, 1, 3.0), features(width, 2, 4.0)
        sum(module(student, teacher, masked_image=rows(B, D, 3)).values()).backward()
        everything = [student.image, student.text, student.scale, *module.parameters()]
        assert all(tensor.grad is not None for tensor in everything), config
        assert teacher.image.grad is None
        assert teacher.scale.grad is None


def test_a_linear_map_exists_only_where_widths_differ_and_losses_want_it() -> None:
    assert build("clip_kd", D, D).maps is None
    assert build({"crd": 1, "afd": 1}, D, WIDE).maps is None
    assert build("clip_kd", D, WIDE).maps is not None


# --- regressions of the released CLIP-KD code
# -------------------------------------------------------


def test_mfd_uses_the_masked_features(student: Features, teacher: Features) -> None:
    masked = rows(B, D, 99)
    loss = value("mfd", student, teacher, masked_image=masked)
    assert loss != value("fd", student, teacher)
    assert torch.autograd.grad(loss, masked)[0].abs().sum() > 0
    with pytest.raises(ValueError, match="masked_image"):
        value("mfd", student, teacher)


def test_one_process_without_a_process_group_works(student: Features, teacher: Features) -> None:
    assert not torch.distributed.is_initialized()
    assert objective("clip_kd")(student, teacher)["task"].isfinite()


@pytest.mark.parametrize("name", ["icl", "afd"])
def test_own_scales_are_exponentiated_one_element_and_bounded(name: str) -> None:
    parameter = build({name: {"weight": 1, "scale": 50}}, D, D).losses[name].log_scale
    assert parameter.shape == (1,)
    assert bounded_scale(parameter).item() == pytest.approx(50)
    with torch.no_grad():
        parameter.fill_(9.0)
    scale = bounded_scale(parameter)
    assert scale.item() == pytest.approx(100)
    assert scale.shape == ()
    scale.backward()
    assert parameter.grad.item() == pytest.approx(100)  # can come down again


def test_gd_multiplies_by_the_scale(student: Features) -> None:
    # At equal features, student and teacher differ only in their scales
    doubled = Features(student.image, student.text, 2 * student.scale.detach())
    small = Features(student.image, student.text, torch.tensor(1e-4, dtype=torch.float64))
    half = Features(student.image, student.text, torch.tensor(5e-5, dtype=torch.float64))
    assert value("gd", student, student).item() == pytest.approx(0, abs=1e-20)
    assert value("gd", student, doubled) > 0
    # For a flat softmax the gradient is proportional to the scale, so the loss is to its square
    ratio = value("gd", small, half) / value("gd", half, features_like(half, 0.0))
    assert ratio.item() == pytest.approx(1, rel=1e-3)


def features_like(other: Features, scale: float) -> Features:
    return Features(other.image, other.text, torch.tensor(scale, dtype=torch.float64))


class LargestResult(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_gd_builds_nothing_larger_than_the_similarities() -> None:
    count, width = 48, 16
    ours, theirs = features(width, 1, 3.0, count), features(width, 2, 3.0, count)
    with LargestResult() as seen:
        build({"gd": 1}, width, width)(ours, theirs)["gd"].backward()
    assert seen.elements == count * count  # not count * width * count


def test_loss_parameters_start_alike_whatever_the_global_generator(
    student: Features, teacher: Features
) -> None:
    torch.manual_seed(1)
    first = build({"afd": 1, "icl": 1, "fd": 1}, D, WIDE).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = build({"afd": 1, "icl": 1, "fd": 1}, D, WIDE).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # nothing drawn later depends on the losses
    alone = build({"afd": 1}, D, WIDE).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(torch.equal(first[key], alone[key]) for key in alone)
    assert not torch.equal(
        build({"afd": 1}, D, WIDE, seed=1).state_dict()["losses.afd.image.weight"],
        alone["losses.afd.image.weight"],
    )


def test_loss_parameters_survive_saving_and_train() -> None:
    module, copy = objective("clip_kd", WIDE), objective("clip_kd", WIDE)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    sum(module(features(D, 1, 3.0), features(WIDE, 2, 3.0)).values()).backward()
    optimizer.step()
    assert all(not torch.equal(before[key], now) for key, now in module.state_dict().items())
    copy.load_state_dict(module.state_dict())
    torch.testing.assert_close(copy.state_dict(), module.state_dict(), rtol=0, atol=0)


# --- precision, masks, invariants
# -------------------------------------------------------------------


def test_autocast_does_not_reach_the_losses() -> None:
    def run() -> dict[str, Tensor]:
        pair = [features(D, seed, 30.0) for seed in (1, 2)]
        halves = [
            Features(f.image.bfloat16(), f.text.bfloat16(), f.scale.detach().float()) for f in pair
        ]
        return build("clip_kd", D, D)(*halves)

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run()
    assert all(term.dtype == torch.float32 for term in mixed.values())
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    patch=st.integers(1, 4),
    ratio=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_masks_hide_whole_patches_in_the_asked_number(
    grid: tuple[int, int], patch: int, ratio: float, seed: int
) -> None:
    images = torch.ones(3, 2, grid[0] * patch, grid[1] * patch)
    masked = hide(images, ratio, patch, torch.Generator().manual_seed(seed))
    means = F.avg_pool2d(masked, patch)
    assert set(means.unique().tolist()) <= {0.0, 1.0}
    hidden = (means == 0).sum(dim=(2, 3))
    assert (hidden == round(ratio * grid[0] * grid[1])).all()


def test_masks_refuse_partial_patches_and_views_come_from_the_objective() -> None:
    with pytest.raises(UserError, match="whole patches of 16"):
        hide(torch.ones(1, 3, 40, 40), 0.75, 16)
    module = build({"mfd": {"patch": 8}, "fd": 1}, D, D)
    views = module.view_images(torch.ones(2, 3, 32, 32), torch.Generator().manual_seed(0))
    assert list(views) == ["masked_image"]
    assert views["masked_image"].mean() == 0.25
    assert build("clip_kd", D, D).view_images(torch.ones(2, 3, 32, 32)) == {}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 7))
def test_order_of_samples_does_not_matter_and_an_equal_teacher_is_the_minimum(
    seed: int, count: int
) -> None:
    student, teacher = features(D, seed, 9.0, count), features(D, seed + 7, 11.0, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    masked = rows(count, D, seed)
    module = objective(dict.fromkeys(ON_EMBEDDINGS, 1))
    mixed = [Features(f.image[order], f.text[order], f.scale) for f in (student, teacher)]
    plain = module(student, teacher, masked_image=masked)
    torch.testing.assert_close(module(*mixed, masked_image=masked[order]), plain)
    for name in ("crd", "fd", "gd"):
        assert plain[name] >= 0
        assert value(name, student, student).item() == pytest.approx(0, abs=1e-12)


def test_missing_teacher_is_named() -> None:
    with pytest.raises(ValueError, match="crd, fd, icl need a teacher"):
        build("clip_kd", D)
    with pytest.raises(ValueError, match="needs the teacher's features"):
        build("clip_kd", D, D)(features(D, 1, 3.0))
