"""The kernels that recipes ask for, and then some: what must compile without spilled registers."""

from __future__ import annotations

from kvpolicy.attention.cuda.compile import Variant
from kvpolicy.attention.cuda.formats import EXACT, Format, kind_of

BFLOAT = 1
"""The number of bfloat16 among the types of scale and offset."""

SMALL = 3
"""That of float8_e4m3."""


def token(bits: int, group: int, number: int = BFLOAT) -> Format:
    return Format(bits, group, False, number)


def channel(bits: int, group: int, number: int = BFLOAT) -> Format:
    return Format(bits, group, True, number)


def centred(bits: int, group: int, number: int = BFLOAT) -> Format:
    return Format(bits, group, False, 4 + number)


def numbered(bits: int, number: int = BFLOAT) -> Format:
    return Format(bits, 0, True, number, numbered=True)


def variant(
    dims: int | tuple[int, int],
    *pairs: tuple[Format, Format] | tuple[Format, Format, bool] | tuple[Format, Format, bool, bool],
    rows: int = 4,
    bfloat: bool = True,
    **flags: object,
) -> Variant:
    kinds = sorted({kind_of(*pair)[0] for pair in [(EXACT, EXACT), *pairs]})
    return Variant((dims, dims) if isinstance(dims, int) else dims, rows, bfloat, tuple(kinds), **flags)


LOGQUANT = (token(2, 64), token(2, 64))
KIVI = ((channel(2, 32), token(2, 32)), (channel(2, 32), EXACT))
PARTIAL = ((EXACT, token(2, 64), True), (token(2, 64), token(2, 64), True))
FEW = [
    variant(128, LOGQUANT),
    variant(128, *KIVI),
    variant(128, (channel(4, 32), token(4, 64)), rows=8),
    variant(128, LOGQUANT, rows=8, mask=1, places=4, causal=True, softcap=True, scores=True),
    variant(128, LOGQUANT, (token(4, 64), token(4, 64)), wide=True),
    variant(128, (numbered(4), token(4, 128)), (numbered(2), token(2, 128)), wide=True),
    variant(128, (channel(4, 64, SMALL), centred(2, 128, SMALL)), (channel(4, 64, SMALL), EXACT), wide=True),
    variant(128, *PARTIAL),
]
"""What is compiled for every architecture."""
MANY = [
    *(
        variant(dim, (token(bits, group), token(bits, group)))
        for dim, group in ((64, 64), (96, 48))
        for bits in (1, 2, 4, 8)
    ),
    *(variant(80, (token(bits, 40), token(bits, 40))) for bits in (1, 2, 4)),
    *(variant(256, (token(bits, 64), token(bits, 64))) for bits in (2, 4)),
    variant(128, (token(3, 64), token(3, 64))),
    variant(128, (channel(3, 16, 2), token(3, 32, 2))),
    variant(128, (channel(8, 128), token(8, 128))),
    variant(128, (token(2, 16, 0), token(2, 16, 0)), bfloat=False),
    variant((128, 64), (channel(2, 32), token(2, 64))),
    variant(128, (numbered(8), EXACT), (numbered(3, 2), token(2, 32)), rows=8),
    variant((256, 64), (numbered(2), token(2, 64))),
    variant(64, (centred(3, 64), centred(2, 64)), rows=8, wide=True),
    variant(128, (centred(2, 128), centred(2, 128)), wide=True),
    variant(128, (channel(4, 64), centred(2, 128)), (centred(8, 32, 2), centred(1, 64, 0)), wide=True),
    variant(64, (channel(1, 16, SMALL), token(2, 32, SMALL)), (numbered(8, SMALL), token(3, 64, SMALL)), rows=8),
    variant(96, (token(4, 32, SMALL), centred(4, 32, SMALL)), wide=True),
    variant(80, (numbered(1), token(1, 40)), (numbered(2), EXACT)),
    variant((64, 128), (token(4, 64), token(2, 64)), (EXACT, token(2, 64))),
    variant(128, LOGQUANT, mask=2, places=8),
    variant(128, (EXACT, EXACT, True), (numbered(2), token(2, 32), True), rows=8, mask=1, places=8, scores=True),
    variant(256, (Format(4, 32, True, BFLOAT, 256), token(4, 64), True), (token(2, 64), EXACT, True), wide=True),
    variant(80, (token(2, 40), token(1, 40), True), (EXACT, centred(2, 80, SMALL), True), wide=True),
    variant(128, LOGQUANT, mask=3, places=8, causal=True),
    variant(128, LOGQUANT, mask=4, places=4, room=(360, 240)),
    variant(256, (Format(3, 64, False, BFLOAT, 256), Format(3, 64, False, BFLOAT, 256))),
    variant(256, (Format(3, 32, True, BFLOAT, 256), Format(3, 64, False, BFLOAT, 256)), rows=8, wide=True),
    variant(256, (Format(2, 0, True, BFLOAT, 256, True), EXACT, True)),
    variant(256, (Format(4, 0, True, BFLOAT, 256, True), Format(4, 64, False, BFLOAT, 256)), rows=8, wide=True),
    variant(96, (Format(3, 0, True, BFLOAT, 96, True), Format(3, 48, False, BFLOAT, 96))),
    *(variant(128, (*LOGQUANT, False, True), rows=rows) for rows in (4, 8)),
    variant(128, (*LOGQUANT, False, True), rows=8, mask=1, places=4, causal=True, softcap=True, scores=True),
    variant(128, (token(2, 64, 2), token(2, 64, 2), False, True), rows=8, mask=3, places=8),
    variant(128, (token(1, 32), centred(2, 128), False, True), (channel(4, 64), token(4, 64), False, True), wide=True),
    variant(80, (token(2, 40), token(1, 40), False, True), rows=8, wide=True),
    variant((64, 128), (centred(1, 64, SMALL), token(2, 32, SMALL), False, True), bfloat=False, scores=True),
]
"""What is compiled for one architecture more."""
