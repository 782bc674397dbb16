"""``python -m disagg_mpi``."""

from disagg_mpi.cli.main import main

if __name__ == "__main__":
    main()
