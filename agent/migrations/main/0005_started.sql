-- Which environment is next is asked by its last build that was begun: pushes that gave way before are many, and none of them.
CREATE INDEX builds_started ON builds (environment, id) WHERE started_at IS NOT NULL;
