"""What every role uses to observe itself: a metrics registry, the event-loop watchdog, and the thread that logs.

It knows no object of bkpool and decides nothing.
"""
