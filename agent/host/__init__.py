"""The host sampler: what processes, cgroups and the host say of themselves; see docs/host.md."""
