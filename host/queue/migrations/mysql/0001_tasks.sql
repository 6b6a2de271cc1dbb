-- Tasks, who has them, and what became of them. Times are milliseconds since 1970 by this server's clock; '' is no user; 0 is no host, no
-- plugin version, no time. Names are bytes of UTF-8: VARBINARY, because the collations that compare bytes and do not pad are called
-- differently on MySQL and MariaDB.
--
-- A waiting task stands in exactly one of ready, ready_of_user, scheduled and suspect; no other task stands in any of them.
-- A running task has a lease that ends at its `until`. Every write of an attempt checks both.
--
-- Every statement can be run again: a step that broke off is done once more, from its beginning.

-- The columns that a claim or a settlement changes have a fixed size, so that the row is changed in place; no index has them.
CREATE TABLE IF NOT EXISTS laelaps_task (
    id             BIGINT         NOT NULL AUTO_INCREMENT,
    `key`          VARBINARY(255) NOT NULL,
    type           VARBINARY(255) NOT NULL,
    state          ENUM('waiting', 'running', 'finished', 'failed', 'cancelled') NOT NULL DEFAULT 'waiting',
    user           VARBINARY(255) NOT NULL DEFAULT '',
    max_running    INT UNSIGNED,
    attempts       INT UNSIGNED   NOT NULL DEFAULT 0,
    max_attempts   INT UNSIGNED,
    releases       INT UNSIGNED   NOT NULL DEFAULT 0,
    lost           INT UNSIGNED   NOT NULL DEFAULT 0,
    lost_alone     INT UNSIGNED   NOT NULL DEFAULT 0,
    -- When it was lost for the first time since `lost` was 0 last.
    lost_at        BIGINT         NOT NULL DEFAULT 0,
    alone          TINYINT        NOT NULL DEFAULT 0,
    created_at     BIGINT         NOT NULL,
    run_at         BIGINT         NOT NULL,
    -- The number, host and end of the last claim; until is only set while it runs. Before the first claim the number is that of the submit
    -- that stored the task, negative.
    lease          BIGINT         NOT NULL DEFAULT 0,
    host           BIGINT         NOT NULL DEFAULT 0,
    until          BIGINT         NOT NULL DEFAULT 0,
    -- How the last attempt ended, and the plugin version that settled it.
    event          ENUM('', 'finish', 'retry', 'release', 'failure', 'trap', 'time-out', 'memory', 'malformed', 'stop', 'unrouted', 'lost',
                       'overdue', 'unreadable', 'force-finish', 'cancel') NOT NULL DEFAULT '',
    plugin         BIGINT         NOT NULL DEFAULT 0,
    finished_at    BIGINT         NOT NULL DEFAULT 0,
    retained_until BIGINT         NOT NULL DEFAULT 0,
    -- Of a follow-up: the producer's task that it comes from, and how far from it. NULL is none. Written once.
    root           BIGINT,
    depth          INT UNSIGNED,
    PRIMARY KEY (id),
    UNIQUE KEY by_key (`key`),
    CONSTRAINT laelaps_task_until CHECK ((state = 'running') = (until <> 0)),
    CONSTRAINT laelaps_task_finished_at CHECK ((state IN ('finished', 'failed', 'cancelled')) = (finished_at <> 0)),
    CONSTRAINT laelaps_task_retained_until CHECK ((finished_at = 0) = (retained_until = 0))
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Data apart from the task, so that a claim and a settlement rewrite a narrow row. As submitted, or gzip; in parts, so that no statement
-- has to be larger than a server takes. `bytes` is the size of all parts before compression, on the first one; each change of the data
-- raises the first part's revision.
CREATE TABLE IF NOT EXISTS laelaps_task_data (
    task     BIGINT            NOT NULL,
    part     SMALLINT UNSIGNED NOT NULL,
    revision INT UNSIGNED      NOT NULL DEFAULT 0,
    bytes    INT UNSIGNED      NOT NULL DEFAULT 0,
    data     MEDIUMBLOB        NOT NULL,
    PRIMARY KEY (task, part)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- What may be claimed now, oldest first: tasks without user, and tasks of users. The second index is for who does not look at users.
CREATE TABLE IF NOT EXISTS laelaps_ready (
    run_at      BIGINT NOT NULL,
    task        BIGINT NOT NULL,
    max_running INT UNSIGNED,
    PRIMARY KEY (run_at, task)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

CREATE TABLE IF NOT EXISTS laelaps_ready_of_user (
    user        VARBINARY(255) NOT NULL,
    run_at      BIGINT         NOT NULL,
    task        BIGINT         NOT NULL,
    max_running INT UNSIGNED,
    PRIMARY KEY (user, run_at, task),
    KEY in_time (run_at, task)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- What is not due yet. Moves to where it is ready, or to suspect, in batches when it is. A held task is here with a run_at that never comes,
-- 253402300800000.
CREATE TABLE IF NOT EXISTS laelaps_scheduled (
    run_at BIGINT NOT NULL,
    task   BIGINT NOT NULL,
    PRIMARY KEY (run_at, task)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- What was lost with its host too often to run in company, and is due. A host that ends its work to run it has it reserved for itself until
-- then; 0 is nobody.
CREATE TABLE IF NOT EXISTS laelaps_suspect (
    run_at BIGINT NOT NULL,
    task   BIGINT NOT NULL,
    host   BIGINT NOT NULL DEFAULT 0,
    until  BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (run_at, task)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- A user with work that is ready or running. Only who holds the counter's row writes here, so that claims of users' tasks follow each other;
-- everybody else leaves a change, which the next such claim folds in. The head is the oldest ready task: the user's candidate. A user is open
-- while its candidate may run. The least weight is next: index entries are in ascending order on every server. Users whose candidate has no
-- limit are found by an index of their own, in which all others are NULL: what a claim changes of those writes nothing there.
CREATE TABLE IF NOT EXISTS laelaps_account (
    user      VARBINARY(255) NOT NULL,
    running   BIGINT         NOT NULL DEFAULT 0,
    head_at   BIGINT,
    head_task BIGINT,
    head_max  INT UNSIGNED,
    -- The number of the pick at which it was last picked, or entered.
    picked    BIGINT         NOT NULL DEFAULT 0,
    open      TINYINT        GENERATED ALWAYS AS (head_task IS NOT NULL AND (head_max IS NULL OR running < GREATEST(head_max, 1))) STORED,
    weight    DOUBLE         GENERATED ALWAYS AS (- (COALESCE(head_max, 1) / (running + 1e0))) STORED,
    free_weight DOUBLE        GENERATED ALWAYS AS (IF(head_task IS NULL OR head_max IS NOT NULL, NULL, - (1 / (running + 1e0)))) STORED,
    free_at     BIGINT        GENERATED ALWAYS AS (IF(head_task IS NULL OR head_max IS NOT NULL, NULL, head_at)) STORED,
    PRIMARY KEY (user),
    KEY by_weight (open, weight, head_at, head_task),
    KEY without_limit (free_weight, free_at),
    KEY by_age (open, picked)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Changes to users' accounts that are not folded in yet: so many more run, and the oldest ready task may be another one.
CREATE TABLE IF NOT EXISTS laelaps_account_change (
    id      BIGINT         NOT NULL AUTO_INCREMENT,
    user    VARBINARY(255) NOT NULL,
    running BIGINT         NOT NULL,
    PRIMARY KEY (id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- The number of picks between users so far. It never goes back.
CREATE TABLE IF NOT EXISTS laelaps_counter (
    id   TINYINT NOT NULL,
    pick BIGINT  NOT NULL,
    PRIMARY KEY (id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

INSERT IGNORE INTO laelaps_counter (id, pick) VALUES (1, 0);

INSERT IGNORE INTO laelaps_account (user) VALUES ('');

-- A claim of several tasks. Its number times 1,048,576, plus a random number of the claim, plus a task's place in it, is the task's lease.
-- Numbers of rows grow and are not used twice (never TRUNCATE this table); the random number keeps a lease from coming again where a replica
-- was promoted that had not got the last claims. Looked at once its time has come, and again later for those of its tasks that still run; a
-- host takes away what it has settled.
CREATE TABLE IF NOT EXISTS laelaps_claim (
    id      BIGINT     NOT NULL AUTO_INCREMENT,
    host    BIGINT     NOT NULL,
    look_at BIGINT     NOT NULL,
    tasks   MEDIUMTEXT NOT NULL,
    PRIMARY KEY (id),
    KEY by_time (look_at),
    KEY by_host (host)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Hosts, also those that are gone, so that a lost attempt can be traced to the plugin versions that its host served. A host that has left is
-- struck off, which is its end, once it has no task any more. The identity is what a watchdog knows it by.
CREATE TABLE IF NOT EXISTS laelaps_host (
    id         BIGINT         NOT NULL AUTO_INCREMENT,
    name       VARCHAR(255)   NOT NULL,
    process_id INT UNSIGNED   NOT NULL,
    started_at BIGINT         NOT NULL,
    seen_at    BIGINT         NOT NULL,
    identity   VARBINARY(255),
    left_at    BIGINT         NOT NULL DEFAULT 0,
    ended_at   BIGINT         NOT NULL DEFAULT 0,
    -- When it was found dead and that was entered against what it ran.
    died_at    BIGINT         NOT NULL DEFAULT 0,
    PRIMARY KEY (id),
    KEY by_end (ended_at)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- How often a host has said that it is alive, if its fleet goes by that. A host whose number stands still for timeout_ms is dead to those who
-- watched it. A row of its own, since a claim holds its host's; gone when the host leaves.
CREATE TABLE IF NOT EXISTS laelaps_host_sign (
    host       BIGINT NOT NULL,
    given      BIGINT NOT NULL,
    timeout_ms BIGINT NOT NULL,
    PRIMARY KEY (host)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

CREATE TABLE IF NOT EXISTS laelaps_plugin_version (
    id     BIGINT         NOT NULL AUTO_INCREMENT,
    digest VARBINARY(255) NOT NULL,
    -- The plugin's name, where a host has run it.
    name   VARBINARY(255) NOT NULL DEFAULT '',
    PRIMARY KEY (id),
    UNIQUE KEY by_digest (digest)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

CREATE TABLE IF NOT EXISTS laelaps_host_plugin (
    host     BIGINT NOT NULL,
    plugin   BIGINT NOT NULL,
    noted_at BIGINT NOT NULL,
    PRIMARY KEY (host, plugin)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- The plugin versions that run tasks on a host, or are being admitted. A host that leaves in good order has none.
CREATE TABLE IF NOT EXISTS laelaps_host_running (
    host   BIGINT NOT NULL,
    plugin BIGINT NOT NULL,
    PRIMARY KEY (host, plugin)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Hosts that died while one plugin version alone ran on them, until an operator releases that version.
CREATE TABLE IF NOT EXISTS laelaps_plugin_death (
    plugin BIGINT NOT NULL,
    host   BIGINT NOT NULL,
    at     BIGINT NOT NULL,
    PRIMARY KEY (plugin, host),
    KEY by_host (host)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Beside the task: what is written at its end or rarely.
CREATE TABLE IF NOT EXISTS laelaps_output (
    task   BIGINT            NOT NULL,
    part   SMALLINT UNSIGNED NOT NULL,
    output MEDIUMBLOB        NOT NULL,
    PRIMARY KEY (task, part)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

CREATE TABLE IF NOT EXISTS laelaps_failure (
    task    BIGINT NOT NULL,
    code    VARCHAR(255),
    message TEXT,
    PRIMARY KEY (task)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

CREATE TABLE IF NOT EXISTS laelaps_progress (
    task  BIGINT        NOT NULL,
    lease BIGINT        NOT NULL,
    done  BIGINT        NOT NULL,
    total BIGINT,
    note  VARCHAR(1024) NOT NULL,
    PRIMARY KEY (task)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- A follow-up that has not ended, so that those of one root can be counted.
CREATE TABLE IF NOT EXISTS laelaps_descendant (
    task BIGINT NOT NULL,
    root BIGINT NOT NULL,
    PRIMARY KEY (task),
    KEY by_root (root)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Attempts that did not finish their task, at most twenty of each. `alone`: it ran alone.
CREATE TABLE IF NOT EXISTS laelaps_attempt (
    task     BIGINT       NOT NULL,
    lease    BIGINT       NOT NULL,
    attempt  INT UNSIGNED NOT NULL,
    host     BIGINT       NOT NULL,
    plugin   BIGINT       NOT NULL,
    ended_at BIGINT       NOT NULL,
    event    VARCHAR(32)  NOT NULL,
    alone    TINYINT      NOT NULL DEFAULT 0,
    code     VARCHAR(255),
    message  TEXT,
    PRIMARY KEY (task, lease)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Tasks that ended otherwise than finished, so that they can be listed among many finished ones.
CREATE TABLE IF NOT EXISTS laelaps_set_aside (
    task  BIGINT NOT NULL,
    state ENUM('failed', 'cancelled') NOT NULL,
    PRIMARY KEY (task)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- What came to its end together, to be removed together when its retention ends. A task that was given a new life since is left alone.
CREATE TABLE IF NOT EXISTS laelaps_retention (
    id    BIGINT     NOT NULL AUTO_INCREMENT,
    until BIGINT     NOT NULL,
    tasks MEDIUMTEXT NOT NULL,
    PRIMARY KEY (id),
    KEY by_time (until)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Counts that would cost too much to take: ended tasks by state, waiting and running tasks by type, running tasks. Each batch adds its
-- changes, which are folded together from time to time; the sum is what counts.
CREATE TABLE IF NOT EXISTS laelaps_tally (
    id    BIGINT         NOT NULL AUTO_INCREMENT,
    what  ENUM('type', 'ended', 'running') NOT NULL,
    name  VARBINARY(255) NOT NULL,
    tasks BIGINT         NOT NULL,
    PRIMARY KEY (id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- For producers that speak SQL, in a transaction of their own or without:
--     CALL laelaps_submit('report-7', 'report', '{"month": 7}', NULL, NULL, NULL, NULL)
-- A key that the queue has already is left alone. `run_at` in milliseconds since 1970; NULL, or a moment that has passed, is at once. Hosts
-- find the task when they poll. Who may EXECUTE it needs no privilege on the tables. An error takes back what the call has done, and only
-- that; without a transaction around it the call is one of its own, which a savepoint that does not last tells.
DROP PROCEDURE IF EXISTS laelaps_submit;

DELIMITER //
CREATE PROCEDURE laelaps_submit(
    IN task_key LONGTEXT CHARACTER SET utf8mb4, IN task_type LONGTEXT CHARACTER SET utf8mb4, IN task_data LONGTEXT CHARACTER SET utf8mb4,
    IN task_user LONGTEXT CHARACTER SET utf8mb4, IN task_max_running BIGINT, IN task_max_attempts BIGINT, IN task_run_at BIGINT
)
    MODIFIES SQL DATA
    SQL SECURITY DEFINER
BEGIN
    DECLARE on_its_own INT DEFAULT 0;
    DECLARE now_ms BIGINT DEFAULT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000;
    DECLARE plain LONGBLOB DEFAULT CAST(COALESCE(task_data, '{}') AS BINARY);
    DECLARE owner VARBINARY(255) DEFAULT '';
    DECLARE starts_at BIGINT;
    DECLARE id BIGINT;
    DECLARE part INT DEFAULT 0;
    DECLARE part_bytes INT DEFAULT LEAST(4194304, @@max_allowed_packet DIV 4);
    DECLARE ended_task BIGINT;
    DECLARE ended_state VARCHAR(10) CHARACTER SET utf8mb4;
    DECLARE rest LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
    DECLARE length_before BIGINT;
    DECLARE depth INT DEFAULT 0;
    DECLARE EXIT HANDLER FOR SQLEXCEPTION
    BEGIN
        IF on_its_own = 1 THEN
            ROLLBACK;
        ELSEIF id IS NOT NULL THEN
            BEGIN
                -- After a deadlock there is no transaction any more to go back in.
                DECLARE CONTINUE HANDLER FOR 1305 BEGIN END;
                ROLLBACK TO SAVEPOINT laelaps_submit;
            END;
        END IF;
        RESIGNAL;
    END;

    IF task_key IS NULL OR LENGTH(task_key) NOT BETWEEN 1 AND 255 OR task_key REGEXP '[\\x{00}-\\x{1f}\\x{7f}-\\x{9f}]' THEN
        SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'key: 1 to 255 bytes of text, without control characters';
    END IF;
    IF task_type IS NULL OR LENGTH(task_type) NOT BETWEEN 1 AND 255 OR task_type REGEXP '[\\x{00}-\\x{1f}\\x{7f}-\\x{9f}]' THEN
        SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'type: 1 to 255 bytes of text, without control characters';
    END IF;
    IF LENGTH(task_user) > 255 OR task_user REGEXP '[\\x{00}-\\x{1f}\\x{7f}-\\x{9f}]' THEN
        SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'user: at most 255 bytes of text, without control characters';
    END IF;
    IF LENGTH(plain) > 16777216 THEN
        SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'data: a JSON object as text, at most 16777216 bytes';
    END IF;
    IF task_data IS NOT NULL AND VERSION() LIKE '%MariaDB%' THEN
        -- Its JSON functions take what is not JSON, {"a":1.} for example, and nothing deep. So strings become a sign that JSON has not, other scalars
        -- 0, and then the innermost objects and arrays 0, until one 0 is left of all.
        SET rest = REGEXP_REPLACE(task_data COLLATE utf8mb4_bin,
            '"(?:[^"\\\\\\x{00}-\\x{1f}]++|\\\\(?:["\\\\/bfnrt]|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|u[dD][89abAB][0-9a-fA-F]{2}\\\\u[dD][c-fC-F][0-9a-fA-F]{2}))*+"', CHAR(1));
        SET rest = REGEXP_REPLACE(rest, '-?(?:0|[1-9][0-9]*+)(?:\\.[0-9]++)?(?:[eE][+-]?[0-9]++)?|true|false|null', '0');
        SET rest = REGEXP_REPLACE(rest, '[ \\t\\n\\r]++', '');
        IF LEFT(rest, 1) = '{' AND INSTR(task_data, CHAR(1)) = 0 THEN
            REPEAT
                SET length_before = CHAR_LENGTH(rest);
                SET rest = REGEXP_REPLACE(rest,
                    '\\{(?:\\x{01}:[0\\x{01}](?:,\\x{01}:[0\\x{01}])*+)?\\}|\\[(?:[0\\x{01}](?:,[0\\x{01}])*+)?\\]', '0');
                SET depth = depth + 1;
            UNTIL CHAR_LENGTH(rest) = length_before OR depth = 1000 END REPEAT;
        ELSE
            SET rest = '';
        END IF;
        IF rest <> '0' THEN
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'data: a JSON object as text, at most 16777216 bytes';
        END IF;
    ELSEIF task_data IS NOT NULL THEN
        -- Its JSON functions take what follows a NUL, and refuse numbers beyond a double: with an exponent of 0 these are looked at once more.
        SET rest = IF(JSON_VALID(task_data), task_data, REGEXP_REPLACE(task_data, '([0-9])[eE][+-]?[0-9]+', '$1e0'));
        IF NOT JSON_VALID(rest) OR INSTR(CAST(task_data AS BINARY), x'00') > 0 THEN
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'data: a JSON object as text, at most 16777216 bytes';
        ELSEIF JSON_TYPE(rest) <> 'OBJECT' THEN
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'data: a JSON object as text, at most 16777216 bytes';
        END IF;
    END IF;
    IF task_max_running NOT BETWEEN 0 AND 4294967295 THEN
        SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'max_running: a whole number from 0 to 4294967295';
    END IF;
    IF task_max_attempts NOT BETWEEN 1 AND 4294967295 THEN
        SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'max_attempts: a whole number from 1 to 4294967295';
    END IF;
    IF task_run_at > 253402300799999 THEN
        SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'run_at: milliseconds since 1970, up to the year 9999';
    END IF;
    SET owner = CAST(COALESCE(task_user, '') AS BINARY);
    SET starts_at = GREATEST(now_ms, COALESCE(task_run_at, 0));

    SAVEPOINT laelaps_submit;
    BEGIN
        DECLARE CONTINUE HANDLER FOR 1305 SET on_its_own = 1;
        ROLLBACK TO SAVEPOINT laelaps_submit;
    END;
    IF on_its_own = 1 THEN
        START TRANSACTION;
    END IF;

    -- A key is free once its retention has ended, whether or not its task was removed by then.
    -- A plain SELECT, which locks nothing: others store keys before and behind this one.
    SELECT MAX(t.id) INTO ended_task FROM laelaps_task AS t
        WHERE t.`key` = CAST(task_key AS BINARY) AND t.retained_until BETWEEN 1 AND now_ms;
    IF ended_task IS NOT NULL THEN
        SELECT MAX(CAST(t.state AS CHAR)) INTO ended_state FROM laelaps_task AS t
            WHERE t.id = ended_task AND t.retained_until BETWEEN 1 AND now_ms FOR UPDATE;
        IF ended_state IS NOT NULL THEN
            DELETE FROM laelaps_task WHERE laelaps_task.id = ended_task;
            DELETE FROM laelaps_task_data WHERE task = ended_task;
            DELETE FROM laelaps_output WHERE task = ended_task;
            DELETE FROM laelaps_failure WHERE task = ended_task;
            DELETE FROM laelaps_progress WHERE task = ended_task;
            DELETE FROM laelaps_attempt WHERE task = ended_task;
            DELETE FROM laelaps_set_aside WHERE task = ended_task;
            DELETE FROM laelaps_descendant WHERE task = ended_task;
            INSERT INTO laelaps_tally (what, name, tasks) VALUES ('ended', ended_state, -1);
        END IF;
    END IF;

    INSERT IGNORE INTO laelaps_task (`key`, type, user, max_running, max_attempts, created_at, run_at)
        VALUES (task_key, task_type, owner, task_max_running, task_max_attempts, now_ms, starts_at);
    IF ROW_COUNT() = 1 THEN
        SET id = LAST_INSERT_ID();
        REPEAT
            INSERT INTO laelaps_task_data (task, part, bytes, data)
                VALUES (id, part, IF(part = 0, LENGTH(plain), 0), SUBSTRING(plain, part * part_bytes + 1, part_bytes));
            SET part = part + 1;
        UNTIL part * part_bytes >= LENGTH(plain) END REPEAT;
        IF starts_at > now_ms THEN
            INSERT INTO laelaps_scheduled (run_at, task) VALUES (starts_at, id);
        ELSEIF owner = '' THEN
            INSERT INTO laelaps_ready (run_at, task, max_running) VALUES (starts_at, id, task_max_running);
        ELSE
            INSERT INTO laelaps_ready_of_user (user, run_at, task, max_running) VALUES (owner, starts_at, id, task_max_running);
            INSERT INTO laelaps_account_change (user, running) VALUES (owner, 0);
        END IF;
        INSERT INTO laelaps_tally (what, name, tasks) VALUES ('type', task_type, 1);
    END IF;

    IF on_its_own = 1 THEN
        COMMIT;
    ELSE
        RELEASE SAVEPOINT laelaps_submit;
    END IF;
END//
DELIMITER ;
