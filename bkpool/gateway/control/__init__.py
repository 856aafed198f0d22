"""The gateway as the rest of bkpool sees it: its server, its lease registry, and the bridge between event loops.

It runs in the main loop and relays no bytes.
"""
