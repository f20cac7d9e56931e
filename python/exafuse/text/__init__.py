"""Between messages and token ids: templates, tools, thinking, replies, streaming."""
