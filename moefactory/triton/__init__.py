"""The experts as fused Triton kernels: one kernel a file, each opening with the equation that it computes."""
