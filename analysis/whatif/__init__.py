"""What a load run would have measured with one thing changed: a simulation of the measured pipeline."""
