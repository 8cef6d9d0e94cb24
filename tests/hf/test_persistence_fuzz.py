"""Saved files that were changed, their checksum included: refused, or caches that hold what the tensors say."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import exact, ids, tiny
from recipes import NAMED, by_channel, by_token, recent, sink
from safetensors import safe_open
from safetensors.torch import load, load_file, save
from transformers import PreTrainedModel
from words import CACHE

from kvpolicy import CompressedCache, attach, make_cache
from kvpolicy.errors import CacheError, MissingDependencyError
from kvpolicy.layer.saving.file import checksum

CASES = int(os.environ.get("KVPOLICY_FUZZ_CASES", "350"))
"""Mutations in all; 10,000 take some ten minutes."""
EVICTING = [{"policy": recent(9, 3), "store": "full"}, {"policy": sink(3), "store": by_channel(4, 5)}]
DIVIDED = [{"policy": recent(9, 3), "store": "full"}, {"store": by_token(4, transforms=["scale"])}]
SAMPLES: dict[str, tuple[str, Any, bool]] = {
    "by channel": ("llama", NAMED["kivi"], False),
    "evicting": ("llama", {"tiers": [*EVICTING, {"store": "evict"}]}, False),
    "divided": ("llama", {"tiers": DIVIDED}, False),
    "by layer": ("llama", NAMED["layers"], False),
    "by update": ("llama", NAMED["hf-quantized"], False),
    "sliding": ("gemma3_text", NAMED["kivi"], False),
    "padded": ("llama", NAMED["kivi"], True),
    "padded, evicting": ("llama", {"tiers": [*EVICTING, {"store": "evict"}]}, True),
    "by attention": ("llama", "h2o", True),
    "by attention, divided": ("llama", "zipcache", True),
}
VALUES = [None, True, False, -1, 0, 1, 2, 3, 44, 1.5, float("nan"), "", "0", "x", [], {}, [1], 2**31, 2**63, 10**30]
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool]


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@lru_cache(maxsize=16)
def content(sample: str) -> tuple[dict[str, str], bytes]:
    """Header and tensors of a saved cache of 43 tokens."""
    family, recipe, attached = SAMPLES[sample]
    model = tiny(family)
    mask = torch.ones(2, 43, dtype=torch.long)
    mask[1, :9] = 0
    with attach(model) if attached else nullcontext():
        cache = make_cache(recipe, model)
        model(ids(40, batch=2), **{CACHE: cache}, **({"attention_mask": mask[:, :40]} if attached else {}))
        for t in range(3):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1) if t else mask
            model(ids(1, batch=2, seed=t), **{CACHE: cache})
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"kvpolicy-fuzz-{os.getpid()}"
    try:
        cache.save(file)
        with safe_open(file, "pt") as opened:
            return opened.metadata(), save(load_file(file))
    finally:
        file.unlink(missing_ok=True)


def any_json(data: Any, rng: random.Random) -> Any:
    """`data` with one thing changed, somewhere in it."""
    if isinstance(data, dict) and data and rng.random() < 0.9:
        key = rng.choice(sorted(data))
        if rng.random() < 0.15:
            return {k: v for k, v in data.items() if k != key}
        return {**data, key: any_json(data[key], rng)}
    if isinstance(data, list) and data and rng.random() < 0.9:
        at = rng.randrange(len(data))
        action = rng.random()
        if action < 0.2:
            return data[:at] + data[at + 1 :] if action < 0.1 else [*data, data[at]]
        return [*data[:at], any_json(data[at], rng), *data[at + 1 :]]
    if type(data) is int and rng.random() < 0.5:
        return data + rng.choice([-1, 1, 7])
    return rng.choice(VALUES)


def any_recipe(text: str, rng: random.Random) -> str:
    action = rng.randrange(5)
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    if action == 0:
        return "\n".join(lines[:at] + lines[at + 1 :])
    if action == 1:
        return "\n".join(lines[:at] + [lines[at]] * 2 + lines[at + 1 :])
    if action == 2:
        words = ["full", "evict", "token", "channel", "head", "auto", "arrival", "true", "null", "update", "hqq", "x"]
        word = rng.choice(list(re.finditer(r"(?<=: )[a-z]+", text)))
        return text[: word.start()] + rng.choice(words) + text[word.end() :]
    number = rng.choice(list(re.finditer(r"\d+", text)))
    other = rng.choice(["0", "1", "2", "3", "4", "8", "32", "100000", "-1", "0.5", "1e400", str(int(number[0]) + 1)])
    return text[: number.start()] + other + text[number.end() :]


def any_header(header: dict[str, str], rng: random.Random) -> dict[str, str]:
    name = rng.choice(["recipe", "recipe", "layers", "layers", "layers", "states", "states", *sorted(header)])
    if name not in header or rng.random() < 0.05:
        return {k: v for k, v in header.items() if k != name}
    if rng.random() < 0.05:
        return {**header, name: rng.choice(["", "null", "{", "[]", "3", "[" * 5000, "\0", "x" * 5000])}
    if name == "recipe" and re.search(r": [a-z].*\d", header[name], re.DOTALL):
        return {**header, name: any_recipe(header[name], rng)}
    if name in ("layers", "states", "model", "versions") and header[name][:2] in ("[{", '{"'):
        return {**header, name: json.dumps(any_json(json.loads(header[name]), rng))}
    return {**header, name: rng.choice(["1", "2", "llama", "kvpolicy-cache", "x"])}


def any_tensor(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    name, other = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
    if rng.random() < 0.7:  # large ones of codes are many, and nothing of them can be wrong
        name = rng.choice([n for n in sorted(tensors) if not n.endswith(("codes", "params", "exact"))])
    x = tensors[name]
    action = rng.randrange(10)
    if action == 0:
        return {k: v for k, v in tensors.items() if k != name}
    if action == 1:
        return {**tensors, name: tensors[other], other: x}
    if action == 2:
        return {**tensors, rng.choice([name + ".x", name[:-1], "9" + name, name.replace("0", "1")]): x}
    return {**tensors, name: (any_shape if action < 5 else any_values)(x, rng).contiguous()}


def any_shape(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    axis = rng.randrange(x.ndim) if x.ndim else 0
    changes: list[Callable[[], torch.Tensor]] = [
        lambda: x.flatten(),
        lambda: x.unsqueeze(0),
        lambda: x.transpose(0, -1),
        lambda: torch.cat([x, x], dim=axis),
        lambda: x.narrow(axis, 0, x.shape[axis] // 2),
        lambda: x.narrow(axis, 0, max(x.shape[axis] - 1, 0)),
        lambda: torch.cat([x, x.narrow(axis, 0, min(x.shape[axis], 1))], dim=axis),
        lambda: x.new_zeros(()),
        lambda: x.new_zeros(rng.choice([(0,), (2, 2, 0, 2**40), (2**40, 2, 0, 32), (1, 1, 1, 1)])),
    ]
    return rng.choice(changes)()


def any_values(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    if rng.random() < 0.2:
        return x.to(rng.choice(TYPES))
    x = x.clone()
    flat = x.view(-1)
    if not len(flat):
        return x
    at, other = rng.randrange(len(flat)), rng.randrange(len(flat))
    extreme = [float("nan"), float("inf"), 0.0, -1.0, 1e30] if x.is_floating_point() else [0, 1, 43, 44, 100, 127]
    change = rng.randrange(5)
    if change == 0:
        flat[at] += 1
    elif change == 1:
        flat[at] = rng.choice(extreme) if x.is_floating_point() or rng.random() < 0.8 or x.dtype == torch.uint8 else -1
    elif change == 2:
        flat[at], flat[other] = flat[other].clone(), flat[at].clone()
    elif change == 3:
        flat.copy_(flat.flip(0))
    else:
        flat.fill_(flat[at])
    return x


def mutated(sample: str, rng: random.Random) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    header, data = content(sample)
    tensors = load(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < 0.35:
            header = any_header(header, rng)
        elif tensors:
            tensors = any_tensor(tensors, rng)
    return header, {name: x.clone() for name, x in tensors.items()}  # safetensors refuses shared memory


def decoded(tensors: dict[str, torch.Tensor], layer: int, side: str, store: int, spec: Any) -> np.ndarray[Any, Any]:
    """What a store holds, from the tensors alone, in float64: `[batch, kv_heads, tokens, head_dim]`."""
    parts = {k.split(".", 3)[3]: t for k, t in tensors.items() if k.startswith(f"{layer}.{side}.{store}.")}
    whole = [x.double().numpy() for x in (parts.get("exact"),) if x is not None]
    if "codes" not in parts:
        return np.concatenate(whole, axis=2) if whole else np.zeros((2, 2, 0, 32))
    like = tensors[f"{layer}.{side}.like"]
    codes, dim, bits = parts["codes"].numpy().astype(np.int64), like.shape[3], spec.nbits
    planes = [codes >> (bits * i) & (2**bits - 1) for i in range(8 // bits)]
    number = np.concatenate(planes, axis=3)[..., :dim].astype(np.float64)
    scale, offset = np.split(parts["params"].double().numpy(), 2, axis=3)
    if "sizes" in parts:
        scale, offset = (np.repeat(x, parts["sizes"].numpy(), axis=2) for x in (scale, offset))
    scale, offset = (np.repeat(x, dim // x.shape[3], axis=3) for x in (scale, offset))
    x = number * scale + offset
    if "transforms.0.divisors" in parts:
        x = x * parts["transforms.0.divisors"].double().numpy()
    return np.concatenate([x, *whole], axis=2)


def check_decoded(cache: CompressedCache, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    """`dense` against the tensors, decoded in float64 and put in order of position."""
    for i, entry in enumerate(json.loads(header["layers"])):
        if entry["type"] != "tiers":
            continue
        placement = cache.layers[i].tiers.placement
        for side, found in zip(("keys", "values"), cache.dense(i), strict=True):
            specs = [placement.store_spec(side, s) for s in range(len(placement.first_tier[side]))]
            order = [tensors[f"state.{entry['state']}.{side}.{s}"].numpy() for s in range(len(specs))]
            held = [decoded(tensors, i, side, s, spec) for s, spec in enumerate(specs) if spec != "evict"]
            expected = np.concatenate(held, axis=2)[:, :, np.argsort(np.concatenate(order))]
            np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-4, atol=1e-5)


def check_step(cache: CompressedCache, model: PreTrainedModel) -> None:
    """A step against the library's own cache that holds what `dense` gives; then more steps."""
    seen, token = cache.get_seq_length(), ids(1, batch=2, seed=5)
    other = exact(model)
    for i in range(len(cache.layers)):
        other.update(*cache.dense(i), i)
    where = torch.full((2, 1), seen)
    expected = model(token, **{CACHE: other}, position_ids=where).logits
    found = model(token, **{CACHE: cache}, position_ids=where).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """To the bit; tables may be kept in other integers."""
    a, b = ({k: t.long() if ".table." in k and "scores" not in k else t for k, t in x.items()} for x in (a, b))
    raw = [{k: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()) for k, t in x.items()} for x in (a, b)]
    return raw[0] == raw[1]


def loaded(file: Path, model: PreTrainedModel) -> CompressedCache | None:
    """The cache in a file, or None where it was refused, by an error that says of which file it speaks."""
    try:
        return CompressedCache.load(file, model)
    except MissingDependencyError:
        return None
    except CacheError as error:
        told = str(error)
    assert str(file) in told
    assert len(told) < 900
    return None


def attempt(sample: str, seed: int, folder: Path) -> bool:
    """Whether a mutation was refused; if not, the cache must hold what the tensors say, and work."""
    header, tensors = mutated(sample, random.Random(f"{sample} {seed}"))
    family, _, attached = SAMPLES[sample]
    model, file = tiny(family), folder / "cache"
    file.write_bytes(save(tensors, metadata={**header, "checksum": checksum(header, tensors)}))
    before = file.read_bytes()
    with attach(model) if attached else nullcontext():
        cache = loaded(file, model)
        if cache is None:
            return True
        cache.save(folder / "again")
        assert equal(load_file(folder / "again"), tensors)
        with safe_open(folder / "again", "pt") as opened:
            again = opened.metadata()
        assert json.loads(again["layers"]) == json.loads(header["layers"])
        assert json.loads(again["states"]) == [
            {"prompt": None, "through": 0, **x} for x in json.loads(header["states"])
        ]
        assert load_recipe_text(again["recipe"]) == load_recipe_text(header["recipe"])
        assert str(cache.summary())
        if not attached:
            check_decoded(cache, tensors, header)
        if sample != "sliding" and not attached:
            check_step(cache, model)
        for n in (1, 30, 1):
            model(ids(n, batch=2, seed=n), **{CACHE: cache})
    assert file.read_bytes() == before
    return False


def load_recipe_text(text: str) -> Any:
    from kvpolicy.recipe.load import load_yaml

    return load_yaml(text).tiers, load_yaml(text).layers


@pytest.mark.parametrize("sample", SAMPLES)
def test_what_was_saved_comes_back(sample: str, tmp_path: Path) -> None:
    """The checks below hold of files that nobody changed."""
    header, data = content(sample)
    (tmp_path / "cache").write_bytes(save(load(data), metadata=header))
    family, _, attached = SAMPLES[sample]
    with attach(tiny(family)) if attached else nullcontext():
        cache = CompressedCache.load(tmp_path / "cache", tiny(family))
        cache.save(tmp_path / "again")
    assert equal(load_file(tmp_path / "again"), load(data))
    if not attached:
        check_decoded(cache, load(data), header)
    if sample != "sliding" and not attached:
        check_step(cache, tiny(family))


@pytest.mark.parametrize("sample", SAMPLES)
def test_changed_files_are_refused_or_right(sample: str, tmp_path: Path) -> None:
    cases = CASES // len(SAMPLES)
    first = int(os.environ.get("KVPOLICY_FUZZ_SEED", "0"))
    refused = sum(attempt(sample, first + seed, tmp_path) for seed in range(cases))
    print(f"{sample}: {refused} of {cases} refused")
    assert refused > cases // 2
