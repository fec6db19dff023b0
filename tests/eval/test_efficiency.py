"""Costs against counts made by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from eval.efficiency import conditions, latency, multiply_adds, parameters


class TwoTowers(nn.Module):
    """A model of one module per tower, so that its cost can be counted by hand."""

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.image, self.text = image, text

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        return self.image(images).flatten(1)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        return self.text(tokens.float()[..., None]).flatten(1)


class MixedHeads(nn.Module):
    """A low-rank convolution whose heads are mixed per image: products that no nn layer makes."""

    def __init__(self, channels: int, rank: int, out: int, heads: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, rank, 3, padding=1)
        self.up = nn.Parameter(torch.randn(heads, out, rank))
        self.gate = nn.Linear(rank, heads)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x)
        gates = self.gate(h.mean((2, 3))).softmax(-1)
        mixed = torch.einsum("bm,mor->bor", gates, self.up)
        return torch.bmm(mixed, h.flatten(2))


class Attention(nn.Module):
    """Self-attention by scaled_dot_product_attention, or by nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, *, packed: bool) -> None:
        super().__init__()
        self.heads, self.packed = heads, packed
        self.widen = nn.Linear(1, width)
        self.mha = nn.MultiheadAttention(width, heads, batch_first=True) if packed else None
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(x)
        if self.mha is not None:
            return self.mha(x, x, x, need_weights=False)[0]
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def test_mixed_heads_are_counted() -> None:
    model = TwoTowers(MixedHeads(3, 4, 6, 2), nn.Linear(1, 5))
    positions, length = 8 * 8, 7
    by_hand = 3 * 9 * 4 * positions + 4 * 2 + 2 * 6 * 4 + 6 * 4 * positions + length * 5
    assert multiply_adds(model, 8, length) == by_hand


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_attention_is_counted_whichever_kernel_runs(packed: bool, mode: str) -> None:
    width, length = 16, 12
    model = TwoTowers(nn.Conv2d(3, 2, 4, stride=4), Attention(width, 4, packed=packed))
    model.train(mode == "training")
    attention = length * width * (3 * width) + 2 * length * length * width + length * width * width
    by_hand = 3 * 16 * 2 * 4 + length * width + attention
    assert multiply_adds(model, 8, length) == by_hand
    assert model.training is (mode == "training")
    assert torch.backends.mha.get_fastpath_enabled()


def test_products_with_a_vector_are_counted() -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 48))

        def forward(self, x: Tensor) -> Tensor:
            return torch.mv(self.weight, x.flatten())[None]

    model = TwoTowers(Vector(), nn.Linear(1, 3))
    assert multiply_adds(model, 4, 2) == 5 * 48 + 2 * 3


@pytest.mark.parametrize("resnet", [True, False])
def test_a_real_text_tower_costs_what_its_shapes_say(
    make_model: Callable[..., CLIP], resnet: bool
) -> None:
    model = make_model(resnet=resnet)
    width, length, layers, embed = 32, 16, 2, 16
    block = 12 * width * width * length + 2 * length * length * width
    text = layers * block + width * embed

    class TextOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = model

        def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
            return images.flatten(1)

        def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
            return self.clip.encode_text(tokens)

    assert multiply_adds(TextOnly(), 32, length) == text
    assert multiply_adds(model, 32, length) > text


def test_parameters_count_shared_weights_once() -> None:
    model = TwoTowers(nn.Linear(4, 4), nn.Linear(4, 4))
    assert parameters(model) == 40
    model.text.weight = model.image.weight
    assert parameters(model) == 24


def test_latency_says_how_long_and_under_which_conditions(model: CLIP) -> None:
    measured = latency(model, 32, 16, batch_size=4, threads=1, min_seconds=0.02)
    assert set(measured) == {"latency_ms_b1", "images_per_s", "texts_per_s"}
    assert all(value > 0 for value in measured.values())
    said = conditions(model, batch_size=4, threads=1)
    assert said["threads"] == 1
    assert said["batch"] == 4
    assert said["dtype"] == "float32"
    assert said["device"]
