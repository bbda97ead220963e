-- Several agents on one store: who is alive, and how often a build has lost its agent. Indexes for long histories.

CREATE TABLE agents (
    -- As in builds.holder: the data folder's name and one for each start, "1f3a….9c2b…".
    holder TEXT NOT NULL PRIMARY KEY,
    joined_at BIGINT NOT NULL,
    -- It has a token, so that it can speak for all.
    tells_github BOOLEAN NOT NULL,
    -- By the database's clock, like the lease that it begins.
    seen_at BIGINT NOT NULL
);

-- Agents that died with this build one after the other in one stage, and in which.
ALTER TABLE builds ADD COLUMN losses BIGINT NOT NULL DEFAULT 0;
ALTER TABLE builds ADD COLUMN lost_in TEXT;

-- What is asked for at each claim and each delivery must not grow with the builds that have ended. SQLite takes a partial index
-- only where the query repeats its very condition, so that `builds_open` was never used.
DROP INDEX builds_open;
DROP INDEX builds_by_hash;
DROP INDEX deliveries_by_hash;
CREATE INDEX builds_by_status ON builds (status, environment, id);
CREATE INDEX builds_by_commit ON builds (commit_id, environment);
CREATE INDEX builds_by_body ON builds (body_hash, environment, id);
CREATE INDEX builds_superseded ON builds (superseded_by) WHERE superseded_by IS NOT NULL;
