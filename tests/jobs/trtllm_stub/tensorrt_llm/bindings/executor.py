"""What the job imports."""

from trtllm_double import *  # noqa: F403
