"""optimum-quanto compiles its own unpacking at first use."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["need_compiler"]


def need_compiler() -> None:
    """Skip where optimum-quanto can't decode what it packed; nothing in kvpolicy needs that."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("optimum-quanto compiles its unpacking, and there is no C++ compiler here")
