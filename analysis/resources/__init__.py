"""CPU, memory, GPU, stacks and kernels of a load run, attributed to stages."""
