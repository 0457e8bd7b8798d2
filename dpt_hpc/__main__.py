"""`python -m dpt_hpc`: the command line."""

from dpt_hpc.cli import main

if __name__ == "__main__":
    main()
