"""Weights that a library has quantised: cached as they are, computed steps to the bit.

GGUF is installed with the tests; the other libraries are tried where they can be imported.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cache_dit
from cache_dit.messages import CacheDitWarning
from tests.reference import EagerCache

diffusers = pytest.importorskip("diffusers")

HITS = [False, False, False, True, False, True, False, True]
EXACT: dict[str, Any] = {"inner": "eager", "forecast": "reuse", "noise_scale": 0.0, "language": "en"}
STREAMS = ("encoder_hidden_states", "hidden_states")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def flux() -> nn.Module:
    """A tiny Flux whose layers are wide enough for blocks of 32 weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
    return model.eval().requires_grad_(False)


def inputs(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 8, generator=generator) * (1.0 + 0.01 * step),
        "encoder_hidden_states": torch.randn(1, 6, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "txt_ids": torch.zeros(6, 3),
        "img_ids": torch.randn(16, 3, generator=generator).abs().floor(),
        "timestep": torch.tensor([1.0 - step / 10]),
        "return_dict": False,
    }


def gguf_q8_0(model: nn.Module) -> None:
    """Q8_0 in the linear layers of the blocks, as diffusers' GGUF loader leaves them."""
    gguf = pytest.importorskip("gguf")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    for parent in [part for name, part in model.named_modules() if "blocks" in name]:
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer.in_features % 32:
                continue
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = torch.from_numpy(gguf.quants.quantize(layer.weight.numpy(), kind))
            made = utils.GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32)
            made.weight = utils.GGUFParameter(packed, requires_grad=False, quant_type=kind)
            made.bias = layer.bias
            setattr(parent, name, made)


def torchao_int8(model: nn.Module) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def torchao_float8(model: nn.Module) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Float8WeightOnlyConfig())


def quanto_int8(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


@pytest.mark.parametrize("lowering", ["specialize", "pieces"])
@pytest.mark.parametrize("quantize", [gguf_q8_0, torchao_int8, torchao_float8, quanto_int8])
def test_quantised_weights_are_cached_and_computed_steps_are_exact(
    quantize: Callable[[nn.Module], None], lowering: str
) -> None:
    plain, reference, model = flux(), flux(), flux()
    full = copy.deepcopy(plain)
    for each in (plain, reference, model):
        quantize(each)
    eager = EagerCache([*reference.transformer_blocks, *reference.single_transformer_blocks], STREAMS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheDitWarning)
        cache_dit.enable_cache(model, lowering=lowering, **EXACT)
        for step, hit in enumerate(HITS):
            before = cache_dit.get_stats(model).hits
            eager.skip = hit
            with torch.no_grad():
                output: Tensor = model(**inputs(step))[0]
                expected = (reference if hit else plain)(**inputs(step))[0]
                reference(**inputs(step))
                unquantised = full(**inputs(step))[0]
            assert (cache_dit.get_stats(model).hits > before) is hit
            if hit:
                torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(output, expected)
                assert not torch.equal(output, unquantised)
    assert cache_dit.explain(model).graphs[0].lowering == lowering
