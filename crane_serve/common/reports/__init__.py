"""Pages for readers: what they hold, how it becomes HTML and Markdown, and how pictures of one look are drawn."""
