"""`python server.py MODEL ...` is `crane serve MODEL ...`."""

import sys

from crane_serve.cli import app

if __name__ == "__main__":
    app(["serve", *sys.argv[1:]])
