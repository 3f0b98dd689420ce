"""Messages to token ids, and token ids to thinking and answer."""
