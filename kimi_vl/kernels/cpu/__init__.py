"""The decoder's operations as native code for processors with AVX-512, compiled on the machine that runs them."""
