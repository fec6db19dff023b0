"""Inherited layers: their mathematics against a plain loop, and what they must survive."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipeline.inherit.attention import expose_module
from pipeline.inherit.layers import (
    InheritedConv2d,
    InheritedEmbedding,
    InheritedLinear,
    build_layer,
)

CONVS = {
    "3x3": nn.Conv2d(8, 12, 3, padding=1),
    "strided": nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
    "grouped": nn.Conv2d(8, 12, 3, padding=1, groups=2),
    "dilated": nn.Conv2d(8, 12, 3, padding=2, dilation=2, padding_mode="reflect"),
    "oblong": nn.Conv2d(8, 12, (1, 5), padding=(0, 2)),
    "same": nn.Conv2d(8, 12, 3, padding="same"),
}


def randomised(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer


def stacked_conv(layer: InheritedConv2d, x: torch.Tensor) -> torch.Tensor:
    """The definition: all H outputs, then the gated sum."""
    h = layer.down(x)
    gates = layer.gates(h.mean(dim=(2, 3)))
    total = 0
    for m in range(layer.heads):
        part = h
        if layer.symmetric:  # per group, the heads' own channels follow each other
            part = h.unflatten(1, (layer.groups, layer.heads, -1))[:, :, m].flatten(1, 2)
        y = nn.functional.conv2d(part, layer.up[m][:, :, None, None], groups=layer.groups)
        total = total + gates[:, m, None, None, None] * y
    return total if layer.bias is None else total + layer.bias[:, None, None]


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(
    "options",
    [{"heads": 1}, {"heads": 3}, {"heads": 3, "gate": False}, {"heads": 2, "symmetric": True}],
)
def test_conv_equals_the_gated_sum_of_heads(name: str, options: dict) -> None:
    layer = randomised(build_layer(CONVS[name], 4, **options))
    assert isinstance(layer, InheritedConv2d)
    x = torch.randn(3, 8, 9, 7)
    y = layer(x)
    assert y.shape == CONVS[name](x).shape
    torch.testing.assert_close(y, stacked_conv(layer, x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mode", ["token", "sequence"])
@pytest.mark.parametrize("heads", [1, 3])
def test_linear_equals_the_gated_sum_of_heads(mode: str, heads: int) -> None:
    layer = randomised(build_layer(nn.Linear(10, 14), 5, heads, mode=mode))
    assert isinstance(layer, InheritedLinear)
    x = torch.randn(4, 6, 10)
    h = layer.down(x)
    gates = layer.gates(h.mean(dim=1, keepdim=True) if mode == "sequence" else h)
    expected = sum(gates[..., m, None] * (h @ layer.up[m].T) for m in range(heads)) + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    if mode == "token":
        torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-4, atol=1e-4)


def test_embedding_equals_its_table() -> None:
    layer = randomised(build_layer(nn.Embedding(20, 8), 3))
    assert isinstance(layer, InheritedEmbedding)
    tokens = torch.randint(0, 20, (2, 5))
    torch.testing.assert_close(layer(tokens), layer.intended()[tokens])


def conv_example() -> tuple[nn.Module, torch.Tensor]:
    return randomised(build_layer(nn.Conv2d(8, 12, 3, padding=1), 4, 3)), torch.randn(2, 8, 6, 6)


def linear_example() -> tuple[nn.Module, torch.Tensor]:
    return randomised(build_layer(nn.Linear(10, 14), 5, 3)), torch.randn(2, 6, 10)


@pytest.mark.parametrize("example", [conv_example, linear_example])
def test_layers_survive_copying_saving_and_other_precisions(
    example: Callable[[], tuple[nn.Module, torch.Tensor]],
) -> None:
    layer, x = example()
    expected = layer(x)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
    fresh = copy.deepcopy(layer)
    randomised(fresh).load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    scale = expected.abs().max()
    assert float((low.float() - expected).abs().max() / scale) < 0.03
    if x.ndim == 4:
        last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
        y = last(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), expected, rtol=1e-4, atol=1e-4)
    # no 0-d parameter, contiguous, all float32: what DeepSpeed needs
    for parameter in layer.parameters():
        assert parameter.ndim > 0
        assert parameter.is_contiguous()
        assert parameter.dtype == torch.float32
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("example", [conv_example, linear_example])
def test_layers_compile(example: Callable[[], tuple[nn.Module, torch.Tensor]]) -> None:
    layer, x = example()
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
def test_exposed_attention_equals_the_original(batch_first: bool) -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    twin = expose_module(dense, "attention")
    x = torch.randn(3, 5, 16) if batch_first else torch.randn(5, 3, 16)
    causal = torch.full((5, 5), float("-inf")).triu(1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    per_head = causal.expand(12, 5, 5)
    for mask, pad in (
        (None, None),
        (causal, None),
        (causal < 0, None),
        (per_head, None),
        (None, padding),
    ):
        for need in (False, True):
            want, weights = dense(x, x, x, attn_mask=mask, key_padding_mask=pad, need_weights=need)
            got, mine = twin(x, x, x, attn_mask=mask, key_padding_mask=pad, need_weights=need)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert (mine is None) == (weights is None)
            if need:
                torch.testing.assert_close(mine, weights, rtol=1e-4, atol=1e-5)
    other = torch.randn_like(x)
    torch.testing.assert_close(
        twin(x, other, other)[0], dense(x, other, other)[0], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        twin(x[0], x[0], x[0])[0], dense(x[0], x[0], x[0])[0], rtol=1e-4, atol=1e-5
    )


def test_exposed_pool_and_packed_attention_equal_the_originals() -> None:
    from open_clip.modified_resnet import AttentionPool2d
    from open_clip.transformer import Attention

    torch.manual_seed(0)
    pool = AttentionPool2d(4, 32, 4, 24)
    x = torch.randn(2, 32, 4, 4)
    torch.testing.assert_close(
        expose_module(pool, "attention_pool")(x), pool(x), rtol=1e-4, atol=1e-5
    )
    for options in ({}, {"qk_norm": True, "scale_heads": True, "inner_norm": True}):
        packed = Attention(32, 4, **options).eval()
        tokens, mask = torch.randn(2, 5, 32), torch.full((5, 5), float("-inf")).triu(1)
        torch.testing.assert_close(
            expose_module(packed, "clip_attention")(tokens, attn_mask=mask),
            packed(tokens, attn_mask=mask), rtol=1e-4, atol=1e-5,
        )  # fmt: skip
