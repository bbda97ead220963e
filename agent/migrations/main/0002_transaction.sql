-- The release transaction: what serves and served, what a failure showed, what is not deployed again.

-- One row for each time that a release served its environment, by the build that brought it.
CREATE TABLE servings (
    build_id BIGINT NOT NULL PRIMARY KEY,
    environment TEXT NOT NULL,
    release_id BIGINT NOT NULL,
    -- Workload and revision as `kubectl rollout history` counts them: {"deployment/hello-axum": "4"}.
    revisions TEXT NOT NULL,
    began_at BIGINT NOT NULL,
    ended_at BIGINT,
    ended_why TEXT
);
CREATE INDEX servings_by_environment ON servings (environment, began_at);
INSERT INTO servings (build_id, environment, release_id, revisions, began_at, ended_at, ended_why)
SELECT build_id, environment, id, '{}', live_at, ended_at, ended_why FROM releases WHERE state = 'live' AND live_at IS NOT NULL;

-- Commits that failed in an environment: not deployed again unless a person asks.
CREATE TABLE quarantine (
    environment TEXT NOT NULL,
    commit_id TEXT NOT NULL,
    build_id BIGINT NOT NULL,
    at BIGINT NOT NULL,
    PRIMARY KEY (environment, commit_id)
);

-- What was there before anything was undone: texts, masked.
CREATE TABLE evidence (
    build_id BIGINT NOT NULL,
    ordinal BIGINT NOT NULL,
    title TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (build_id, ordinal)
);

-- What a build applied on its way forward: what its rollback undoes.
CREATE TABLE build_objects (
    build_id BIGINT NOT NULL,
    ordinal BIGINT NOT NULL,
    api_version TEXT NOT NULL,
    kind TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    uid TEXT NOT NULL,
    -- created, changed, unchanged
    change TEXT NOT NULL,
    PRIMARY KEY (build_id, ordinal)
);

-- The release that a rollback put back.
ALTER TABLE builds ADD COLUMN restored_release BIGINT;
-- When a later release took the object away.
ALTER TABLE release_objects ADD COLUMN removed_at BIGINT;
