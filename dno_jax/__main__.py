"""`python -m dno_jax` is `dno`."""

from dno_jax.cli.main import main

main()
