"""The leader API of one instance, and what implements it.

``base`` is the interface (names as in TensorRT-LLM's executor), ``builtin`` the engine behind it,
``null`` one that computes nothing, ``trtllm`` TensorRT-LLM's, ``output`` turns tokens into text, ``service``
serves rank 0.
"""
