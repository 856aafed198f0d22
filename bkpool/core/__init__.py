"""The pure part: objects, durations, tokens, errors, who gets a worker, and what the controller does next.

Everything here is a function of its arguments. Nothing here does I/O, reads a clock or uses asyncio.
"""
