"""A recipe of your own: a YAML file, checked, simulated without a model, and used as a cache.

    python docs/examples/own_recipe.py

The recipe is mine.yaml beside this file: the first 4 tokens and a window stay exact, the others get 4 bits for keys
and 2 for values. The program prints how many of 300 tokens each tier holds, for two values of a parameter; then the
answer of the bundled model with this cache; then the bytes that the cache holds, by layer, side and tier.
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpolicy
from kvpolicy.errors import RecipeError
from kvpolicy.placement.simulate import simulate

MINE = Path(__file__).with_name("mine.yaml")

# What is wrong in a recipe is told before any model is loaded, with file, line and remedy.
try:
    kvpolicy.load_recipe(MINE, windw=64)
except RecipeError as error:
    print(error)

# Placement is arithmetic on positions: no model is needed to see it.
for window in (32, 64):
    recipe = kvpolicy.load_recipe(MINE, window=window)
    recent, sinks, others = simulate(recipe.tiers, tokens=300)
    print(f"window={window}: {len(recent)} newest, {len(sinks)} sinks, {len(others)} quantized")

directory = Path(kvpolicy.__file__).parent / "model"  # small and bundled; the directory of any decoder does
model = AutoModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
lines = "".join(f"<k{i}> <v{i % 100}>\n" for i in range(60))
inputs = tokenizer(f"Keys and values:\n{lines}? <k17> <k5> <k59> <k3>\n", return_tensors="pt")

cache = kvpolicy.make_cache(MINE, model, window=64)
output = model.generate(**inputs, cache=cache, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
print(cache.memory())
print(cache.memory().table())
