-- Who is not to be told yet: a handful of rows, asked for at every change.
CREATE INDEX outbox_waits ON github_outbox (next_at) WHERE next_at > 0;
