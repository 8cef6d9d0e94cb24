"""What GEAR adds to codes: outliers kept exactly, and a matrix of low rank near the error, against float64 formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpolicy_low_rank import LowRank
from kvpolicy_prompt import Prompt
from kvpolicy_sparse import Sparse
from layers import HEAD_DIM, Layer
from models import ids, tiny
from torch import Tensor
from words import CACHE

from kvpolicy import CompressedCache, attach, load_recipe, make_cache
from kvpolicy.errors import RecipeError
from kvpolicy.interfaces.extra import Grouping
from kvpolicy.interfaces.site import Site
from kvpolicy.placement.simulate import simulate
from kvpolicy.storage.groups import Groups

SITE = Site(0, 1, "keys", 2, 16)
ANY = Grouping("token", 16)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 6
    return x


def product(parts: dict[str, Tensor]) -> Tensor:
    return parts["along"].double() @ parts["across"][:, :, 0].double()


def test_the_error_that_is_left_is_near_that_of_the_best_matrix_of_that_rank() -> None:
    error = normal(2, 3, 90, 16)
    for rank in (1, 4, 16):
        best = torch.linalg.svdvals(error.double())[..., rank:].square().sum(-1).sqrt()
        left = [
            (error.double() - product(LowRank(rank=rank, loops=loops).fit(error, ANY, SITE))).flatten(2).norm(dim=2)
            for loops in (1, 3, 40)
        ]
        near = 0.004 * error.flatten(2).norm(dim=2)  # of factors in 16 bits
        assert (left[0] >= left[1] - near).all()
        assert (left[1] >= left[2] - near).all()
        assert (left[2] >= best - near).all()
        torch.testing.assert_close(left[2].float(), best.float(), rtol=0, atol=float(near.max()))
        along = LowRank(rank=rank).fit(error, ANY, SITE)["along"].double()
        unit = torch.eye(rank, dtype=torch.float64).expand(2, 3, -1, -1)
        torch.testing.assert_close(along.transpose(2, 3) @ along, unit, rtol=0, atol=2e-3)


def test_rounds_are_those_of_the_paper() -> None:
    error = normal(1, 1, 50, 16)
    found = product(LowRank(rank=3, loops=3).fit(error, ANY, SITE))[0, 0]
    torch.testing.assert_close(found, near(error[0, 0].double(), 3), rtol=0.005, atol=0.005)


def test_each_row_and_head_is_for_itself_whatever_numbers_are_in_the_others() -> None:
    error, extra = normal(3, 2, 40, 16), LowRank(rank=2)
    whole = product(extra.fit(error, ANY, SITE))
    spoilt = error.clone()
    spoilt[0, 0, 5, 5], spoilt[1] = torch.nan, 1e30
    found = product(extra.fit(spoilt, ANY, SITE))
    assert found.isfinite().all()
    torch.testing.assert_close(found[2], whole[2])
    torch.testing.assert_close(found[0, 1], whole[0, 1])
    assert not product(extra.fit(error * 0, ANY, SITE)).any()
    few = product(extra.fit(error[:, :, :1], ANY, SITE))  # fewer tokens than ranks
    torch.testing.assert_close(few.float(), error[:, :, :1], rtol=0.01, atol=0.02)


def test_options_that_do_not_fit_are_refused() -> None:
    store = {"kind": "int", "nbits": 2, "extras": [{"kind": "low_rank", "rank": 64}]}
    with pytest.raises(RecipeError, match=r"extras\[0\]\.rank, layer 0: rank must be up to head_dim, found rank: 64"):
        make_cache({"tiers": [{"store": store}]}, tiny("llama"))
    store["extras"] = [{"kind": "sparse", "among": 7}]
    with pytest.raises(RecipeError, match=r"among must divide head_dim with per: token, found among: 7"):
        make_cache({"tiers": [{"store": store}]}, tiny("llama"))
    store |= {"per": "channel", "extras": [{"kind": "sparse", "among": "vector", "share": 0.1}]}
    with pytest.raises(RecipeError, match="sparse must have count with per: channel and among: vector"):
        load_recipe({"tiers": [{"store": store}]})
    with pytest.raises(ValueError, match="an even count by: extremes, found count: 3; write 4"):
        Sparse(by="extremes", count=3)


def largest_and_smallest(vector: Tensor, each: int) -> list[int]:
    order = sorted(range(len(vector)), key=lambda i: float(vector[i]))
    return sorted(order[:each] + order[len(order) - each :])


@pytest.mark.parametrize("grouping", [Grouping("token", 8), Grouping("channel", 8), Grouping("channel", 0)])
@pytest.mark.parametrize("among", ["vector", "group", 4])
def test_extremes_are_the_largest_and_the_smallest_of_each_vector(grouping: Grouping, among: Any) -> None:
    if grouping.size == 0 and among == "group":
        among = "vector"
    extra, x = Sparse(by="extremes", count=2, among=among), normal(1, 1, 8, 16)
    span = extra.arrival(grouping) or 8
    for first in range(0, 8, span):
        part = x[:, :, first : first + span]
        rest, parts = extra.take(part, grouping, SITE)
        vectors, left = (t[0, 0] if grouping.per == "token" else t[0, 0].T for t in (part, rest))
        size = {"vector": vectors.shape[1], "group": grouping.size}.get(among, among)
        for vector, coded in zip(vectors.unflatten(1, (-1, size)).flatten(0, 1), left.reshape(-1, size), strict=True):
            taken = largest_and_smallest(vector, 1)
            others = [i for i in range(size) if i not in taken]
            assert torch.equal(coded[others], vector[others])
            torch.testing.assert_close(coded[taken], vector[others].mean().expand(2))
        out = torch.zeros_like(part)
        extra.add(out, parts)
        assert torch.equal(out[out != 0], part[out != 0])
        assert int((out != 0).sum()) == 2 * part.numel() // size


def test_runs_of_arrivals_are_cut_where_their_length_changes() -> None:
    groups = Groups()
    groups.add([5, 3, 3, 3, 1], 0, torch.device("cpu"))
    of = [0] * 5 + [1] * 3 + [2] * 3 + [3] * 3 + [4]
    for first in range(15):
        for last in range(first, 16):
            runs = list(groups.runs(first, last))
            tokens = [t for begin, end, _ in runs for t in range(begin, end)]
            assert tokens == list(range(first, last))
            for begin, end, count in runs:
                each = (end - begin) // count
                assert [of[t] - of[begin] for t in range(begin, end)] == [i for i in range(count) for _ in range(each)]
    assert list(groups.runs(0, 15)) == [(0, 5, 1), (5, 14, 3), (14, 15, 1)]


def test_the_prompt_stays_apart_from_what_follows() -> None:
    tiers = load_recipe("gear").tiers
    for prompt, tokens in ((200, 330), (128, 129), (30, 100)):
        wait, first, later = (part.tolist() for part in simulate(tiers, tokens, prompt=prompt))
        assert first == list(range(prompt))
        assert first + later + wait == list(range(tokens))
        assert len(wait) == (tokens - prompt) % 64
    assert Prompt().keep(torch.arange(5).numpy(), 5).all()


def rounded(x: Tensor, nbits: int) -> Tensor:
    """To the nearest of the levels from the minimum to the maximum along the last dimension."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    return torch.where(scale > 0, ((x - low) / torch.where(scale > 0, scale, 1.0)).round() * scale + low, x)


def outliers(x: Tensor, each: int) -> Tensor:
    """Which are the `each` largest and smallest along the last dimension."""
    found = torch.zeros_like(x, dtype=torch.bool)
    if each:
        found.scatter_(-1, x.topk(each).indices, True).scatter_(-1, x.topk(each, largest=False).indices, True)
    return found


def gear(x: Tensor, vectors: int, group: int, each: int, nbits: int, rank: int, tokens_first: bool) -> Tensor:
    """GEAR of a block `[lines, n]` of one head, whose vectors of `vectors` numbers and groups lie along lines.

    Lines are tokens, or channels.
    """
    exact = torch.cat([outliers(cut, each) for cut in x.split(vectors, 1)], dim=1)
    means = [
        (cut * ~out).sum(1, keepdim=True) / (~out).sum(1, keepdim=True)
        for cut, out in zip(x.split(vectors, 1), exact.split(vectors, 1), strict=True)
    ]
    rest = torch.where(exact, torch.repeat_interleave(torch.cat(means, 1), vectors, 1)[:, : x.shape[1]], x)
    coded = rounded(rest.unflatten(1, (-1, group)), nbits).flatten(1)
    error = rest - coded if tokens_first else (rest - coded).T
    return torch.where(exact, x, coded + (near(error, rank) if tokens_first else near(error, rank).T))


def near(error: Tensor, rank: int) -> Tensor:
    """A matrix of that rank near `[tokens, channels]`, by three rounds of subspace iteration."""
    across = torch.rand((error.shape[1], rank), generator=torch.Generator().manual_seed(0)).double()
    for turn in range(3):  # orthonormal in the last round alone
        along = error @ (torch.linalg.qr(across)[0] if turn == 2 else across)
        along = torch.linalg.qr(along)[0] if turn == 2 else along
        across = error.T @ along
    return along @ across.T


CASES = {
    "gear": ({"group_size": 16}, 16, 16, 1, 16, 1, 16, 2),
    "gear-l": ({"group_size": 32}, 32, 32, 0, 16, 0, 16, 2),
    "gear-kcvt": ({}, 64, 0, 1, 16, 1, 16, 4),
    "gear-code": ({"group_size": 16, "count": 6}, 0, 16, 3, 16, 1, 16, 2),
}


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_recipes_are_the_formula_in_float64(name: str, chunks: int) -> None:
    params, among, group, each, among_v, each_v, group_v, nbits = CASES[name]
    prompt, tokens = 192 + 5, 192 + 5 + 64 + 9
    keys, values = normal(1, 2, tokens, HEAD_DIM, seed=1), normal(1, 2, tokens, HEAD_DIM, seed=2)
    cache = Layer(name, **params).cache
    cache.layers[0].attached = False
    for k, v in zip(
        keys[:, :, :prompt].tensor_split(chunks, 2), values[:, :, :prompt].tensor_split(chunks, 2), strict=True
    ):
        cache.update(k, v, 0)
    for t in range(prompt, tokens):
        cache.update(keys[:, :, t : t + 1], values[:, :, t : t + 1], 0)
    cache.commit()
    for dense, x in zip(cache.dense(0), (keys, values), strict=True):
        for head in range(2):
            expected = x[0, head].double()
            for first, last, rank in ((0, prompt, 4), (prompt, prompt + 64, 2)):
                if x is keys:
                    last -= (last - first) % group if group else 0  # fewer than a group wait for more
                    block = expected[first:last]
                    now = gear(block.T, among or len(block), group or len(block), each, nbits, rank, False).T
                else:
                    now = gear(expected[first:last], among_v, group_v, each_v, nbits, rank, True)
                expected[first:last] = now
            torch.testing.assert_close(dense[0, head].double(), expected, rtol=0, atol=0.02)
            lost = (dense[0, head] - x[0, head]).norm()
            assert 0 < lost < 0.5 * x[0, head].norm()


def test_bytes_are_those_of_factors_outliers_and_codes() -> None:
    cache = Layer("gear", group_size=16).cache
    keys = normal(1, 2, 64 * 5, HEAD_DIM)
    cache.update(keys[:, :, :192], keys[:, :, :192], 0)
    for t in range(192, 320):
        cache.update(keys[:, :, t : t + 1], keys[:, :, t : t + 1], 0)
    cache.commit()
    held = {side: cache.layers[0].tiers.stores[side] for side in ("keys", "values")}
    found = {side: [s.bytes() for s in stores if s is not None] for side, stores in held.items()}
    factors = 2 * (2 * 4 * (192 + HEAD_DIM)) + 2 * 2 * (2 * 2 * (64 + HEAD_DIM))
    assert sum(b.get("codes", 0) for b in found["keys"]) == 2 * 320 * HEAD_DIM // 4
    # Two outliers of 16: a number in float32 and its place in a byte, and the place of each token in its group.
    sparse = 2 * (320 // 16) * HEAD_DIM * 2 * (4 + 1) + 2 * 320
    assert sum(b.get("extras", 0) for b in found["keys"]) == factors + sparse
    assert sum(b.get("extras", 0) for b in found["values"]) == factors + 2 * 320 * 2 * (4 + 1)


def test_a_prompt_of_several_turns_is_saved_cropped_and_goes_on(tmp_path: Any) -> None:
    model = tiny("llama")
    params = {"gap": 16, "group_size": 8}
    with attach(model):
        cache = make_cache("gear", model, **params)
        model(ids(70), **{CACHE: cache})
        for t in range(40):
            model(ids(1, seed=t), **{CACHE: cache})
        model(ids(35, seed=3), **{CACHE: cache})  # one arrival of several blocks
        model(ids(1), **{CACHE: cache})
        cache.save(tmp_path / "cache")
        loaded = CompressedCache.load(tmp_path / "cache", model)
        for one in (cache, loaded):
            one.crop(-21)  # into a block that is coded
        for t in range(40):
            found = [model(ids(1, seed=t), **{CACHE: x}).logits for x in (cache, loaded)]
            assert torch.equal(*found)
