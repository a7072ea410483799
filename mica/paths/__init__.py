"""How a formula is computed: `mica.paths.triton_path`, on the kernels of `mica.kernels`."""
