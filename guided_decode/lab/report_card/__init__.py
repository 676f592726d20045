"""Report cards of critics: what can be said of one before it guides anything."""
