"""What compiled kernels take, as it was when this source was compiled by this compiler before: kernels.json.

To compile them all takes minutes of each run, and gives the same as long as source, options and compiler are the same.
What is not in the file is compiled. Once the kernels are changed: `python tests/support/taken.py` writes it anew.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from variants import asked_for

from kvpolicy.attention.cuda.compile import OPTIONS, Resources, Source, compiled, resources, source

__all__ = ["recorded", "taken"]

RECORD = Path(__file__).parents[1] / "golden" / "kernels.json"


@lru_cache(maxsize=1)
def _record() -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


@lru_cache(maxsize=1)
def _compiler() -> str:
    try:
        return version("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        return "unknown"


def _key(kernel: Source, arch: str) -> str:
    text = "\0".join([source(kernel, arch), arch, _compiler(), *OPTIONS])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def recorded(kernel: Source, arch: str) -> Resources | None:
    """What a kernel took when this source was compiled before, or None."""
    found = _record().get(_key(kernel, arch))
    return None if found is None or _compiler() == "unknown" else Resources(*found)


def taken(kernel: Source, arch: str) -> Resources:
    """What a kernel takes."""
    return recorded(kernel, arch) or resources(compiled(kernel, arch))


def main() -> None:
    """Compile all and write the record."""
    found = {_key(kernel, arch): [*resources(compiled(kernel, arch))] for kernel, arch in asked_for()}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(numbers)}" for key, numbers in sorted(found.items()))
    RECORD.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
