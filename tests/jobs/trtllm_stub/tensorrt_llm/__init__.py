"""The double of TensorRT-LLM under its name, for jobs: with this folder and tests/unit on PYTHONPATH."""
