"""The probe: a socket in the served process that answers questions of tools on the same host."""
