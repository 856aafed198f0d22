"""What every role uses to observe itself: the metrics registry and the event-loop watchdog.

It knows no object of bkpool and decides nothing.
"""
