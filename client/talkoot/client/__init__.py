"""The volunteer: daemon, fleet host, ClientApp, trainer, hardware, transfer."""
