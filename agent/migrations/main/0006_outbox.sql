-- Who is not to be told yet: a handful of rows, asked for at every change.
CREATE INDEX outbox_waits ON github_outbox (next_at) WHERE next_at > 0;
-- A final state was on its way, and GitHub may show it though nobody heard so.
ALTER TABLE github_outbox ADD COLUMN is_final BOOLEAN NOT NULL DEFAULT FALSE;
