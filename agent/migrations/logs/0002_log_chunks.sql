-- A chunk is at most 64 KiB of masked bytes of one stage; `lines` is JSON: [[milliseconds, bytes], …].
CREATE TABLE log_chunks (
    build_id BIGINT NOT NULL,
    first_line BIGINT NOT NULL,
    line_count BIGINT NOT NULL,
    stage TEXT NOT NULL,
    lines TEXT NOT NULL,
    bytes BLOB NOT NULL,
    PRIMARY KEY (build_id, first_line)
);
