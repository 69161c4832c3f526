"""The ops as Triton kernels. Sources stand in `triton_kernels/src/`; see `setup.py` for why."""
