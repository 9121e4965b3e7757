"""The int4 linear layer against its twin in float64, and its layout against plain numbers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octavo.kernels.launch import has_gluon
from octavo.kernels.linear import int4
from octavo.kernels.linear.int4_layout import Int4Weight, join, pack, unpack
from octavo.kernels.linear.int4_table import INT4_GLUON_PLANS, Int4Plan, int4_plan, int4_rehearsal
from octavo.kernels.reference import int4 as twin

ON_GPU = torch.cuda.is_available()
# One rounding of the output; and from many tokens on one of every weight, which adds up to a tenth
# of an output's rounding where terms cancel: outputs here are about 1.
TOLERANCE = {torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 6e-3)}
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]  # the interpreter's bf16 products are garbage


def random_parts(rows: int, depth: int, group: int, zeros: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(rows + depth + group)
    numbers = torch.randint(0, 16, (rows, depth), generator=random)
    scales = (torch.rand((rows, depth // group), generator=random) + 0.5) / (5 * depth**0.5)
    shift = torch.randint(0, 17, (rows, depth // group), generator=random)
    return numbers, scales.to(dtype), shift if zeros else torch.full_like(shift, 8)


def values(numbers: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """What the formats define: (number - zero) * scale, rounded to the scales' dtype."""
    rows, depth = numbers.shape
    parts = numbers.reshape(rows, scales.shape[1], -1) - zeros[..., None]
    return (parts.to(scales.dtype) * scales[..., None]).reshape(rows, depth)


def make_weight(rows: int, depth: int, group: int, zeros: bool, dtype: torch.dtype, device: str) -> Int4Weight:
    numbers, scales, shift = random_parts(rows, depth, group, zeros, dtype)
    return pack(numbers.to(device), scales.to(device), shift.to(device) if zeros else None)


def check(out: Tensor, x: Tensor, weight: Int4Weight, bias: Tensor | None, rounded: bool = False) -> None:
    """rounded: the weights went through x's dtype on their way to cuBLAS, so they do here."""
    exact = twin.dequantise(weight, torch.float64).cpu()
    expected = x.double().cpu() @ (exact.to(x.dtype).double() if rounded else exact).t()
    if bias is not None:
        expected += bias.double().cpu()
    rtol, atol = TOLERANCE[x.dtype]
    assert out.dtype == x.dtype
    torch.testing.assert_close(out.double().cpu(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_layout_keeps_every_value(group, zeros) -> None:
    numbers, scales, shift = random_parts(48, 256, group, zeros, torch.float16)
    weight = pack(numbers, scales, shift if zeros else None)
    assert torch.equal(twin.dequantise(weight), values(numbers, scales, shift))
    assert (weight.rows, weight.depth, weight.group) == (48, 256, group)
    assert (weight.zeros is None) == (not zeros)
    assert weight.words.nbytes == 48 * 256 // 2
    for got, put in zip(unpack(weight), (numbers, scales, shift), strict=True):
        assert torch.equal(got, put.to(got.dtype))


def test_weights_join_row_by_row() -> None:
    parts = [random_parts(rows, 128, 64, rows == 32, torch.float16) for rows in (16, 32, 48)]
    joined = join([pack(n, s, z if len(n) == 32 else None) for n, s, z in parts])
    assert torch.equal(twin.dequantise(joined), torch.cat([values(*part) for part in parts]))
    plain = join([pack(n, s, None) for n, s, _ in parts[::2]])
    assert plain.zeros is None and plain.rows == 64


def test_permuted_columns_belong_to_the_activations_they_name() -> None:
    numbers, scales, shift = random_parts(32, 256, 64, True, torch.float16)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    by_column = torch.empty(32, 256, dtype=torch.float16)
    for k in range(256):
        by_column[:, order[k]] = (numbers[:, k] - shift[:, k // 64]).half() * scales[:, k // 64]
    assert torch.equal(twin.dequantise(pack(numbers, scales, shift, order)), by_column)


@pytest.mark.parametrize(
    ("rows", "depth", "groups", "message"),
    [
        (24, 128, 1, "24 outputs: outputs must be a multiple of 16"),
        (32, 96, 3, "96 inputs: inputs must be a multiple of 64"),
        (32, 192, 2, "192 inputs in 2 groups: a group must be 32 or a multiple of 64"),
        (32, 128, 3, "128 inputs in 3 groups"),
    ],
)
def test_odd_shapes_are_refused_by_name(rows, depth, groups, message) -> None:
    with pytest.raises(ValueError, match=message):
        pack(torch.zeros(rows, depth, dtype=torch.int32), torch.ones(rows, groups).half(), None)


def test_activations_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        pack(torch.zeros(16, 64, dtype=torch.int32), torch.ones(16, 1), None)
    weight = make_weight(32, 128, 64, False, torch.float16, "cpu")
    with pytest.raises(ValueError, match="float32"):
        int4.int4_linear(torch.zeros(1, 128), weight)
    with pytest.raises(ValueError, match="64 inputs"):
        int4.int4_linear(torch.zeros(1, 64).half(), weight)


PLANS = [
    Int4Plan("slices", tiles=2, tokens=8, splits=1, warps=2, ahead=2),
    Int4Plan("slices", tiles=1, tokens=16, splits=2, warps=4, ahead=1, launch="late"),
    Int4Plan("slices", tiles=1, tokens=8, splits=1, warps=2, ahead=4, launch="late"),
    Int4Plan("tiles", tiles=4, tokens=16, splits=1, warps=4, ahead=3),
    Int4Plan("tiles", tiles=4, tokens=32, splits=2, warps=4, ahead=2, depth=2),
    Int4Plan("tiles", tiles=8, tokens=16, splits=4, warps=8, ahead=3, depth=2, launch="late"),
]


WEIGHTS = [(48, 320, 64, True), (32, 256, 128, False), (16, 192, 32, True), (32, 192, 192, False)]
# The interpreter takes a second a case: there every plan meets two kinds of weight, on a GPU all.
CASES = [
    (plan, weight)
    for i, plan in enumerate(PLANS)
    for j, weight in enumerate(WEIGHTS)
    if ON_GPU or (i + j) % len(WEIGHTS) < 2
]


@pytest.mark.parametrize(("plan", "kind"), CASES, ids=lambda case: str(getattr(case, "kernel", case)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_on_every_kind_of_weight(device, plan, kind, dtype) -> None:
    weight = make_weight(*kind, dtype, device)
    for tokens in [7, 1, 40] if ON_GPU else [7]:
        if plan.kernel == "slices" and tokens > plan.tokens:
            continue
        x = torch.randn(tokens, weight.depth + 64, device=device).to(dtype)[:, : weight.depth]  # strided rows
        bias = torch.randn(weight.rows, device=device).to(dtype)
        out = torch.empty(tokens, weight.rows, dtype=dtype, device=device)
        int4.launch(x, weight, bias, out, plan)
        check(out, x, weight, bias)


GLUON_PLANS = [
    Int4Plan("gluon", tiles=8, tokens=64, splits=1, warps=12, ahead=8),  # a program a tile
    Int4Plan("gluon", tiles=8, tokens=64, splits=1, warps=12, ahead=3, programs=2),  # several tiles a program
    Int4Plan("gluon", tiles=8, tokens=64, splits=3, warps=12, ahead=3, programs=7),
    Int4Plan("gluon", tiles=8, tokens=128, splits=1000, warps=12, ahead=8),  # a round each
    Int4Plan("gluon", tiles=8, tokens=256, splits=4, warps=12, ahead=4, programs=3),
]


@pytest.mark.parametrize("plan", GLUON_PLANS)
@pytest.mark.parametrize("kind", [*WEIGHTS, (400, 1024, 128, True), (256, 1216, 1216, False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gluon_kernel_on_every_kind_of_weight(device, plan, kind, dtype) -> None:
    if not has_gluon(torch.device(device)):
        pytest.skip("a kernel for Hopper")
    weight = make_weight(*kind, dtype, device)
    bias = torch.randn(weight.rows, device=device).to(dtype)
    for tokens in (1, 40, 64, 65, 300):
        x = torch.randn(tokens, weight.depth + 64, device=device).to(dtype)[:, : weight.depth]  # strided rows
        outs = [torch.full((tokens, weight.rows), float("nan"), dtype=dtype, device=device) for _ in range(5)]
        for out in outs:
            int4.launch(x, weight, bias, out, plan)
        assert all(torch.equal(out, outs[0]) for out in outs)
        check(outs[0], x, weight, bias, rounded=True)
        int4.launch(x, weight, None, outs[0], plan)
        check(outs[0], x, weight, None, rounded=True)
    assert not int4.arrivals(x.device).any()


@pytest.mark.parametrize(("rows", "depth"), [(6144, 4096), (576, 576), (57344, 8192)])
@pytest.mark.parametrize("gluon", [False, True])
def test_rehearsal_meets_every_kernel(rows, depth, gluon) -> None:
    def kernel(tokens: int) -> Int4Plan | None:
        plan = int4_plan(tokens, rows, depth, gluon)
        return replace(plan, splits=1) if plan and plan.kernel == "gluon" else plan

    rehearsed = [kernel(tokens) for tokens in int4_rehearsal(rows, depth, gluon)]
    assert len(set(rehearsed)) == len(rehearsed)
    assert {kernel(tokens) for tokens in range(1, 2200)} == set(rehearsed)


@pytest.mark.parametrize(
    ("tokens", "rows", "depth", "expected"),
    [
        (1024, 4096, 4096, ("gluon", 256, 1)),  # 128 tiles for 132 multiprocessors
        (512, 4096, 4096, ("gluon", 128, 1)),
        (768, 28672, 4096, ("gluon", 256, 4)),  # 672 tiles: 12 left over, which all share
        (128, 4096, 4096, ("tiles", 64, 2)),  # too few rows for large tiles
        (2048, 57344, 8192, ("gluon", 256, 4)),  # 3,584: 20 left over
        (1024, 8192, 28672, ("gluon", 256, 1)),
    ],
)
def test_tiles_are_chosen_by_how_many_each_multiprocessor_has(tokens, rows, depth, expected) -> None:
    plan = int4_plan(tokens, rows, depth, gluon=True)
    assert plan and (plan.kernel, plan.tokens, plan.splits) == expected
    assert plan.kernel == "tiles" or plan in INT4_GLUON_PLANS


@pytest.mark.parametrize("tokens", [0, 3, 17] + [1, 8, 9, 16, 33, 65, 128, 200, 300, 1100, 2100] * ON_GPU)
def test_int4_linear(device, tokens) -> None:
    rows, depth = (4096, 1024) if ON_GPU else (32, 128)
    for dtype in DTYPES:
        weight = make_weight(rows, depth, 128, True, dtype, device)
        x = torch.randn(tokens, depth, device=device).to(dtype)
        out = int4.int4_linear(x, weight)
        assert out.shape == (tokens, rows)
        plan = int4_plan(tokens, rows, depth, int4.takes_gluon(x))
        check(out, x, weight, None, rounded=plan is None or plan.kernel == "gluon")


def test_int4_linear_gathers_permuted_activations(device) -> None:
    numbers, scales, shift = random_parts(32, 256, 64, True, torch.float16)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    weight = pack(numbers.to(device), scales.to(device), shift.to(device), order.to(device))
    x = torch.randn(3, 256, device=device).half()
    check(int4.int4_linear(x, weight), x, weight, None)


def test_int4_linear_takes_any_strides(device) -> None:
    weight = make_weight(32, 128, 64, False, torch.float16, device)
    x = torch.randn(128, 3, device=device).half().t()
    check(int4.int4_linear(x, weight), x, weight, None)


def test_split_results_do_not_depend_on_timing(device) -> None:
    weight = make_weight(64, 512, 128, False, torch.float16, device)
    plan = Int4Plan("tiles", tiles=4, tokens=16, splits=4, warps=4, ahead=2)
    x = torch.randn(3, 512, device=device).half()
    outs = [torch.empty(3, 64, dtype=torch.float16, device=device) for _ in range(10 if ON_GPU else 2)]
    for out in outs:
        int4.launch(x, weight, None, out, plan)
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert not int4.arrivals(x.device).any()
