"""A tokenizer for tasks, with and without a chat template, and a sample of each kind of file."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import kvpolicy

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@lru_cache(maxsize=1)
def plain() -> Any:
    """The bundled model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(kvpolicy.__file__).parent / "model")


@lru_cache(maxsize=1)
def chatty() -> Any:
    """The same with a chat template, and a first token that it puts before each text, as many do."""
    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(plain())
    made.chat_template = TEMPLATE
    made.bos_token = made.eos_token
    single = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", made.eos_token_id)])
    made.backend_tokenizer.post_processor = single
    return made


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)
