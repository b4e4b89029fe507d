"""Outer products within heads and their sums."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from anymamba.parts import head_products
from anymamba.parts.head_products import FIRST, LAST, contract, outer


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_values_and_derivatives(d):
    torch.manual_seed(0)
    k, v, products = numbers(2, 3, 2, d), numbers(2, 3, 2, d), numbers(2, 3, 2, d, d)
    torch.testing.assert_close(outer(k, v), torch.einsum("blhi,blhj->hlbij", k, v))
    torch.testing.assert_close(contract(k, products), torch.einsum("blhi,hlbij->blhj", k, products))
    for function, inputs in ((outer, (k, v)), (contract, (k, products))):
        assert gradcheck(function, inputs) and gradgradcheck(function, inputs)


@pytest.mark.parametrize("over", [FIRST, LAST])
def test_a_product_with_ones_and_zeros_sums(over):
    x = torch.randn(7, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(x.flatten(-2) @ head_products.ones(x, over), x.sum(over))
