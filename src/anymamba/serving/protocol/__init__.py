"""OpenAI's protocol: which fields a request has, how they are checked, and how answers look."""
