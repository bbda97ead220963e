-- One text for SQLite and PostgreSQL: BIGINT, TEXT, BOOLEAN and bytes ("blob" is a domain on PostgreSQL).
-- Times are milliseconds since 1970 (UTC). Numbers people see come from `counters`, so that they have no gaps.

CREATE TABLE counters (
    name TEXT NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
);
INSERT INTO counters (name, value) VALUES ('build', 0), ('delivery', 0), ('release', 0);

CREATE TABLE environments (
    name TEXT NOT NULL PRIMARY KEY,
    -- Grows with each new holder of the environment.
    fence BIGINT NOT NULL DEFAULT 0,
    -- What is live there, by our own word.
    deployed_commit TEXT,
    deployed_release BIGINT,
    -- A crash or blindness left it in an unknown state: settled before anything else.
    unsettled BOOLEAN NOT NULL DEFAULT FALSE,
    pinned_reason TEXT,
    pinned_by TEXT,
    pinned_at BIGINT
);

CREATE TABLE deliveries (
    id BIGINT NOT NULL PRIMARY KEY,
    guid TEXT NOT NULL,
    event TEXT NOT NULL,
    body_hash TEXT NOT NULL,
    body BLOB NOT NULL,
    received_at BIGINT NOT NULL
);
CREATE INDEX deliveries_by_hash ON deliveries (body_hash);

CREATE TABLE builds (
    id BIGINT NOT NULL PRIMARY KEY,
    environment TEXT NOT NULL,
    repository TEXT NOT NULL,
    repository_id BIGINT,
    branch TEXT NOT NULL,
    before_commit TEXT NOT NULL,
    commit_id TEXT NOT NULL,
    title TEXT NOT NULL,
    pushed_by TEXT NOT NULL,
    pushed_at BIGINT,
    kind TEXT NOT NULL,
    delivery_id BIGINT,
    body_hash TEXT NOT NULL,
    status TEXT NOT NULL,
    outcome TEXT NOT NULL,
    cause TEXT,
    stage TEXT,
    attempt BIGINT NOT NULL DEFAULT 0,
    fence BIGINT NOT NULL DEFAULT 0,
    holder TEXT,
    image TEXT,
    release_id BIGINT,
    queued_at BIGINT NOT NULL,
    started_at BIGINT,
    finished_at BIGINT,
    cancel_requested BOOLEAN NOT NULL DEFAULT FALSE,
    -- From here on a newer push waits: the first mutation of the cluster may have happened.
    deploying BOOLEAN NOT NULL DEFAULT FALSE,
    superseded_by BIGINT
);
CREATE INDEX builds_by_environment ON builds (environment, id);
CREATE INDEX builds_by_hash ON builds (body_hash);
CREATE INDEX builds_open ON builds (status, id) WHERE status IN ('queued', 'running');

CREATE TABLE stages (
    build_id BIGINT NOT NULL,
    stage TEXT NOT NULL,
    ordinal BIGINT NOT NULL,
    attempt BIGINT NOT NULL,
    status TEXT NOT NULL,
    begun_at BIGINT NOT NULL,
    done_at BIGINT,
    baton TEXT,
    PRIMARY KEY (build_id, stage)
);

CREATE TABLE releases (
    id BIGINT NOT NULL PRIMARY KEY,
    environment TEXT NOT NULL,
    build_id BIGINT NOT NULL,
    commit_id TEXT NOT NULL,
    image TEXT NOT NULL,
    set_hash TEXT NOT NULL,
    -- The whole release as JSON: what is applied, judged, smoke-tested and put back.
    body TEXT NOT NULL,
    -- planned, applied, live, failed
    state TEXT NOT NULL,
    planned_at BIGINT NOT NULL,
    live_at BIGINT,
    ended_at BIGINT,
    ended_why TEXT
);
CREATE INDEX releases_by_environment ON releases (environment, id);

CREATE TABLE release_objects (
    release_id BIGINT NOT NULL,
    ordinal BIGINT NOT NULL,
    api_version TEXT NOT NULL,
    kind TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    uid TEXT NOT NULL,
    -- created, changed, unchanged
    change TEXT NOT NULL,
    PRIMARY KEY (release_id, ordinal)
);

-- What GitHub was told last, by commit and context; the difference to `builds` is what is left to say.
CREATE TABLE github_outbox (
    build_id BIGINT NOT NULL PRIMARY KEY,
    told TEXT,
    told_at BIGINT,
    tries BIGINT NOT NULL DEFAULT 0,
    next_at BIGINT NOT NULL DEFAULT 0,
    problem TEXT
);

CREATE TABLE audit (
    at BIGINT NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    environment TEXT,
    build_id BIGINT,
    detail TEXT NOT NULL
);
