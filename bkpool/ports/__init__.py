"""What every TCP server of bkpool shares: how strangers are accepted, and the TLS settings that they meet first.

It knows neither HTTP nor a lease, and decides nothing about a client who has said who they are.
"""
