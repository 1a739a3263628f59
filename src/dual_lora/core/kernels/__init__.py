"""The kernels for GPUs, in Triton: composing a weight, and the gradients of its factors."""
