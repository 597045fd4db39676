"""GPU kernels and CPU operators: captures, their traces, and the table of launches by stage."""
