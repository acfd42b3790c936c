"""Carrying out a plan: phases and ramps while training goes on, and finalize."""
