"""The hand-over: a request's KV-cache passes from the instance that computed it to the one that decodes.

``layout`` says where bytes lie (pure), ``transports`` move them, ``transceiver`` is the protocol with its two
ends, ``offers`` and ``pulls``, and ``memory`` provides the pools. Nothing here knows about tensors.
"""
