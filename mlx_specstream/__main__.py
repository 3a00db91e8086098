"""`python -m mlx_specstream`: the `specstream` command, where scripts are not on the path."""

from .cli import run

if __name__ == "__main__":
    run()
