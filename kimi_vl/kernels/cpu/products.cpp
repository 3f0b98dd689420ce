// Products of weights with few and many vectors, and fused experts.
extern "C" int products_abi() { return 1; }
