"""Runs the `headrace` command: `python -m headrace`."""

from headrace.cli.main import app

if __name__ == "__main__":
    app(prog_name="headrace")
