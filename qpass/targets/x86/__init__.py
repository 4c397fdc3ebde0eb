"""x86 CPUs: oneDNN kernels in int8, and weights packed for them."""
