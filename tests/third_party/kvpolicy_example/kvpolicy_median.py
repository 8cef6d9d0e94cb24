"""Quantizer `median`: levels around the middle of each group."""

from typing import Literal

import torch

import kvpolicy


class Median(kvpolicy.AffineQuantizer):
    """Spreads the levels evenly around each group's median, as far as its farthest number."""

    kind: Literal["median"] = "median"

    def calibrate(self, groups):
        x, levels = groups.float(), 2**self.nbits - 1
        middle = x.median(dim=1, keepdim=True).values
        reach = (x - middle).abs().amax(dim=1, keepdim=True)
        scale, offset = 2 * reach / levels, middle - reach
        codes = ((x - offset) / scale.clamp(min=1e-30)).nan_to_num(0).round().clamp(0, levels)
        return kvpolicy.Affine(codes.to(torch.uint8), scale, offset)


@kvpolicy.hookimpl
def kvpolicy_quantizers():
    return [Median]
