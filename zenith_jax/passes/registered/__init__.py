"""Patterns that users register: a plain JAX function is the pattern, and whatever they give takes its place."""

from zenith_jax.passes.registered.registration import Registration, activate, active

__all__ = ["Registration", "activate", "active"]
