"""What every role uses to observe itself: a metrics registry and the event-loop watchdog.

It knows no object of bkpool and decides nothing.
"""
