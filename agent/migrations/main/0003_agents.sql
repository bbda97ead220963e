-- Several agents on one store: who is alive, and how often a build has lost its agent.

CREATE TABLE agents (
    -- As in builds.holder: the data folder's name and one for each start, "1f3a….9c2b…".
    holder TEXT NOT NULL PRIMARY KEY,
    joined_at BIGINT NOT NULL,
    -- By the database's clock, like the lease that it begins.
    seen_at BIGINT NOT NULL
);

-- Agents that died with this build since its last stage passed.
ALTER TABLE builds ADD COLUMN losses BIGINT NOT NULL DEFAULT 0;
-- What a build took the place of: asked for at each claim.
CREATE INDEX builds_superseded ON builds (superseded_by) WHERE superseded_by IS NOT NULL;
