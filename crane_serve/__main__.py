"""`python -m crane_serve` is the `crane` command."""

from crane_serve.cli import app

if __name__ == "__main__":
    app(prog_name="crane")
