"""The playground: a page at / that is a client of the service's own API. Gradio is imported when it is mounted."""
