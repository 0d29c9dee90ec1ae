"""`python -m zenith_jax.bench`, also `zenith bench`: zenith.jit against jax.jit, in one process.

cases.py is what is measured, as data; run.py measures and shows it; memory.py has the peak memory of attention;
timing.py and machine.py are for every measurement of the project.
"""
