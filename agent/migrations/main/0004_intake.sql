-- A delivery writes fewer pages.

-- 0: as it came. 1: an LZ4 block behind its length when unpacked (four bytes, little-endian).
ALTER TABLE deliveries ADD COLUMN body_format BIGINT NOT NULL DEFAULT 0;

-- The same body names the same commit: what is asked by the body is found by `builds_by_commit`.
DROP INDEX builds_by_body;
