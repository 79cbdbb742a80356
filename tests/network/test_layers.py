"""Tables that a cast of the network must not round."""

from __future__ import annotations

import copy

import pytest
import torch

from ddlm.network.layers import Rotary, TimeEmbedding


@pytest.mark.parametrize("make", [lambda: Rotary(32), lambda: TimeEmbedding(32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_stay_float32_when_a_network_is_cast(make, dtype: torch.dtype) -> None:
    module = make()
    exact, keys = module.frequencies.clone(), list(module.state_dict())
    for cast in (module.to(dtype), copy.deepcopy(module).to(dtype=dtype, device="cpu")):
        assert cast.frequencies.dtype == torch.float32
        assert torch.equal(cast.frequencies, exact)
        assert "frequencies" in dict(cast.named_buffers())
        assert all(p.dtype == dtype for p in cast.parameters())
    assert list(module.state_dict()) == keys
    assert "frequencies" not in keys


@pytest.mark.parametrize("make", [lambda: Rotary(32), lambda: TimeEmbedding(32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_module_built_without_memory_has_its_table_once_it_gets_some(make, dtype) -> None:
    """No file holds it: ``to_empty`` would leave what the memory held before."""
    with torch.device("meta"):
        empty = make()
    assert empty.frequencies.is_meta
    filled = copy.deepcopy(empty.to(dtype)).to_empty(device="cpu")
    assert torch.equal(filled.frequencies, make().frequencies)


def test_a_cast_to_more_bits_is_a_cast() -> None:
    rotary = Rotary(32)
    exact = rotary.frequencies.clone()
    assert rotary.double().frequencies.dtype == torch.float64
    assert torch.equal(rotary.float().frequencies, exact)
    assert torch.equal(rotary.double().half().frequencies, exact)


def test_angles_of_a_cast_network_are_exact() -> None:
    rotary = Rotary(64)
    exact = rotary(300)
    rounded = rotary.to(torch.bfloat16)(300)
    assert all(torch.equal(a, b) for a, b in zip(exact, rounded, strict=True))
