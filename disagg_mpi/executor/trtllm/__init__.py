"""TensorRT-LLM's executor behind the executor API; docs/tensorrt-llm.md says what maps to what.

``engine_dir`` reads what an engine was built for, ``library`` makes the library's own objects, ``translate``
turns requests into the library's and its answers into ours, ``executor`` leads an instance and ``follower``
is each other rank of it. Nothing here imports the library before a rank makes its executor.

Written to the signatures of ``tensorrt_llm.bindings.executor``; it has not run on the real library.
"""
