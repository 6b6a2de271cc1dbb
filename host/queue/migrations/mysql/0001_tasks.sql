-- Tasks, who has them, and what became of them. Times are milliseconds since 1970 by this server's clock; '' is no user, and the default queue;
-- 0 is no host, no plugin version, no time. Names are bytes of UTF-8: VARBINARY, because the collations that compare bytes and do not pad are called
-- differently on MySQL and MariaDB.
--
-- A waiting task stands in exactly one of ready, ready_of_user, scheduled, suspect and unserved; no other task stands in any of them.
-- A running task has a lease that ends at its `until`. Every write of an attempt checks both.
--
-- Every statement can be run again: a step that broke off is done once more, from its beginning.

-- The columns that a claim or a settlement changes have a fixed size, so that the row is changed in place; no index has them.
CREATE TABLE IF NOT EXISTS laelaps_task (
    id             BIGINT         NOT NULL AUTO_INCREMENT,
    `key`          VARBINARY(255) NOT NULL,
    type           VARBINARY(255) NOT NULL,
    queue          VARBINARY(64)  NOT NULL DEFAULT '',
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
    priority       TINYINT        NOT NULL DEFAULT 0,
    -- The number, host and end of the last claim; until is only set while it runs. Before the first claim the number is that of the submit
    -- that stored the task, negative.
    lease          BIGINT         NOT NULL DEFAULT 0,
    host           BIGINT         NOT NULL DEFAULT 0,
    until          BIGINT         NOT NULL DEFAULT 0,
    -- How the last attempt ended, and the plugin version that settled it.
    event          ENUM('', 'finish', 'retry', 'release', 'failure', 'trap', 'time-out', 'memory', 'malformed', 'stop', 'unrouted', 'quarantined',
                       'lost', 'overdue', 'unreadable', 'force-finish', 'cancel') NOT NULL DEFAULT '',
    plugin         BIGINT         NOT NULL DEFAULT 0,
    finished_at    BIGINT         NOT NULL DEFAULT 0,
    retained_until BIGINT         NOT NULL DEFAULT 0,
    -- Of a follow-up: the producer's task that it comes from, and how far from it. NULL is none. Written once.
    root           BIGINT,
    depth          INT UNSIGNED,
    -- Where it stands among the ready tasks of its user in its queue: by priority, and of one priority by time. The smaller is first.
    turn           BIGINT         GENERATED ALWAYS AS (LEAST(GREATEST(run_at, 0), 253402300800000)
                       + LEAST(GREATEST(CAST(priority AS SIGNED), -100), 100) * 1000000000000000) VIRTUAL,
    PRIMARY KEY (id),
    UNIQUE KEY by_key (`key`),
    CONSTRAINT laelaps_task_until CHECK ((state = 'running') = (until <> 0)),
    CONSTRAINT laelaps_task_finished_at CHECK ((state IN ('finished', 'failed', 'cancelled')) = (finished_at <> 0)),
    CONSTRAINT laelaps_task_retained_until CHECK ((finished_at = 0) = (retained_until = 0)),
    CONSTRAINT laelaps_task_priority CHECK (priority BETWEEN -100 AND 100)
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

-- What may be claimed now, of each queue in the order of turns: tasks without user, and tasks of users. The second index is for claims that do
-- not look at users.
CREATE TABLE IF NOT EXISTS laelaps_ready (
    queue       VARBINARY(64) NOT NULL DEFAULT '',
    turn        BIGINT        NOT NULL,
    task        BIGINT        NOT NULL,
    max_running INT UNSIGNED,
    PRIMARY KEY (queue, turn, task)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

CREATE TABLE IF NOT EXISTS laelaps_ready_of_user (
    queue       VARBINARY(64)  NOT NULL DEFAULT '',
    user        VARBINARY(255) NOT NULL,
    turn        BIGINT         NOT NULL,
    task        BIGINT         NOT NULL,
    max_running INT UNSIGNED,
    PRIMARY KEY (queue, user, turn, task),
    KEY in_turn (queue, turn, task)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- What is not due yet. Moves to where it is ready, or to suspect, in batches when it is. A held task is here with a run_at that never comes,
-- 253402300800000.
CREATE TABLE IF NOT EXISTS laelaps_scheduled (
    run_at BIGINT NOT NULL,
    task   BIGINT NOT NULL,
    PRIMARY KEY (run_at, task)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- What was lost with its host too often to run in company, and is due. A host that ends its work to run it has it reserved for itself until
-- then; 0 is nobody. The second index is for hosts that serve some queues only.
CREATE TABLE IF NOT EXISTS laelaps_suspect (
    turn   BIGINT        NOT NULL,
    task   BIGINT        NOT NULL,
    queue  VARBINARY(64) NOT NULL DEFAULT '',
    host   BIGINT        NOT NULL DEFAULT 0,
    until  BIGINT        NOT NULL DEFAULT 0,
    PRIMARY KEY (turn, task),
    KEY in_queue (queue, turn, task)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- What is due, and was met by a host that does not serve its type. Hosts that do take it back to where it is ready, or to suspect, some at a time.
CREATE TABLE IF NOT EXISTS laelaps_unserved (
    queue VARBINARY(64)  NOT NULL,
    type  VARBINARY(255) NOT NULL,
    user  VARBINARY(255) NOT NULL,
    turn  BIGINT         NOT NULL,
    task  BIGINT         NOT NULL,
    PRIMARY KEY (queue, type, user, turn, task)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- A user with work that is ready or running in a queue: each queue has accounts of its own. Only who holds the counter's row writes here, so that
-- claims of users' tasks follow each other; everybody else leaves a change, which the next such claim folds in. The head is the first ready
-- task: the user's candidate. A user is open while its candidate may run. The least weight is next: index entries are in ascending order on
-- every server. Users whose candidate has no limit are found by an index of their own, in which all others are NULL: what a claim changes of
-- those writes nothing there. The same holds for the accounts of other queues than the default one: a claim of all queues finds the next of
-- them by three indexes in which the accounts of the default queue are NULL. The tasks without user of all queues share one account, the one
-- whose queue and user are ''.
CREATE TABLE IF NOT EXISTS laelaps_account (
    queue     VARBINARY(64)  NOT NULL DEFAULT '',
    user      VARBINARY(255) NOT NULL,
    running   BIGINT         NOT NULL DEFAULT 0,
    head_turn BIGINT,
    head_task BIGINT,
    head_max  INT UNSIGNED,
    -- The number of the pick at which it was last picked, or entered.
    picked    BIGINT         NOT NULL DEFAULT 0,
    open      TINYINT        GENERATED ALWAYS AS (head_task IS NOT NULL AND (head_max IS NULL OR running < GREATEST(head_max, 1))) STORED,
    weight    DOUBLE         GENERATED ALWAYS AS (- (COALESCE(head_max, 1) / (running + 1e0))) STORED,
    free      TINYINT        GENERATED ALWAYS AS (IF(head_task IS NULL OR head_max IS NOT NULL, NULL, 1)) STORED,
    free_weight DOUBLE       GENERATED ALWAYS AS (IF(head_task IS NULL OR head_max IS NOT NULL, NULL, - (1 / (running + 1e0)))) STORED,
    free_turn   BIGINT       GENERATED ALWAYS AS (IF(head_task IS NULL OR head_max IS NOT NULL, NULL, head_turn)) STORED,
    other_weight DOUBLE      GENERATED ALWAYS AS (IF(LENGTH(queue) > 0 AND head_task IS NOT NULL
                                 AND (head_max IS NULL OR running < GREATEST(head_max, 1)), - (COALESCE(head_max, 1) / (running + 1e0)), NULL)) STORED,
    other_turn   BIGINT      GENERATED ALWAYS AS (IF(LENGTH(queue) > 0 AND head_task IS NOT NULL
                                 AND (head_max IS NULL OR running < GREATEST(head_max, 1)), head_turn, NULL)) STORED,
    other_picked BIGINT      GENERATED ALWAYS AS (IF(LENGTH(queue) > 0 AND head_task IS NOT NULL
                                 AND (head_max IS NULL OR running < GREATEST(head_max, 1)), picked, NULL)) STORED,
    other_free_weight DOUBLE GENERATED ALWAYS AS (IF(LENGTH(queue) > 0 AND head_task IS NOT NULL AND head_max IS NULL,
                                 - (1 / (running + 1e0)), NULL)) STORED,
    other_free_turn   BIGINT GENERATED ALWAYS AS (IF(LENGTH(queue) > 0 AND head_task IS NOT NULL AND head_max IS NULL, head_turn, NULL)) STORED,
    PRIMARY KEY (queue, user),
    KEY by_weight (queue, open, weight, head_turn, head_task),
    KEY without_limit (queue, free, free_weight, free_turn),
    KEY by_age (queue, open, picked),
    KEY other_by_weight (other_weight, other_turn),
    KEY other_without_limit (other_free_weight, other_free_turn),
    KEY other_by_age (other_picked)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Changes to users' accounts that are not folded in yet: so many more run, and the first ready task may be another one.
CREATE TABLE IF NOT EXISTS laelaps_account_change (
    id      BIGINT         NOT NULL AUTO_INCREMENT,
    queue   VARBINARY(64)  NOT NULL DEFAULT '',
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

INSERT IGNORE INTO laelaps_account (queue, user) VALUES ('', '');

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
    -- Its queues and routes, as JSON.
    serves     MEDIUMBLOB,
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

-- Counts that would cost too much to take: ended tasks by state, waiting and running tasks by queue and type, running tasks. Each batch adds its
-- changes, which are folded together from time to time; the sum is what counts.
CREATE TABLE IF NOT EXISTS laelaps_tally (
    id    BIGINT         NOT NULL AUTO_INCREMENT,
    what  ENUM('type', 'ended', 'running') NOT NULL,
    queue VARBINARY(64)  NOT NULL DEFAULT '',
    name  VARBINARY(255) NOT NULL,
    tasks BIGINT         NOT NULL,
    PRIMARY KEY (id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- For producers that speak SQL, in a transaction of their own or without:
--     CALL laelaps_submit('report-7', 'report', '{"month": 7}', NULL)
--     CALL laelaps_submit('report-7', 'report', '{"month": 7}', '{"queue": "nightly", "user": "ann", "priority": -10}')
-- The options are the members of a JSON object, the same as everywhere: see docs/tasks.md. A key that the queue has already is left alone. Hosts
-- find the task when they poll. Who may EXECUTE it needs no privilege on the tables. An error takes back what the call has done, and only
-- that; without a transaction around it the call is one of its own, which a savepoint that does not last tells.
DROP PROCEDURE IF EXISTS laelaps_submit;

DELIMITER //
CREATE PROCEDURE laelaps_submit(
    IN task_key LONGTEXT CHARACTER SET utf8mb4, IN task_type LONGTEXT CHARACTER SET utf8mb4, IN task_data LONGTEXT CHARACTER SET utf8mb4,
    IN task_options LONGTEXT CHARACTER SET utf8mb4
)
    MODIFIES SQL DATA
    SQL SECURITY DEFINER
BEGIN
    DECLARE on_its_own INT DEFAULT 0;
    DECLARE now_ms BIGINT DEFAULT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000;
    DECLARE plain LONGBLOB DEFAULT CAST(COALESCE(task_data, '{}') AS BINARY);
    DECLARE in_queue, owner LONGTEXT CHARACTER SET utf8mb4 DEFAULT '';
    DECLARE urgency, at_once, attempts_max BIGINT;
    DECLARE starts_at BIGINT DEFAULT now_ms;
    DECLARE place BIGINT;
    DECLARE id BIGINT;
    DECLARE part INT DEFAULT 0;
    DECLARE part_bytes INT DEFAULT LEAST(4194304, @@max_allowed_packet DIV 4);
    DECLARE ended_task BIGINT;
    DECLARE ended_state VARCHAR(10) CHARACTER SET utf8mb4;
    DECLARE rest LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
    DECLARE length_before BIGINT;
    DECLARE depth INT;
    DECLARE document LONGTEXT CHARACTER SET utf8mb4 DEFAULT task_data;
    DECLARE wrong VARCHAR(255) CHARACTER SET utf8mb4 DEFAULT 'data: a JSON object as text, at most 16777216 bytes';
    DECLARE members, said LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
    DECLARE kind, name VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
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
    IF LENGTH(plain) > 16777216 THEN
        SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = wrong;
    END IF;
    -- The data, then the options.
    checking: LOOP
        SET depth = 0;
        IF document IS NOT NULL AND VERSION() LIKE '%MariaDB%' THEN
            -- Its JSON functions take what is not JSON, {"a":1.} for example, and nothing deep. So strings become a sign that JSON has not, other scalars
            -- 0, and then the innermost objects and arrays 0, until one 0 is left of all.
            SET rest = REGEXP_REPLACE(document COLLATE utf8mb4_bin,
                '"(?:[^"\\\\\\x{00}-\\x{1f}]++|\\\\(?:["\\\\/bfnrt]|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|u[dD][89abAB][0-9a-fA-F]{2}\\\\u[dD][c-fC-F][0-9a-fA-F]{2}))*+"', CHAR(1));
            SET rest = REGEXP_REPLACE(rest, '-?(?:0|[1-9][0-9]*+)(?:\\.[0-9]++)?(?:[eE][+-]?[0-9]++)?|true|false|null', '0');
            SET rest = REGEXP_REPLACE(rest, '[ \\t\\n\\r]++', '');
            IF LEFT(rest, 1) = '{' AND INSTR(document, CHAR(1)) = 0 THEN
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
                SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = wrong;
            END IF;
        ELSEIF document IS NOT NULL THEN
            -- Its JSON functions take what follows a NUL, and refuse numbers beyond a double: with an exponent of 0 these are looked at once more.
            SET rest = IF(JSON_VALID(document), document, REGEXP_REPLACE(document, '([0-9])[eE][+-]?[0-9]+', '$1e0'));
            IF NOT JSON_VALID(rest) OR INSTR(CAST(document AS BINARY), x'00') > 0 THEN
                SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = wrong;
            ELSEIF JSON_TYPE(rest) <> 'OBJECT' THEN
                SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = wrong;
            END IF;
        END IF;
        IF task_options IS NULL OR wrong LIKE 'options:%' THEN
            LEAVE checking;
        END IF;
        SET document = task_options, wrong = 'options: a JSON object as text, at most 65536 bytes';
        IF LENGTH(document) > 65536 THEN
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = wrong;
        END IF;
    END LOOP;
    IF task_options IS NOT NULL THEN
        IF REPLACE(task_options, '\\\\', '') LIKE '%\\\\u0000%' THEN
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'options: no text holds a \\u0000';
        END IF;
        SET members = JSON_KEYS(task_options), depth = 0;
        WHILE depth < JSON_LENGTH(members) DO
            SET said = JSON_UNQUOTE(JSON_EXTRACT(members, CONCAT('$[', depth, ']'))), depth = depth + 1;
            IF said NOT IN ('queue', 'user', 'run_at', 'priority', 'max_running', 'max_attempts', 'gzip') THEN
                SET wrong = CONCAT('options: no option is called "', LEFT(said, 20),
                    '"; there are queue, user, run_at, priority, max_running, max_attempts and gzip');
                SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = wrong;
            END IF;
        END WHILE;
        -- Servers keep one of two members of a name. Without the values, which are no objects, only the names have quotes.
        SET said = REGEXP_REPLACE(task_options, ':[ \\t\\n\\r]*("([^"\\\\]|\\\\.)*"|[^",}]*)', '');
        IF INSTR(said, '\\') > 0 THEN
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'options: their names are written without escapes';
        ELSEIF CHAR_LENGTH(said) - CHAR_LENGTH(REPLACE(said, '"', '')) > 2 * JSON_LENGTH(members) THEN
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'options: one of them is there twice';
        END IF;
        WHILE depth > 0 DO
            SET depth = depth - 1, name = JSON_UNQUOTE(JSON_EXTRACT(members, CONCAT('$[', depth, ']'))), wrong = NULL;
            SET document = JSON_EXTRACT(task_options, CONCAT('$.', name)), kind = JSON_TYPE(JSON_EXTRACT(task_options, CONCAT('$.', name)));
            SET said = JSON_UNQUOTE(document);
            CASE
                WHEN kind = 'NULL' THEN SET said = NULL;
                WHEN name = 'queue' THEN
                    IF kind <> 'STRING' OR CHAR_LENGTH(said) NOT BETWEEN 1 AND 64 OR said REGEXP '[^A-Za-z0-9_.:/-]' THEN
                        SET wrong = '1 to 64 letters, digits and _ - . : /';
                    END IF;
                    SET in_queue = IF(said = 'default', '', said);
                WHEN name = 'user' THEN
                    IF kind <> 'STRING' OR LENGTH(said) > 255 OR said REGEXP '[\\x{00}-\\x{1f}\\x{7f}-\\x{9f}]' THEN
                        SET wrong = 'at most 255 bytes of text, without control characters';
                    END IF;
                    SET owner = said;
                WHEN name = 'gzip' THEN
                    IF kind <> 'BOOLEAN' OR said <> 'false' THEN
                        SET wrong = 'false; what is submitted in SQL is not compressed';
                    END IF;
                WHEN name = 'run_at' THEN
                    SET starts_at = NULL;
                    BEGIN
                        -- A date that there is not, or a number that is too large.
                        DECLARE CONTINUE HANDLER FOR SQLEXCEPTION BEGIN END;
                        IF kind IN ('INTEGER', 'UNSIGNED INTEGER', 'DOUBLE', 'DECIMAL') THEN
                            SET starts_at = ROUND(GREATEST(CAST(said AS DOUBLE), -1) * 1000);
                        ELSEIF kind = 'STRING' AND said REGEXP
                            '^[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]{1,9})?)?(Z|[+-][0-9]{2}:[0-9]{2}))?$' THEN
                            SET starts_at = TIMESTAMPDIFF(MICROSECOND, '1970-01-01', CAST(CONCAT(LEFT(said, 10), ' ', IF(CHAR_LENGTH(said) = 10,
                                '00:00', REGEXP_REPLACE(SUBSTRING(said, 12), '(Z|[+-][0-9]{2}:[0-9]{2})$', ''))) AS DATETIME(6))) DIV 1000
                                - IF(said REGEXP '[+-][0-9]{2}:[0-9]{2}$', 60000 * (60 * SUBSTRING(said, -5, 2) + RIGHT(said, 2))
                                    * IF(SUBSTRING(said, -6, 1) = '-', -1, 1), 0);
                        END IF;
                    END;
                    IF COALESCE(starts_at > 253402300799999, TRUE) THEN
                        SET wrong = 'seconds since 1970, a time with its offset such as 2026-12-24T18:00:00Z, or a date, up to the year 9999';
                    END IF;
                WHEN kind NOT IN ('INTEGER', 'UNSIGNED INTEGER') OR NOT said REGEXP '^(0|-?[1-9][0-9]{0,9})$' THEN
                    SET wrong = 'a whole number';
                WHEN name = 'priority' AND said NOT BETWEEN -100 AND 100 THEN SET wrong = 'a whole number from -100 to 100';
                WHEN name = 'max_running' AND said NOT BETWEEN 0 AND 4294967295 THEN SET wrong = 'a whole number from 0 to 4294967295';
                WHEN name = 'max_attempts' AND said NOT BETWEEN 1 AND 4294967295 THEN SET wrong = 'a whole number from 1 to 4294967295';
                WHEN name = 'priority' THEN SET urgency = said;
                WHEN name = 'max_running' THEN SET at_once = said;
                ELSE SET attempts_max = said;
            END CASE;
            IF wrong = 'a whole number' THEN
                SET wrong = CONCAT(wrong, CASE name WHEN 'priority' THEN ' from -100 to 100' WHEN 'max_running' THEN ' from 0 to 4294967295'
                    ELSE ' from 1 to 4294967295' END);
            END IF;
            IF wrong IS NOT NULL THEN
                SET wrong = CONCAT(name, ': ', wrong);
                SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = wrong;
            END IF;
        END WHILE;
        IF at_once IS NOT NULL AND owner = '' THEN
            SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'max_running: it limits the tasks of a user, and there is none';
        END IF;
    END IF;
    SET starts_at = GREATEST(now_ms, starts_at);

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

    INSERT IGNORE INTO laelaps_task (`key`, type, queue, user, priority, max_running, max_attempts, created_at, run_at)
        VALUES (task_key, task_type, in_queue, owner, COALESCE(urgency, 0), at_once, attempts_max, now_ms, starts_at);
    IF ROW_COUNT() = 1 THEN
        SET id = LAST_INSERT_ID(), place = starts_at + COALESCE(urgency, 0) * 1000000000000000;
        REPEAT
            INSERT INTO laelaps_task_data (task, part, bytes, data)
                VALUES (id, part, IF(part = 0, LENGTH(plain), 0), SUBSTRING(plain, part * part_bytes + 1, part_bytes));
            SET part = part + 1;
        UNTIL part * part_bytes >= LENGTH(plain) END REPEAT;
        IF starts_at > now_ms THEN
            INSERT INTO laelaps_scheduled (run_at, task) VALUES (starts_at, id);
        ELSEIF owner = '' THEN
            INSERT INTO laelaps_ready (queue, turn, task, max_running) VALUES (in_queue, place, id, at_once);
        ELSE
            INSERT INTO laelaps_ready_of_user (queue, user, turn, task, max_running) VALUES (in_queue, owner, place, id, at_once);
            INSERT INTO laelaps_account_change (queue, user, running) VALUES (in_queue, owner, 0);
        END IF;
        INSERT INTO laelaps_tally (what, queue, name, tasks) VALUES ('type', in_queue, task_type, 1);
    END IF;

    IF on_its_own = 1 THEN
        COMMIT;
    ELSE
        RELEASE SAVEPOINT laelaps_submit;
    END IF;
END//
DELIMITER ;
