"""Sizes beyond any model of these families: a typing error or an attack, and no reason to
allocate."""

from typing import Final

MAX_VOCAB: Final = 2**24
MAX_HIDDEN: Final = 2**20
MAX_INTERMEDIATE: Final = 2**24
MAX_LAYERS: Final = 2**14
MAX_HEADS: Final = 2**16
MAX_HEAD_DIM: Final = 2**14
MAX_PARAMETERS: Final = 2**42
MIN_EPS: Final = 1.1754943508222875e-38  # the smallest normal fp32

# The largest released config.json has some 10 KB; parsed JSON takes up to 25 times its size.
CONFIG_LIMIT_BYTES: Final = 2 * 2**20
