"""What is put before a program that tries a foreign pattern in a process of its own."""

# Whoever began the process may be killed, and can then no longer end it; a search may go on for ever.
ENDS_BY_ITSELF = """
import signal
if hasattr(signal, "alarm"):
    signal.alarm(60)
"""
