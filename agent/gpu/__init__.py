"""GPU sampling: NVML, a served process's own torch, or a recorded file."""
