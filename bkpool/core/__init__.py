"""The pure heart: objects, durations, tokens, errors, placement and policy.

Everything here is a function of its arguments. Nothing here does I/O, reads a clock or knows asyncio.
"""
