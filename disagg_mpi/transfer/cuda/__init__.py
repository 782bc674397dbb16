"""The hand-over where KV pools are device memory: the one place below the engine that knows tensors.

``memory`` provides pools and lets ranks of a host open each other's, ``kernels`` copies rows between pools
and messages, ``gather`` brings blocks out of an opened pool, ``packed`` by messages of packed bytes. A pool
is a flat ``uint8`` tensor; where its bytes lie is ``transfer.layout``'s to say, as for any other.
Everything runs on CPU tensors too, which is how it is tested where there is no GPU.
"""
