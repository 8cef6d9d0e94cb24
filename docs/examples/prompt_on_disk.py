"""A prompt cached on disk: read once, continued many times, by this process or a later one.

    python docs/examples/prompt_on_disk.py

The first run lets the bundled model read a prompt and saves the compressed cache as prompt.safetensors; further runs
find the file. Each question continues from a cache of its own, loaded from the file. The program prints the size of
the file beside the bytes of an exact cache, and the answers. Delete the file if you change model or prompt: `load`
refuses another model, but can't know of another prompt.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpolicy

directory = Path(kvpolicy.__file__).parent / "model"
model = AutoModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)

lines = "".join(f"<k{i}> <v{i}>\n" for i in range(100))
prompt = tokenizer("Keys and values:\n" + lines, return_tensors="pt")
file = Path("prompt.safetensors")

if not file.exists():
    cache = kvpolicy.make_cache("balanced", model)
    with torch.no_grad():
        model(**prompt, cache=cache, logits_to_keep=1)
    cache.save(file)

for question in ("? <k7> <k8> <k9> <k10>\n", "? <k50> <k3> <k99> <k1>\n"):
    cache = kvpolicy.CompressedCache.load(file, model)
    asked = tokenizer(question, return_tensors="pt")["input_ids"]
    inputs = torch.cat([prompt["input_ids"], asked], dim=1)
    output = model.generate(inputs, cache=cache, max_new_tokens=12, do_sample=False)
    print(tokenizer.decode(output[0, inputs.shape[1] :]))

memory = kvpolicy.CompressedCache.load(file, model).memory()
print(f"{file.stat().st_size:,} bytes in the file, {memory.exact_bytes:,} in an exact cache")
