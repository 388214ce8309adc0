"""How far apart two computations of the same thing may be, where a network is in between.

The order of a sum, fused operations and the place where half precision is rounded differ between
processors, libraries (oneDNN, Eigen, onnxruntime, JAX), batch sizes and graphs. Each bound is
what that can amount to, with a factor of ten or so to spare, and far below what a mistake does.
Nothing of this holds for float64 (metrics, statistics): there 1e-9 is a thousandfold of what the
order of ten thousand terms does.
"""

# Probabilities, maps and pooled features, all about 1 or smaller. float32 rounds by 2**-24, which
# is 6e-8; a sum of n products adds about sqrt(n) of these, with n up to 4,000, and layers add up.
FLOAT32 = 1e-5

# The same after rounding to bfloat16, which keeps 8 bits: half a unit is 2**-9 at each of the
# about 12 operations, there and back, between an image and a map of these small networks.
BFLOAT16 = 12 * 2**-8
