"""The Triton kernels, by what they compute. Importing one needs triton; nothing here picks one."""
