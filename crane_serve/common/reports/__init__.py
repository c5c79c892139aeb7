"""Pages for readers: their content, its rendering as HTML and Markdown, and the common style of pictures."""
