"""The server: OpenAI's protocol over HTTP, sessions that survive a restart, and a page."""
