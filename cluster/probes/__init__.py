"""What this host really has: driver, GPUs, links, memory, disk, network, versions, speeds.

GPUs are read from `nvidia-smi`, which comes with every driver and tells in one text what NVML
does: no package has to match the driver, the text can be recorded and kept as a test, and it is
there over ssh on hosts that have no bora yet.
"""
