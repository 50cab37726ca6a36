"""IC-Seg and Hi-GRPO in JAX. The method is `icseg_jax.train`; everything else serves it."""
