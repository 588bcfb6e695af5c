"""The matrix view: vector order against matrix order."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from curvscope.operators import Layout, MatrixView, ParameterSpec
from tests.operators.cases import randn


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 100),
)
def test_there_and_back(g: int, o: int, i: int, k: int, permuted: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    perm = torch.randperm(g * o * i, generator=generator) if permuted else None
    view = MatrixView(g, o, i, perm)
    vectors = randn(g * o * i, k, seed=seed)
    matrices = view.to_matrix(vectors)
    assert matrices.shape == (k, g, o, i)
    assert torch.equal(view.from_matrix(matrices), vectors)
    stack = view.to_stack(vectors)
    assert torch.equal(stack.permute(3, 0, 1, 2), matrices)
    assert torch.equal(view.from_stack(stack), vectors)
    order = torch.arange(view.numel) if perm is None else perm
    for column in range(k):
        assert torch.equal(matrices[column].flatten(), vectors[:, column][order])
        assert torch.equal(view.matrix(vectors[:, column]), matrices[column])
        assert torch.equal(view.vector(matrices[column]), vectors[:, column])
    dense = randn(view.numel, view.numel, seed=seed)
    assert torch.equal(view.dense_to_matrix(dense), dense[order][:, order])
    assert torch.equal(view.dense_from_matrix(view.dense_to_matrix(dense)), dense)


def test_weight_and_bias_of_a_linear_layer() -> None:
    layer = torch.nn.Linear(3, 2).double()
    vector = torch.cat([layer.weight.detach().flatten(), layer.bias.detach()])
    matrix = MatrixView.for_weight_and_bias(2, 3).matrix(vector)[0]
    assert torch.equal(matrix[:, :3], layer.weight.detach())
    assert torch.equal(matrix[:, 3], layer.bias.detach())
    plain = MatrixView.for_weight_and_bias(2, 3, bias=False)
    assert plain.perm is None and plain.shape == (1, 2, 3)


def test_weight_and_bias_of_a_grouped_convolution() -> None:
    conv = torch.nn.Conv2d(4, 6, 3, groups=2).double()
    vector = torch.cat([conv.weight.detach().flatten(), conv.bias.detach()])
    view = MatrixView.for_weight_and_bias(6, 2 * 9, groups=2)
    assert view.shape == (2, 3, 19)
    matrix = view.matrix(vector)
    assert torch.equal(matrix[:, :, :18], conv.weight.detach().reshape(2, 3, 18))
    assert torch.equal(matrix[:, :, 18], conv.bias.detach().reshape(2, 3))


def test_equality_is_of_content() -> None:
    flip = torch.arange(6).flip(0)
    assert MatrixView(1, 2, 3, flip) == MatrixView(1, 2, 3, flip.clone())
    assert MatrixView(1, 2, 3, torch.arange(6)) == MatrixView(1, 2, 3)
    assert MatrixView(1, 2, 3, flip) != MatrixView(1, 2, 3)
    assert MatrixView(1, 2, 3) != MatrixView(1, 3, 2)
    assert MatrixView(1, 2, 3) != "view"
    assert len({MatrixView(1, 2, 3, flip), MatrixView(1, 2, 3, flip.clone())}) == 1
    assert "permuted" in repr(MatrixView(1, 2, 3, flip))


def test_layout_cuts_and_restricts() -> None:
    layout = Layout([ParameterSpec("w", (2, 3)), ParameterSpec("b", ()), ParameterSpec("v", (2,))])
    assert layout.numel == 9 and layout.names == ("w", "b", "v")
    assert layout.slices() == {"w": slice(0, 6), "b": slice(6, 7), "v": slice(7, 9)}
    vector = torch.arange(9.0)
    parts = layout.split(vector)
    assert parts["w"].shape == (2, 3) and parts["b"].shape == () and parts["v"].tolist() == [7, 8]
    assert layout.split(randn(9, 4))["w"].shape == (2, 3, 4)
    assert layout.restrict(["v", "w"]).names == ("w", "v")
    assert layout.index(["v", "b"]).tolist() == [6, 7, 8]
    assert layout.index([]).tolist() == []
    model = torch.nn.Linear(3, 2)
    assert Layout.of(model.named_parameters()) == Layout(
        [ParameterSpec("weight", (2, 3)), ParameterSpec("bias", (2,))]
    )
