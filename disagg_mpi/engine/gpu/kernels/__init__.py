"""The engine's own kernels, in Triton. Imported only where they are used: Triton is no part of a CPU's torch.

``TRITON_INTERPRET=1`` runs them on CPU tensors, in fp32 and without the overlap of launches.
"""
