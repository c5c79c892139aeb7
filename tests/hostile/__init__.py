"""What ill will can do to the service, measured: a table of cases, each held or not.

    python -m tests.hostile [--tree DIRECTORY] [CASE ...]

`--tree` measures the packages of another checkout, so that the same script shows the state before a change. Exits with
1 if a case does not hold.
"""
