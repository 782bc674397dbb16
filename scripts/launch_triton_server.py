"""Triton's launch script, for disagg_mpi: the same flags, one mpirun.

    python scripts/launch_triton_server.py --world_size 3 --tensorrt_llm_model_name context,generation \
        --multi-model --disable-spawn-processes
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

try:
    from disagg_mpi.cli.launch_triton import main
except ModuleNotFoundError as error:
    sys.exit(f"{sys.executable} has no module {error.name}; set the project up with `make install` and run "
             f"{ROOT / '.venv/bin/python'} {sys.argv[0]} …")

if __name__ == "__main__":
    main(default_repository=ROOT / "examples" / "model_repository")
