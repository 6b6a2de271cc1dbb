-- Tasks, who has them, and what became of them. Times are milliseconds since 1970 by this database's clock; '' is no user, and as a queue
-- the default one.
--
-- A waiting task stands in exactly one of ready, scheduled, suspect and unserved; no other task stands in any of them.
-- A running task has a lease that ends at its `until`. Every write of an attempt checks both.

CREATE TABLE task (
    id             INTEGER PRIMARY KEY AUTOINCREMENT,
    key            TEXT    NOT NULL,
    type           TEXT    NOT NULL,
    state          TEXT    NOT NULL DEFAULT 'waiting',
    queue          TEXT    NOT NULL DEFAULT '',
    user           TEXT    NOT NULL DEFAULT '',
    max_running    INTEGER,
    attempts       INTEGER NOT NULL DEFAULT 0,
    max_attempts   INTEGER,
    releases       INTEGER NOT NULL DEFAULT 0,
    lost           INTEGER NOT NULL DEFAULT 0,
    lost_alone     INTEGER NOT NULL DEFAULT 0,
    -- When it was lost first, if it was lost since an attempt ended otherwise.
    lost_at        INTEGER,
    alone          INTEGER NOT NULL DEFAULT 0,
    created_at     INTEGER NOT NULL,
    run_at         INTEGER NOT NULL,
    priority       INTEGER NOT NULL DEFAULT 0,
    -- The number, host and end of the last claim; until is only set while it runs.
    lease          INTEGER NOT NULL DEFAULT 0,
    host           INTEGER,
    until          INTEGER,
    -- How the last attempt ended, and the plugin version that settled it.
    event          TEXT,
    plugin         INTEGER,
    finished_at    INTEGER,
    retained_until INTEGER,
    -- Of a follow-up: the producer's task that it comes from, and how far from it. NULL is none. Written once.
    root           INTEGER,
    depth          INTEGER,
    -- Where it stands among the ready tasks of its queue and user: by priority, and of one priority by time. The smaller is first.
    turn           INTEGER NOT NULL GENERATED ALWAYS AS
        (max(0, min(run_at, 253402300800000)) + max(-100, min(priority, 100)) * 1000000000000000) VIRTUAL,
    -- Behind the greatest number there is SQLite gives out none.
    CHECK (id < 4611686018427387904),
    CHECK (priority BETWEEN -100 AND 100),
    CHECK (state IN ('waiting', 'running', 'finished', 'failed', 'cancelled')),
    CHECK ((state = 'running') = (until IS NOT NULL)),
    CHECK ((state IN ('finished', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
    CHECK ((finished_at IS NULL) = (retained_until IS NULL))
) STRICT;

CREATE UNIQUE INDEX task_key ON task (key);
CREATE INDEX task_running ON task (host, until) WHERE state = 'running';
CREATE INDEX task_failed ON task (id) WHERE state = 'failed';
CREATE INDEX task_cancelled ON task (id) WHERE state = 'cancelled';

-- Data apart from the task, so that a claim and a settlement rewrite a narrow row. TEXT as submitted, or a BLOB of gzip; `bytes` is its
-- size before compression. Each change of the data raises its revision. NULL: the data stands in pieces.
CREATE TABLE task_data (
    task     INTEGER PRIMARY KEY,
    revision INTEGER NOT NULL DEFAULT 0,
    bytes    INTEGER NOT NULL,
    data     ANY,
    pieces   INTEGER,
    CHECK ((data IS NULL) = (pieces IS NOT NULL))
) STRICT;

-- Data of more than a mebibyte that a running task wrote, if its row names the set: each piece was written in a transaction of its own, so that
-- others could write in between. Of a set that no row names, the writing is under way or was given up.
CREATE TABLE task_data_piece (
    task   INTEGER NOT NULL,
    pieces INTEGER NOT NULL,
    number INTEGER NOT NULL,
    data   BLOB    NOT NULL,
    PRIMARY KEY (pieces, number)
) STRICT;

CREATE INDEX task_data_piece_task ON task_data_piece (task, pieces, number);

-- What may be claimed now, in the order of claims: by queue and user, and for who does not look at users.
CREATE TABLE ready (
    queue       TEXT    NOT NULL,
    user        TEXT    NOT NULL,
    turn        INTEGER NOT NULL,
    task        INTEGER NOT NULL,
    max_running INTEGER,
    PRIMARY KEY (queue, user, turn, task)
) STRICT, WITHOUT ROWID;

CREATE INDEX ready_in_turn ON ready (queue, turn, task) WHERE user <> '';

-- What is not due yet. Moves to ready or suspect in batches when it is. A held task is here with a run_at that never comes, 253402300800000.
CREATE TABLE scheduled (
    run_at INTEGER NOT NULL,
    task   INTEGER NOT NULL,
    PRIMARY KEY (run_at, task)
) STRICT, WITHOUT ROWID;

-- What was lost with its host too often to run in company, and is due. One host at a time ends what it has, to run it: host, until when.
CREATE TABLE suspect (
    turn   INTEGER NOT NULL,
    task   INTEGER NOT NULL,
    host   INTEGER,
    until  INTEGER,
    PRIMARY KEY (turn, task)
) STRICT, WITHOUT ROWID;

-- What is due, and was met by a host that does not serve its type. Hosts that do take it back to ready or suspect, some at a time.
CREATE TABLE unserved (
    queue TEXT    NOT NULL,
    type  TEXT    NOT NULL,
    user  TEXT    NOT NULL,
    turn  INTEGER NOT NULL,
    task  INTEGER NOT NULL,
    PRIMARY KEY (queue, type, user, turn, task)
) STRICT, WITHOUT ROWID;

-- A user with work that is ready or running in a queue. Changed with every change of its tasks there, in the same transaction. The head is the
-- first ready task: the user's candidate. A user is open while its candidate may run. The tasks of a queue without user have an account as well.
CREATE TABLE account (
    queue     TEXT    NOT NULL,
    user      TEXT    NOT NULL,
    ready     INTEGER NOT NULL DEFAULT 0 CHECK (ready >= 0),
    running   INTEGER NOT NULL DEFAULT 0 CHECK (running >= 0),
    head_turn INTEGER,
    head_task INTEGER,
    head_max  INTEGER,
    -- The number of the pick at which it was last picked, or entered.
    picked    INTEGER NOT NULL DEFAULT 0,
    open      INTEGER NOT NULL GENERATED ALWAYS AS
        (user <> '' AND head_task IS NOT NULL AND (head_max IS NULL OR running < max(head_max, 1))) VIRTUAL,
    weight    REAL    NOT NULL GENERATED ALWAYS AS (CAST(coalesce(head_max, 1) AS REAL) / (running + 1)) VIRTUAL,
    PRIMARY KEY (queue, user)
) STRICT, WITHOUT ROWID;

-- For claims from all queues, and for those from some.
CREATE INDEX account_by_weight ON account (weight DESC, head_turn, head_task) WHERE open;
CREATE INDEX account_by_age ON account (picked) WHERE open;
CREATE INDEX account_without_limit ON account (weight DESC, head_turn, head_task) WHERE open AND head_max IS NULL;
CREATE INDEX account_without_user ON account (head_turn, head_task) WHERE user = '' AND head_task IS NOT NULL;
CREATE INDEX account_of_queue_by_weight ON account (queue, weight DESC, head_turn, head_task) WHERE open;
CREATE INDEX account_of_queue_by_age ON account (queue, picked) WHERE open;
CREATE INDEX account_of_queue_without_limit ON account (queue, weight DESC, head_turn, head_task) WHERE open AND head_max IS NULL;

-- The last lease number given out, and the number of picks between users so far. Neither ever goes back.
CREATE TABLE counter (
    id    INTEGER PRIMARY KEY CHECK (id = 1),
    lease INTEGER NOT NULL,
    pick  INTEGER NOT NULL
) STRICT;

INSERT INTO counter (id, lease, pick) VALUES (1, 0, 0);

-- Hosts, also those that are gone, so that a lost attempt can be traced to the plugin versions that its host served. A host that has left
-- claims nothing more; it has ended when it holds nothing more. The identity is what a watchdog knows it by.
CREATE TABLE host (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    name       TEXT    NOT NULL,
    process_id INTEGER NOT NULL,
    started_at INTEGER NOT NULL,
    identity   TEXT,
    -- Its queues and routes, as JSON.
    serves     TEXT,
    left_at    INTEGER,
    ended_at   INTEGER
) STRICT;

CREATE INDEX host_here ON host (id) WHERE ended_at IS NULL;

-- Plugin versions that ran tasks, each with the name that it had last.
CREATE TABLE plugin_version (
    id     INTEGER PRIMARY KEY AUTOINCREMENT,
    digest TEXT NOT NULL UNIQUE,
    name   TEXT
) STRICT;

CREATE TABLE host_plugin (
    host     INTEGER NOT NULL,
    plugin   INTEGER NOT NULL,
    noted_at INTEGER NOT NULL,
    PRIMARY KEY (host, plugin)
) STRICT, WITHOUT ROWID;

-- Which versions run tasks on a host just now. Empty for a host that has left or was found dead.
CREATE TABLE host_running (
    host   INTEGER NOT NULL,
    plugin INTEGER NOT NULL,
    PRIMARY KEY (host, plugin)
) STRICT, WITHOUT ROWID;

-- Hosts that died while one version alone ran on them. Three of these put the version under quarantine.
CREATE TABLE plugin_death (
    host   INTEGER PRIMARY KEY,
    plugin INTEGER NOT NULL,
    at     INTEGER NOT NULL
) STRICT;

CREATE INDEX plugin_death_of ON plugin_death (plugin);

-- Beside the task: what is written at its end or rarely.
CREATE TABLE output (
    task   INTEGER PRIMARY KEY,
    output BLOB NOT NULL
) STRICT;

CREATE TABLE failure (
    task    INTEGER PRIMARY KEY,
    code    TEXT,
    message TEXT
) STRICT;

CREATE TABLE progress (
    task  INTEGER PRIMARY KEY,
    lease INTEGER NOT NULL,
    done  INTEGER NOT NULL,
    total INTEGER,
    note  TEXT    NOT NULL
) STRICT;

-- A follow-up that has not ended, so that those of one root can be counted.
CREATE TABLE descendant (
    task INTEGER PRIMARY KEY,
    root INTEGER NOT NULL
) STRICT;

CREATE INDEX descendant_root ON descendant (root);

-- Attempts that did not finish their task, at most twenty of each. `alone` says that it ran alone.
CREATE TABLE attempt (
    task     INTEGER NOT NULL,
    lease    INTEGER NOT NULL,
    attempt  INTEGER NOT NULL,
    alone    INTEGER NOT NULL DEFAULT 0,
    host     INTEGER,
    plugin   INTEGER,
    ended_at INTEGER NOT NULL,
    event    TEXT    NOT NULL,
    code     TEXT,
    message  TEXT,
    PRIMARY KEY (task, lease)
) STRICT, WITHOUT ROWID;

-- What came to its end together, to be removed together when its retention ends. A task that was given a new life since is left alone.
CREATE TABLE retention (
    id    INTEGER PRIMARY KEY AUTOINCREMENT,
    until INTEGER NOT NULL,
    tasks TEXT    NOT NULL
) STRICT;

CREATE INDEX retention_until ON retention (until);

-- Counts that would cost too much to take: ended tasks by state, and waiting and running tasks by queue and type.
CREATE TABLE tally (
    what  TEXT    NOT NULL CHECK (what IN ('ended', 'type')),
    queue TEXT    NOT NULL DEFAULT '',
    name  TEXT    NOT NULL,
    tasks INTEGER NOT NULL CHECK (tasks >= 0),
    PRIMARY KEY (what, queue, name)
) STRICT, WITHOUT ROWID;

-- For producers that speak SQL, with any SQLite from 3.38 on:
--     INSERT INTO submit (key, type, data) VALUES ('report-7', 'report', '{"month": 7}')
--     INSERT INTO submit (key, type, data, options) VALUES ('report-7', 'report', '{"month": 7}', '{"user": "ann", "priority": -10}')
-- The options are the members of a JSON object, the same as everywhere: see docs/tasks.md. A key that the queue has already is left alone, until its
-- retention has ended. It can be part of the producer's own transaction. Hosts learn of it when it commits.
CREATE VIEW submit AS
    SELECT task.key, task.type, coalesce(task_data.data, (SELECT group_concat(part, '') FROM
            (SELECT data AS part FROM task_data_piece WHERE pieces = task_data.pieces ORDER BY number))) AS data,
        json_object('queue', CASE task.queue WHEN '' THEN 'default' ELSE task.queue END, 'user', task.user, 'run_at', task.run_at / 1000.0, 'priority', task.priority, 'max_running', task.max_running,
            'max_attempts', task.max_attempts) AS options
    FROM task JOIN task_data ON task_data.task = task.id WHERE task.state = 'waiting';

-- A name is UTF-8 if each of its characters, read and written again, has the same bytes. (SQLite reads U+FFFE and U+FFFF as U+FFFD.)
CREATE TRIGGER submit_task INSTEAD OF INSERT ON submit
WHEN NOT EXISTS (SELECT 1 FROM task WHERE key = NEW.key AND (retained_until IS NULL
    OR retained_until > CAST(round((julianday('now') - 2440587.5) * 86400000) AS INTEGER)))
BEGIN
    SELECT RAISE(ABORT, 'key: 1 to 255 bytes of text, without control characters') WHERE NOT coalesce(typeof(NEW.key) = 'text'
        AND length(CAST(NEW.key AS BLOB)) BETWEEN 1 AND 255 AND instr(NEW.key, char(0)) = 0
        AND NEW.key NOT GLOB '*[' || char(1) || '-' || char(31) || char(127) || '-' || char(159) || ']*', 0);
    SELECT RAISE(ABORT, 'key: not UTF-8') WHERE NEW.key GLOB '*[^ -~]*' AND EXISTS (SELECT 1
        FROM json_each('[' || substr(replace(hex(zeroblob(length(NEW.key))), '00', ',0'), 2) || ']') AS place
        WHERE CAST(substr(NEW.key, place.key + 1, 1) AS BLOB)
            NOT IN (CAST(char(unicode(substr(NEW.key, place.key + 1, 1))) AS BLOB), x'efbfbe', x'efbfbf'));
    SELECT RAISE(ABORT, 'type: 1 to 255 bytes of text, without control characters') WHERE NOT coalesce(typeof(NEW.type) = 'text'
        AND length(CAST(NEW.type AS BLOB)) BETWEEN 1 AND 255 AND instr(NEW.type, char(0)) = 0
        AND NEW.type NOT GLOB '*[' || char(1) || '-' || char(31) || char(127) || '-' || char(159) || ']*', 0);
    SELECT RAISE(ABORT, 'type: not UTF-8') WHERE NEW.type GLOB '*[^ -~]*' AND EXISTS (SELECT 1
        FROM json_each('[' || substr(replace(hex(zeroblob(length(NEW.type))), '00', ',0'), 2) || ']') AS place
        WHERE CAST(substr(NEW.type, place.key + 1, 1) AS BLOB)
            NOT IN (CAST(char(unicode(substr(NEW.type, place.key + 1, 1))) AS BLOB), x'efbfbe', x'efbfbf'));
    SELECT RAISE(ABORT, 'data: a JSON object as text, at most 16777216 bytes') WHERE NEW.data IS NOT NULL
        AND NOT coalesce(typeof(NEW.data) = 'text' AND length(CAST(NEW.data AS BLOB)) <= 16777216 AND instr(NEW.data, char(0)) = 0
            AND CASE WHEN json_valid(NEW.data) THEN json_type(NEW.data) = 'object' END, 0);
    -- SQLite reads most of what is not UTF-8, and half a pair of surrogates, as U+FFFD, and a byte without its leading one as U+0080 to U+00BF.
    SELECT RAISE(ABORT, 'data: not UTF-8') WHERE NEW.data GLOB '*[^' || char(1) || '-' || char(127) || ']*' AND (
        replace(replace(replace(NEW.data, char(65533), ''), CAST(x'efbfbe' AS TEXT), ''), CAST(x'efbfbf' AS TEXT), '') GLOB '*' || char(65533) || '*'
        OR NEW.data GLOB '*[' || char(128) || '-' || char(191) || ']*' AND EXISTS (
            SELECT 1 FROM json_each('[0' || replace(hex(zeroblob(63)), '00', ',0') || ']') AS place
            WHERE replace(NEW.data, char(place.key + 128), '') GLOB '*' || char(place.key + 128) || '*'));
    SELECT RAISE(ABORT, 'data: half a pair of surrogates') WHERE NEW.data GLOB '*\u[dD][89a-fA-F]*' AND EXISTS (
        SELECT 1 FROM (SELECT key AS text FROM json_tree(NEW.data) UNION ALL SELECT atom FROM json_tree(NEW.data) WHERE type = 'text')
        WHERE replace(replace(replace(text, char(65533), ''), CAST(x'efbfbe' AS TEXT), ''), CAST(x'efbfbf' AS TEXT), '') GLOB '*' || char(65533) || '*');
    SELECT RAISE(ABORT, 'options: a JSON object as text, at most 65536 bytes') WHERE NEW.options IS NOT NULL
        AND NOT coalesce(typeof(NEW.options) = 'text' AND length(CAST(NEW.options AS BLOB)) <= 65536 AND instr(NEW.options, char(0)) = 0
            AND CASE WHEN json_valid(NEW.options) THEN json_type(NEW.options) = 'object' END, 0);
    SELECT RAISE(ABORT, 'options: no text holds a \u0000') WHERE replace(NEW.options, '\\', '') GLOB '*\u0000*';
    -- Only of a wrong path can SQLite before 3.47 say which.
    SELECT json_extract('{}', 'options: no option is called "' || key || '"; there are queue, user, run_at, priority, max_running, max_attempts and gzip')
        FROM json_each(NEW.options) WHERE key NOT IN ('queue', 'user', 'run_at', 'priority', 'max_running', 'max_attempts', 'gzip');
    SELECT json_extract('{}', 'options: "' || key || '" is there twice') FROM json_each(NEW.options) GROUP BY key HAVING count(*) > 1;
    SELECT RAISE(ABORT, 'options: their names are written without escapes') FROM json_each(NEW.options)
        WHERE json_type(NEW.options, '$.' || key) IS NULL;
    SELECT RAISE(ABORT, 'queue: 1 to 64 letters, digits and _ - . : /') WHERE json_type(NEW.options, '$.queue') <> 'null'
        AND NOT coalesce(json_type(NEW.options, '$.queue') = 'text' AND length(CAST((NEW.options ->> 'queue') AS BLOB)) BETWEEN 1 AND 64
        AND (NEW.options ->> 'queue') NOT GLOB '*[^-A-Za-z0-9_.:/]*', 0);
    SELECT RAISE(ABORT, 'user: at most 255 bytes of text, without control characters') WHERE json_type(NEW.options, '$.user') <> 'null'
        AND NOT coalesce(json_type(NEW.options, '$.user') = 'text' AND length(CAST((NEW.options ->> 'user') AS BLOB)) <= 255
        AND (NEW.options ->> 'user') NOT GLOB '*[' || char(1) || '-' || char(31) || char(127) || '-' || char(159) || ']*', 0);
    SELECT RAISE(ABORT, 'user: not UTF-8') WHERE (NEW.options ->> 'user') GLOB '*[^ -~]*' AND (EXISTS (SELECT 1
        FROM json_each('[' || substr(replace(hex(zeroblob(length((NEW.options ->> 'user')))), '00', ',0'), 2) || ']') AS place
        WHERE CAST(substr((NEW.options ->> 'user'), place.key + 1, 1) AS BLOB)
            NOT IN (CAST(char(unicode(substr((NEW.options ->> 'user'), place.key + 1, 1))) AS BLOB), x'efbfbe', x'efbfbf'))
        -- Half a pair of surrogates is read as U+FFFD.
        OR NEW.options GLOB '*\u[dD][89a-fA-F]*' AND (NEW.options ->> 'user') GLOB '*' || char(65533) || '*');
    SELECT RAISE(ABORT, 'max_running: a whole number from 0 to 4294967295') WHERE json_type(NEW.options, '$.max_running') <> 'null'
        AND NOT (json_type(NEW.options, '$.max_running') = 'integer' AND NEW.options ->> 'max_running' BETWEEN 0 AND 4294967295);
    SELECT RAISE(ABORT, 'max_running: it limits the tasks of a user, and there is none')
        WHERE NEW.options ->> 'max_running' IS NOT NULL AND coalesce((NEW.options ->> 'user'), '') = '';
    SELECT RAISE(ABORT, 'max_attempts: a whole number from 1 to 4294967295') WHERE json_type(NEW.options, '$.max_attempts') <> 'null'
        AND NOT (json_type(NEW.options, '$.max_attempts') = 'integer' AND NEW.options ->> 'max_attempts' BETWEEN 1 AND 4294967295);
    SELECT RAISE(ABORT, 'priority: a whole number from -100 to 100') WHERE json_type(NEW.options, '$.priority') <> 'null'
        AND NOT (json_type(NEW.options, '$.priority') = 'integer' AND NEW.options ->> 'priority' BETWEEN -100 AND 100);
    SELECT RAISE(ABORT, 'run_at: seconds since 1970, a time with its offset such as 2026-12-24T18:00:00Z, or a date, up to the year 9999')
        WHERE json_type(NEW.options, '$.run_at') <> 'null' AND NOT coalesce(CASE json_type(NEW.options, '$.run_at')
            WHEN 'text' THEN date(substr(NEW.options ->> 'run_at', 1, 10), '+0 days') = substr(NEW.options ->> 'run_at', 1, 10)
                AND (NEW.options ->> 'run_at' GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]'
                    OR NEW.options ->> 'run_at' GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]T[0-9][0-9]:[0-9][0-9]*Z'
                    OR NEW.options ->> 'run_at' GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]T[0-9][0-9]:[0-9][0-9]*[+-][0-9][0-9]:[0-9][0-9]')
                AND round((julianday(NEW.options ->> 'run_at') - 2440587.5) * 86400000) <= 253402300799999
            WHEN 'integer' THEN NEW.options ->> 'run_at' < 253402300800
            WHEN 'real' THEN round((NEW.options ->> 'run_at') * 1000) <= 253402300799999 END, 0);
    SELECT RAISE(ABORT, 'gzip: false; what is submitted in SQL is not compressed')
        WHERE json_type(NEW.options, '$.gzip') NOT IN ('null', 'false');

    -- What had this key before and is over.
    DELETE FROM task_data WHERE task = (SELECT id FROM task WHERE key = NEW.key);
    DELETE FROM task_data_piece WHERE task = (SELECT id FROM task WHERE key = NEW.key);
    DELETE FROM output WHERE task = (SELECT id FROM task WHERE key = NEW.key);
    DELETE FROM failure WHERE task = (SELECT id FROM task WHERE key = NEW.key);
    DELETE FROM progress WHERE task = (SELECT id FROM task WHERE key = NEW.key);
    DELETE FROM attempt WHERE task = (SELECT id FROM task WHERE key = NEW.key);
    DELETE FROM descendant WHERE task = (SELECT id FROM task WHERE key = NEW.key);
    UPDATE tally SET tasks = max(tasks - 1, 0) WHERE what = 'ended' AND name = (SELECT state FROM task WHERE key = NEW.key);
    DELETE FROM tally WHERE what = 'ended' AND tasks = 0;
    DELETE FROM task WHERE key = NEW.key;

    INSERT INTO task (key, type, queue, user, max_running, max_attempts, priority, created_at, run_at)
        SELECT NEW.key, NEW.type, coalesce(nullif(NEW.options ->> 'queue', 'default'), ''), coalesce((NEW.options ->> 'user'), ''), NEW.options ->> 'max_running', NEW.options ->> 'max_attempts',
            coalesce(NEW.options ->> 'priority', 0), clock.now,
            max(clock.now, coalesce(CASE json_type(NEW.options, '$.run_at')
                WHEN 'text' THEN CAST(round((julianday(NEW.options ->> 'run_at') - 2440587.5) * 86400000) AS INTEGER)
                ELSE CAST(round((NEW.options ->> 'run_at') * 1000.0) AS INTEGER) END, 0))
        FROM (SELECT CAST(round((julianday('now') - 2440587.5) * 86400000) AS INTEGER) AS now) AS clock;
    INSERT OR REPLACE INTO task_data (task, bytes, data)
        SELECT id, length(CAST(coalesce(NEW.data, '{}') AS BLOB)), coalesce(NEW.data, '{}') FROM task WHERE key = NEW.key;
    INSERT INTO scheduled (run_at, task) SELECT run_at, id FROM task WHERE key = NEW.key AND run_at > created_at;
    INSERT INTO ready (queue, user, turn, task, max_running)
        SELECT queue, user, turn, id, max_running FROM task WHERE key = NEW.key AND run_at <= created_at;
    INSERT INTO account (queue, user, picked)
        SELECT queue, user, (SELECT coalesce(max(pick), 0) FROM counter) FROM task WHERE key = NEW.key AND run_at <= created_at
        ON CONFLICT (queue, user) DO NOTHING;
    UPDATE account SET ready = ready + 1, (head_turn, head_task, head_max) = (SELECT turn, task, max_running FROM ready
            WHERE ready.queue = account.queue AND ready.user = account.user ORDER BY turn, task LIMIT 1)
        WHERE (queue, user) = (SELECT queue, user FROM task WHERE key = NEW.key AND run_at <= created_at);
    INSERT INTO tally (what, queue, name, tasks) SELECT 'type', queue, type, 1 FROM task WHERE key = NEW.key
        ON CONFLICT (what, queue, name) DO UPDATE SET tasks = tasks + 1;
END;
