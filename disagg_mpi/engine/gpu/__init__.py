"""The engine for GPUs: the same steps, computed on a device with memory and a queue of its own.

``device``      what of CUDA is used, and its stand-in on the processor for tests
``tables``      a step as arrays: pure
``buffers``     those arrays on their way to the device, without a wait
``attention/``  paged attention: flashinfer's with our own for generation, or torch's own
``kernels/``    our own, in Triton
``operations``  what lies between matrix products: flashinfer's, or torch's own
``weights``     one allocation for a rank's slice of the model, which ranks of one GPU share
``model``       the forward of a stage
``products``    its matrix products where a step only generates
``graphs``      generation steps, captured once a batch size
``sampler``     tokens from logits, on the device
``collectives`` sums over ranks of a stage: NCCL, or by way of the host
``stage``       one rank's part of a step
``runner``      the leader's view: launch the next step while one runs
"""
