"""The gateway as the rest of bkpool sees it: its server, its registrations, and the bridge between event loops.

It runs in the main loop. It relays no bytes itself.
"""
