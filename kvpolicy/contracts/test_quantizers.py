"""What every quantizer must hold. One whose optional library is missing is reported as skipped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvpolicy.attention.products import add_values, key_scores
from kvpolicy.contracts.samples import name_of, normal, quantizers, tensor
from kvpolicy.errors import MissingDependencyError, RecipeError
from kvpolicy.interfaces.quantizer import Affine, AffineQuantizer, Quantizer, precision_of, root_mean_square
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.base import Store
from kvpolicy.storage.group_size import group_size_of
from kvpolicy.storage.make import make_store

QUANTIZERS = quantizers()
AFFINE = [quantizer for quantizer in QUANTIZERS if isinstance(quantizer, AffineQuantizer)]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
EVERY = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=[name_of(quantizer) for quantizer in QUANTIZERS])
EVERY_AFFINE = pytest.mark.parametrize("quantizer", AFFINE, ids=[name_of(quantizer) for quantizer in AFFINE])
BATCH, HEADS, HEAD_DIM = 2, 2, 64


@pytest.fixture(autouse=True)
def _library(request: pytest.FixtureRequest) -> None:
    quantizer: Quantizer = request.getfixturevalue("quantizer")
    try:
        quantizer.check(HEAD_DIM)
        quantizer.at(Site())
        if isinstance(quantizer, AffineQuantizer):
            quantizer.calibrate(torch.ones(1, 8))
    except (MissingDependencyError, RecipeError) as error:
        pytest.skip(str(error))


def _numbers(quantizer: AffineQuantizer, affine: Affine) -> Tensor:
    """What groups decode to."""
    levels = quantizer.levels(Site())
    return affine.scale * (affine.codes if levels is None else levels[affine.codes.long()]) + affine.offset


def _groups(dtype: torch.dtype) -> Tensor:
    return tensor((96, 32), dtype)


def _check_affine(quantizer: AffineQuantizer, groups: Tensor) -> Affine:
    before = groups.clone()
    affine = quantizer.calibrate(groups)
    assert isinstance(affine, tuple), f"calibrate must return kvpolicy.Affine, found {type(affine).__name__}"
    affine = Affine(*affine)
    assert torch.equal(groups, before), "calibrate must not change its argument"
    assert affine.codes.shape == groups.shape, f"codes must be {groups.shape}, found {affine.codes.shape}"
    assert affine.codes.dtype == torch.uint8, f"codes must be uint8, found {affine.codes.dtype}"
    levels, highest = quantizer.levels(Site()), int(affine.codes.max())
    count = 2**quantizer.nbits if levels is None else len(levels)
    assert highest < count, f"codes must be below {count}, found {highest}"
    for name in ("scale", "offset"):
        part: Tensor = getattr(affine, name)
        assert part.shape == (len(groups), 1), f"{name} must be {(len(groups), 1)}, found {tuple(part.shape)}"
        assert part.dtype == torch.float32, f"{name} must be float32, found {part.dtype}"
        assert part.isfinite().all(), f"{name} must be finite for finite groups"
    return affine


@EVERY_AFFINE
@DTYPES
def test_codes_are_in_range_and_parameters_are_finite_float32(quantizer: AffineQuantizer, dtype: torch.dtype) -> None:
    one = _check_affine(quantizer, _groups(dtype))
    other = quantizer.calibrate(_groups(dtype))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), "calibrate must be deterministic"


@EVERY_AFFINE
@DTYPES
def test_independent_groups_are_coded_the_same_alone_and_together(
    quantizer: AffineQuantizer, dtype: torch.dtype
) -> None:
    if not type(quantizer).independent:
        pytest.skip("its groups depend on each other")
    groups = _groups(dtype)
    whole = quantizer.calibrate(groups)
    parts = [quantizer.calibrate(some) for some in groups.split([1, 20, 75])]
    for found, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(found, torch.cat(pieces)), "independent is true, and a group is coded otherwise alone"


@EVERY_AFFINE
def test_it_rounds_as_it_says(quantizer: AffineQuantizer) -> None:
    """Backends code in its place by what it says."""
    said, x, top = quantizer.rounding(), _groups(torch.float32), 2**quantizer.nbits - 1
    if said is None or quantizer.clip < 1:
        return
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    if said.symmetric:
        low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
    scale = (high - low) / top if said.by == "extremes" else root_mean_square(x) * said.step
    codes = (x - low) / scale if said.by == "extremes" else x / scale + top / 2
    found = quantizer.calibrate(x)
    assert quantizer.offsets == (said.by == "extremes"), "a quantizer has offsets where it rounds between extremes"
    assert torch.equal(found.scale, scale), f"calibrate must give the scales of {said}"
    assert torch.equal(found.codes, codes.round().clamp(0, top).to(torch.uint8)), f"calibrate must round as {said}"


@EVERY_AFFINE
def test_levels_ascend_and_codes_are_the_nearest(quantizer: AffineQuantizer) -> None:
    levels = quantizer.levels(Site())
    if levels is None:
        pytest.skip("its codes are linear")
    most = 2**quantizer.nbits
    assert levels.ndim == 1, f"levels must have one dimension, found {tuple(levels.shape)}"
    assert 1 < len(levels) <= most, f"levels must be 2 to {most}, found {len(levels)}"
    assert levels.dtype == torch.float32, f"levels must be float32, found {levels.dtype}"
    assert (levels.diff() > 0).all(), "levels must ascend"
    assert torch.equal(levels, quantizer.levels(Site())), "levels must be the same each time"  # type: ignore[arg-type]
    groups = _groups(torch.float32)
    affine = quantizer.calibrate(groups)
    if not quantizer.offsets:
        assert not affine.offset.any(), "without offsets they must be zero"
    every = affine.scale.double()[..., None] * levels.double() + affine.offset.double()[..., None]
    errors = (groups.double()[..., None] - every).abs()
    chosen = errors.gather(2, affine.codes.long()[..., None])[..., 0]
    worst = float((chosen - errors.amin(2)).max())
    assert worst <= 1e-5 * float(groups.abs().max()), (
        f"codes must be those of the nearest levels, found {worst:.2g} off"
    )


@EVERY_AFFINE
@DTYPES
def test_groups_of_equal_numbers_stay_finite(quantizer: AffineQuantizer, dtype: torch.dtype) -> None:
    levels = quantizer.levels(Site())
    for value in (0.0, 1.0, -3.0, 1e-4, 6e4):
        affine = _check_affine(quantizer, torch.full((3, 16), value, dtype=dtype))
        decoded = _numbers(quantizer, affine)
        assert decoded.isfinite().all()
        # The nearest of few levels, which lie where normal numbers do, may be half as large again.
        whole = levels is None or float(levels.abs().max()) == 1
        limit = abs(value) * (1.01 if whole else 1.6) + 1e-6
        assert (decoded.abs() <= limit).all(), f"equal numbers {value} must not grow, found {decoded.abs().max()}"


@EVERY_AFFINE
def test_a_bad_number_spoils_its_own_group_at_most(quantizer: AffineQuantizer) -> None:
    clean = _groups(torch.float32)
    for bad in (float("inf"), float("-inf"), float("nan")):
        groups = clean.clone()
        groups[5, 3] = bad
        affine = quantizer.calibrate(groups)
        others = torch.arange(len(groups)) != 5
        assert int(affine.codes.max()) < 2**quantizer.nbits
        decoded = _numbers(quantizer, affine)[others]
        assert decoded.isfinite().all(), f"{bad} in one group must leave the others finite"


def _bound(quantizer: Quantizer, x: Tensor, dtype: torch.dtype, widest: bool) -> float:
    """Largest root-mean-square error allowed: half a step (the `widest` of levels) over the range, and rounding."""
    spread = 2 * float(x.float().abs().max())
    levels = quantizer.levels(Site()) if isinstance(quantizer, AffineQuantizer) else None
    steps = 2 ** precision_of(quantizer) - 1
    if levels is not None and widest:
        steps = float((levels[-1] - levels[0]) / levels.diff().max())
    clipped = (1 - getattr(quantizer, "clip", 1.0)) * spread / 2
    eps = 0.0625 if getattr(quantizer, "scale_dtype", "") == "float8_e4m3" else torch.finfo(dtype).eps
    return 0.5 * spread / steps + 4 * eps * spread + clipped


def _filled(quantizer: Quantizer, x: Tensor, *cuts: int) -> Store:
    store = make_store(quantizer, x.shape[3])
    assert store is not None
    for part in x.tensor_split(cuts, dim=2):
        store.append(part)
    return store


def _decoded(store: Store, x: Tensor) -> Tensor:
    out = torch.full_like(x, float("nan"))
    store.write(out, 0)
    return out


@EVERY
@DTYPES
def test_round_trip_error_is_within_its_bound(quantizer: Quantizer, dtype: torch.dtype) -> None:
    for drawn in (tensor, normal):  # with outliers in some channels, and without
        x = drawn((BATCH, HEADS, 128, HEAD_DIM), dtype)
        found = _decoded(_filled(quantizer, x), x)
        assert found.shape == x.shape
        assert found.isfinite().all(), "what is stored must decode to finite numbers"
        error = float((found.float() - x.float()).square().mean().sqrt())
        bound = _bound(quantizer, x, dtype, widest=drawn is normal)
        assert error <= bound, f"root-mean-square error must be at most {bound:.4g}, found {error:.4g}"


@EVERY
@DTYPES
def test_bytes_equal_what_the_store_holds(quantizer: Quantizer, dtype: torch.dtype) -> None:
    x = tensor((BATCH, HEADS, 128, HEAD_DIM), dtype)
    store = _filled(quantizer, x, 64)
    assert store.length == 128
    held = sum(part.numel() * part.element_size() for part in store.tensors().values())
    assert sum(store.bytes().values()) == held
    assert store.reserved() >= store.bytes()["codes"]
    if isinstance(quantizer, AffineQuantizer) and not store.bytes().get("exact"):
        width = math.ceil(HEAD_DIM * quantizer.nbits / 8)
        assert store.bytes()["codes"] == BATCH * HEADS * 128 * width


@EVERY
def test_dropped_tokens_leave_the_others_as_they_were(quantizer: Quantizer) -> None:
    x = tensor((BATCH, HEADS, 96, HEAD_DIM), torch.float32)
    store = _filled(quantizer, x)
    whole = _decoded(store, x)
    keep = torch.arange(96) % 3 != 0
    store.drop((~keep).nonzero()[:, 0].numpy())
    assert store.length == int(keep.sum())
    assert torch.equal(_decoded(store, x[:, :, keep]), whole[:, :, keep]), "what stays must not be encoded again"


@EVERY
def test_rows_of_a_batch_follow_a_selection(quantizer: Quantizer) -> None:
    x = tensor((BATCH, HEADS, 64, HEAD_DIM), torch.float32)
    store = _filled(quantizer, x)
    whole = _decoded(store, x)
    rows = torch.tensor([1, 1, 0])
    store.select(rows)
    assert torch.equal(_decoded(store, x[rows]), whole[rows])


@EVERY
@DTYPES
def test_what_is_encoded_or_decoded_is_not_changed(quantizer: Quantizer, dtype: torch.dtype) -> None:
    x = tensor((BATCH, HEADS, 40, HEAD_DIM), dtype)
    shown = x.clone()
    store = _filled(quantizer, shown, 3)
    assert torch.equal(shown, x), "what is encoded must not be changed"
    held = {name: part.clone() for name, part in store.tensors().items()}
    first, second = _decoded(store, x), _decoded(store, x)
    assert torch.equal(first, second), "decoding must give the same each time"
    assert torch.equal(first, _decoded(_filled(quantizer, x, 3), x)), "encoding must give the same each time"
    for name, part in store.tensors().items():
        assert torch.equal(_plain(part), _plain(held[name])), f"decoding must not change {name}"


def _plain(x: Tensor) -> Tensor:
    """The bytes of a tensor: nan equals nan, and every type can be compared."""
    return x.contiguous().view(-1).view(torch.uint8) if x.numel() else torch.empty(0)


@EVERY
@pytest.mark.parametrize("head", [False, True], ids=["rows", "heads"])
def test_tokens_are_decoded_each_for_itself(quantizer: Quantizer, head: bool) -> None:
    size = group_size_of(quantizer, HEAD_DIM) if isinstance(quantizer, AffineQuantizer) else 0
    n = (
        90 - 90 % size if getattr(quantizer, "per", "token") == "channel" and 0 < size < 90 else 90
    )  # whole groups: none waits for more
    x = tensor((BATCH, HEADS, n, HEAD_DIM), torch.float32)
    store = _filled(quantizer, x)
    whole = _decoded(store, x)
    lines = (BATCH, HEADS if head else 1)
    store.differ_by_head(lines)
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(n, generator=generator)[:35] for _ in range(lines[0] * lines[1])])
    index = index.view(*lines, 35)
    expected = whole.gather(2, index[..., None].expand(BATCH, HEADS, -1, HEAD_DIM))
    assert torch.equal(store.gather(index, x.dtype), expected), "a token must decode to the same whatever stands by it"
    kept = store.length - 35
    store.remove(index.sort(2).values)
    assert store.length == kept
    found = store.gather(torch.arange(kept).expand(*lines, -1), x.dtype)
    gone = torch.zeros(BATCH, HEADS, n, dtype=torch.bool)
    gone.scatter_(2, index.expand(BATCH, HEADS, -1), True)
    for row, stays in enumerate((~gone).flatten(0, 1)):
        left, right = whole.flatten(0, 1)[row, stays], found.flatten(0, 1)[row]
        assert torch.equal(left.sort(0).values, right.sort(0).values), "tokens must stay as they were as others leave"


@EVERY
def test_what_is_saved_decodes_to_the_same(quantizer: Quantizer) -> None:
    x = tensor((BATCH, HEADS, 70, HEAD_DIM), torch.float32)
    store = _filled(quantizer, x, 33)
    other = make_store(quantizer, HEAD_DIM)
    assert other is not None
    other.restore({name: part.clone() for name, part in store.tensors().items()})
    assert other.length == store.length
    assert other.bytes() == store.bytes()
    assert torch.equal(_decoded(other, x), _decoded(store, x))


@EVERY
def test_the_precision_is_a_number_of_bits(quantizer: Quantizer) -> None:
    bits = precision_of(quantizer)
    assert bits == precision_of(quantizer), "precision must be the same each time"
    assert bits == precision_of(type(quantizer).model_validate(quantizer.model_dump()))


@EVERY
def test_attention_reads_what_decoding_gives(quantizer: Quantizer) -> None:
    x = tensor((BATCH, HEADS, 70, HEAD_DIM), torch.float32)
    store = _filled(quantizer, x, 33, 34)
    dense = _decoded(store, x).double()
    rows = tensor((BATCH, HEADS, 5, HEAD_DIM), torch.float32, seed=3)
    scores = torch.zeros(BATCH, HEADS, 5, 70)
    key_scores(store, rows, scores, 0)
    exact = rows.double() @ dense.transpose(2, 3)
    assert torch.allclose(scores.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    weights = torch.rand(scores.shape, generator=torch.Generator().manual_seed(4))
    out = torch.ones(BATCH, HEADS, 5, HEAD_DIM)
    add_values(store, weights, out, 0)
    exact = 1 + weights.double() @ dense
    assert torch.allclose(out.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
