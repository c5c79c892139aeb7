"""The HTTP service: its life, settings and logs, the API, and the playground."""
