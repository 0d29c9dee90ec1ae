"""`python -m zenith_jax.bench`."""

import argparse

from zenith_jax.bench import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m zenith_jax.bench", description=run.__doc__)
    run.add_arguments(parser)
    raise SystemExit(run.main(parser.parse_args()))
