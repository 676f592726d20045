"""Commands for who works on this repository; nothing here is installed."""
