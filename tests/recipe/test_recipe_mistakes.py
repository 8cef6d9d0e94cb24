"""What a user easily writes wrong: the message says where, what must hold, what was found, and what to write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import LlamaConfig
from written import policy, store, tiers

import kvpolicy
from kvpolicy.errors import RecipeError
from kvpolicy.recipe.load import load_recipe, load_yaml
from kvpolicy.recipe.spec import Recipe, Tier


def rank(options: str) -> str:
    return policy(f"{{kind: rank, scorer: key_norm, {options}}}")


RECENT = "{policy: {kind: recent, window: 8}, store: full}"
FULL = "full has no options and must be a plain word, found"
BUDGET = "a budget is a number of tokens (an integer) or a fraction of the tokens seen in (0, 1), found"
ANY = "a store must be full, evict or a mapping with a quantizer's kind, found"
ARRIVAL = "{kind: int, per: channel, group_size: arrival, extras: [{kind: sparse, share: 0.1}]}"

# text -> what the message must say after "bad.yaml"
MISTAKES = {
    store(
        "{kind: full, nbits: 4}"
    ): f":2: tiers[0].store: {FULL} 'nbits'; write full alone, or the kind of a quantizer",
    store("{kind: full}"): f":2: tiers[0].store: {FULL} a mapping; write full",
    tiers(RECENT, "{keys: {kind: evict, n: 3}, values: evict}"): (
        ":3: tiers[1].keys: evict has no options and must be a plain word, found 'n'; write evict alone"
    ),
    store("null"): f":2: tiers[0].store: {ANY} nothing",
    store("[int]"): f":2: tiers[0].store: {ANY} a list",
    store("4"): f":2: tiers[0].store: {ANY} 4",
    store("{int: {nbits: 4}}"): "must say its kind, found nothing; write {kind: int, ...}; installed: ",
    store("{kind: {int: {nbits: 4}}}"): "must say its kind, found a mapping; write kind: int, and options beside it",
    store("{kind:int, nbits:4}"): "must say its kind, found nothing; a colon is followed by a space: kind: ...",
    store("{kind: recent}"): "store.kind: no quantizer of kind 'recent', which is a policy; installed: ",
    policy("{kind: int}"): "policy.kind: no policy of kind 'int', which is a quantizer; installed: ",
    store("{kind: int, nbits: '4'}"): "store.nbits: must be 1, 2, 3, 4 or 8, found '4'; write 4 without quotes",
    store("{kind: int, nbits: null}"): "found nothing; leave it out for its default",
    store("{kind: int, clip: '0.9'}"): "store.clip: must be a valid number, found '0.9'; write 0.9 without quotes",
    store("{kind: int, symmetric: yes}"): "store.symmetric: must be true or false, found 'yes'",
    store("{kind: int, transforms: hadamard}"): (
        ":2: tiers[0].store.transforms: must be a list, found 'hadamard'; write transforms: [hadamard]"
    ),
    store("{kind: int, transforms: {kind: hadamard}}"): "must be a list, found a mapping; write transforms: [{...}]",
    store("{kind: int, transforms: null}"): "must be a list, found nothing; leave it out, or write transforms: []",
    store("{kind: int, transforms: 3}"): "must be a list, found 3; installed: hadamard, ",
    store("{kind: int, transforms: hadamrd}"): "must be a list, found 'hadamrd' (did you mean 'hadamard'?); installed",
    store("{kind: int, transforms: [null]}"): (
        "store.transforms[0]: a transform must be a kind or a mapping with kind and options, found nothing"
    ),
    store("{kind: int, transforms: [sparse]}"): "transforms[0]: a transform must be a kind or a mapping with kind and "
    "options, found 'sparse', which is an extra; installed: hadamard",
    store("{kind: int, transforms: [{hadamard: {seed: 1}}]}"): "found nothing; write {kind: hadamard, ...}; installed",
    store("{kind: int, extras: sparse}"): "store.extras: must be a list, found 'sparse'; write extras: [sparse]",
    store("{kind: int, extras: }"): "must be a list, found nothing; leave it out, or write extras: []",
    store("{kind: int, extras: [hadamard]}"): "extras[0]: an extra must be a kind or a mapping",
    tiers(RECENT, f"{{keys: {ARRIVAL}, values: {{kind: int}}}}"): (
        ":3: tiers[1].keys.extras[0]: sparse must have count with group_size: arrival, found share: 0.1; write count"
    ),
    tiers(RECENT, "{store: {kind: int, group_size: arrival}}"): (
        ":3: tiers[1].store.group_size: group_size: arrival must go with per: channel, found per: token; give a number"
    ),
    store("{kind: int, per: channel, group_size: arrival}"): (
        ":2: tiers[0].store.group_size: group_size: arrival must stand below a tier whose tokens leave in blocks"
    ),
    policy("{kind: recent, window: '128'}"): f"policy.window: {BUDGET} '128'; write 128 without quotes",
    policy("{kind: recent, window: 10%}"): f"policy.window: {BUDGET} '10%'; write 0.1",
    policy(
        "{kind: rank, scorer: keynorm}"
    ): "policy.scorer: a scorer must be a kind or a mapping with kind and options",
    rank("budget: 64, threshold: 0.1"): (
        "policy: option 'budget' must stand without a threshold, found budget: 64 and threshold: 0.1; remove one of"
    ),
    rank("budget: null"): f"policy.budget: {BUDGET} nothing; leave it out for its default",
    rank("budget: [1, many]"): f":2: tiers[0].policy.budget[1]: {BUDGET} 'many'",
    rank("budget: [0.5, 0]"): "policy.budget[1]: a budget in tokens must be at least 1, found 0",
    rank("budget: {0-3: '3'}"): f"policy.budget.0-3: {BUDGET} '3'; write 3 without quotes",
    rank("budget: {first: 3}"): "policy.budget.first: a layer selector is an index or a range",
    rank("budget: {0-3: 3, 2: 4}"): "policy.budget.2: a layer may be named once, found '2' overlapping '0-3'",
    "tiers:\n  store: full\n": ":1: tiers: tiers must be a list of at least one tier, found a mapping; begin each tier",
    "layers: {0: {store: full}}\n" + store("full"): (
        ":1: layers.0: a layer must have a list of tiers or full, found a mapping; begin each tier with a dash"
    ),
    "layers: {0: }\n" + store("full"): ":1: layers.0: a layer must have a list of tiers or full, found nothing",
    tiers("{store: {kind: int}, nbits: 4}"): (
        "tiers[0].nbits: unknown key 'nbits' of a tier; an option of a quantizer stands beside its kind: store: {kind:"
    ),
    tiers("{quantizer: {kind: int}}"): "unknown key 'quantizer' of a tier (did you mean 'store'?)",
    "store: full\n" + tiers("{store: full}"): ":1: store: unknown key 'store'; it belongs to a tier, in the list tiers",
    "extends: kivi\nparams: {nbit: 2}\n": "params.nbit: parameter 'nbit' must be used as $nbit somewhere, the whole "
    "value of a key, found nowhere (did you mean 'nbits'?)",
}


@pytest.mark.parametrize("text", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_line_that_tells_what_to_write(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message, expected = str(caught.value), MISTAKES[text]
    assert "\n" not in message
    assert message.startswith(f"{path}:")
    if expected.startswith(":"):
        assert message.removeprefix(str(path)).startswith(expected), message
    else:
        assert expected in message, message


def test_tiers_made_in_python_are_checked_alike() -> None:
    parts = load_yaml(tiers(RECENT, "{store: {kind: int, per: channel, extras: [{kind: sparse, share: 0.1}]}}")).tiers
    assert not isinstance(parts[1].keys, str)
    keys = parts[1].keys.model_copy(update={"group_size": "arrival"})
    with pytest.raises(RecipeError, match=r"^recipe mine: tiers\[1\]\.keys\.extras\[0\]: sparse must have count with"):
        Recipe(name="mine", tiers=(parts[0], Tier(keys=keys, values="full")))


def short(own: str) -> str:
    below = f"    - {{policy: {{kind: rank, scorer: key_norm, budget: {own}}}, store: full}}\n    - {{store: evict}}\n"
    return f"layers:\n  1-2:\n{below}{store('full')}"


# A recipe whose budgets don't fit a model of 3 layers -> path and reason.
LAYERS = {
    rank("budget: [1, 2]"): "budget: a list of budgets must have one for each layer of the model, which has 3, found 2",
    rank("budget: {0-1: 3}"): "budget: budgets by layer must name every layer that is kept so, found none for layer 2",
    rank("budget: {0-3: 3}"): "budget.0-3: budgets by layer must name layers of the model, which has 3 (0 to 2, or -3",
    rank("budget: {0-2: 3, -1: 4}"): "budget.-1: budgets by layer must name a layer once, found layer 2 of 3 in both",
    rank("budget: {2--3: 3}"): "budget.2--3: budgets by layer must name layers of the model",
    short("[1, 2]"): "budget: a list of budgets must have one for each layer",
    short("{1: 3}"): "budget: budgets by layer must name every layer that is kept so, found none for layer 2 of 3",
}


@pytest.mark.parametrize("text", LAYERS, ids=range(len(LAYERS)))
def test_budgets_that_do_not_fit_the_model_have_a_path_and_the_right_reason(text: str) -> None:
    config = LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    path = "tiers[0]" if text.startswith("tiers") else "layers.1-2[0]"
    with pytest.raises(RecipeError, match=f"^{re.escape(f'recipe custom: {path}.policy.{LAYERS[text]}')}"):
        kvpolicy.make_cache(load_yaml(text), config)
