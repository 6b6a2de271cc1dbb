-- Tasks, who has them, and what became of them. Times are milliseconds since 1970 by this server's clock; '' is no user, and the queue '' is the
-- one that people know as default.
-- The view laelaps.tasks shows the same for people.
--
-- A waiting task stands in exactly one of ready, scheduled, suspect and unserved; no other task stands in any of them.
-- A running task has a lease that ends at its `until`. Every write of an attempt checks both.

CREATE TYPE laelaps.state AS ENUM ('waiting', 'running', 'finished', 'failed', 'cancelled');

CREATE SEQUENCE laelaps.task_number;
CREATE SEQUENCE laelaps.lease_number;
-- Counts the picks between users.
CREATE SEQUENCE laelaps.pick_number;

-- Pages are filled to two fifths at first: a claim and a settlement each write a new version of the row, which finds room on its page, and
-- no index has to know (HOT). So no index may name a column that they change. What they change stands together, so that the log of changes
-- holds little more than that.
CREATE TABLE laelaps.task (
    id             int8 NOT NULL DEFAULT nextval('laelaps.task_number') PRIMARY KEY,
    created_at     int8 NOT NULL,
    run_at         int8 NOT NULL,
    -- The number, host and end of the last claim; until is only set while it runs.
    lease          int8 NOT NULL DEFAULT 0,
    host           int8,
    until          int8,
    finished_at    int8,
    retained_until int8,
    -- When it was lost for the first time since an attempt ended otherwise; set while `lost` is above zero.
    lost_at        int8,
    -- Of a follow-up: the producer's task that it comes from, and how far from it. NULL is none. Written once.
    root           int8,
    depth          int4,
    -- Where it stands among the ready tasks of its queue and user: by priority, and of one priority by time. The smaller is first.
    turn           int8 NOT NULL GENERATED ALWAYS AS
        (least(greatest(run_at, 0), 253402300800000) + least(greatest(priority, -100), 100)::int8 * 1000000000000000) STORED,
    state          laelaps.state NOT NULL DEFAULT 'waiting',
    attempts       int4 NOT NULL DEFAULT 0,
    -- The plugin version that settled it last, and how that attempt ended.
    plugin         int4,
    event          text,
    -- NULL is none.
    releases       int4,
    lost           int4,
    lost_alone     int4,
    alone          bool NOT NULL DEFAULT false,
    priority       int2 NOT NULL DEFAULT 0,
    max_running    int8,
    max_attempts   int8,
    -- The size of the data before compression.
    bytes          int4 NOT NULL,
    key            text COLLATE "C" NOT NULL,
    type           text COLLATE "C" NOT NULL,
    user_name      text COLLATE "C" NOT NULL DEFAULT '',
    queue          text COLLATE "C" NOT NULL DEFAULT '',
    -- UTF-8 as submitted, or gzip. Up to 256 bytes stand here, more in task_data.
    data           bytea,
    CHECK (priority BETWEEN -100 AND 100),
    CHECK ((state = 'running') = (until IS NOT NULL)),
    CHECK ((state IN ('finished', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
    CHECK ((finished_at IS NULL) = (retained_until IS NULL))
) WITH (fillfactor = 40, autovacuum_vacuum_scale_factor = 0.05);

CREATE UNIQUE INDEX task_key ON laelaps.task (key);

CREATE TABLE laelaps.task_data (
    task int8  NOT NULL PRIMARY KEY,
    data bytea NOT NULL
);

-- What may be claimed now, in the order of claims: by queue and user, and by queue for who does not look at users.
CREATE TABLE laelaps.ready (
    turn        int8 NOT NULL,
    task        int8 NOT NULL,
    bytes       int4 NOT NULL,
    max_running int8,
    user_name   text COLLATE "C" NOT NULL,
    queue       text COLLATE "C" NOT NULL DEFAULT '',
    PRIMARY KEY (queue, user_name, turn, task)
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);

CREATE INDEX ready_in_turn ON laelaps.ready (queue, turn, task) WHERE user_name <> '';

-- What is not due yet. Moves to ready or suspect in batches when it is. A held task is here with a run_at that never comes, 253402300800000.
CREATE TABLE laelaps.scheduled (
    run_at int8 NOT NULL,
    task   int8 NOT NULL,
    PRIMARY KEY (run_at, task)
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);

-- What was lost with its host too often to run in company, and is due. One host is told of it, and drains for it until `reserved_until`.
CREATE TABLE laelaps.suspect (
    turn           int8 NOT NULL,
    task           int8 NOT NULL,
    reserved_by    int8,
    reserved_until int8,
    queue          text COLLATE "C" NOT NULL DEFAULT '',
    PRIMARY KEY (queue, turn, task)
);

-- For who looks at all queues; the condition, which always holds, keeps it from being taken where one queue is looked at.
CREATE INDEX suspect_in_turn ON laelaps.suspect (turn, task) WHERE octet_length(queue) >= 0;

-- What is due, and was met by a host that does not serve its type. Hosts that do take it back to ready or suspect, some at a time.
CREATE TABLE laelaps.unserved (
    turn      int8 NOT NULL,
    task      int8 NOT NULL,
    queue     text COLLATE "C" NOT NULL,
    type      text COLLATE "C" NOT NULL,
    user_name text COLLATE "C" NOT NULL,
    PRIMARY KEY (queue, type, user_name, turn, task)
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);

-- What was claimed together, so that the running tasks of a host and those whose leases have ended are found without an index on the task.
-- Goes when all of its tasks are settled, or when it is looked at, at `check_at`, and none of them runs any more.
CREATE TABLE laelaps.claim (
    id       int8   NOT NULL PRIMARY KEY,
    host     int8   NOT NULL,
    check_at int8   NOT NULL,
    tasks    int8[] NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);

CREATE INDEX claim_check_at ON laelaps.claim (check_at);

-- A user with work that is ready or running in a queue. The head is the first ready task: the user's candidate. A user is open while its candidate
-- may run. Right except for what account_change still holds.
CREATE TABLE laelaps.account (
    user_name text COLLATE "C" NOT NULL,
    queue     text COLLATE "C" NOT NULL DEFAULT '',
    running   int8 NOT NULL DEFAULT 0,
    head_turn int8,
    head_task int8,
    head_max  int8,
    -- The number of the pick at which it was last picked, or entered.
    picked    int8 NOT NULL,
    open      bool NOT NULL GENERATED ALWAYS AS (head_task IS NOT NULL AND (head_max IS NULL OR running < greatest(head_max, 1))) STORED,
    weight    float8 NOT NULL GENERATED ALWAYS AS (coalesce(head_max, 1)::float8 / greatest(running + 1, 1)) STORED,
    PRIMARY KEY (queue, user_name)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);

-- The open accounts in the three orders in which they are looked for. Each order is there three times: of the default queue, of all other queues
-- together, and of each of these. So who uses the default queue alone pays for one. The last two have the same condition in other words, so that a
-- query that says one of them never goes through the other.
CREATE INDEX account_by_weight ON laelaps.account (weight DESC, head_turn, head_task) WHERE open AND queue = '';
CREATE INDEX account_by_age ON laelaps.account (picked) WHERE open AND queue = '';
CREATE INDEX account_without_limit ON laelaps.account (weight DESC, head_turn, head_task) WHERE open AND queue = '' AND head_max IS NULL;
CREATE INDEX account_by_weight_elsewhere ON laelaps.account (weight DESC, head_turn, head_task) WHERE open AND octet_length(queue) > 0;
CREATE INDEX account_by_age_elsewhere ON laelaps.account (picked) WHERE open AND octet_length(queue) > 0;
CREATE INDEX account_without_limit_elsewhere ON laelaps.account (weight DESC, head_turn, head_task)
    WHERE open AND octet_length(queue) > 0 AND head_max IS NULL;
CREATE INDEX account_by_weight_of_queue ON laelaps.account (queue, weight DESC, head_turn, head_task) WHERE open AND queue <> '';
CREATE INDEX account_by_age_of_queue ON laelaps.account (queue, picked) WHERE open AND queue <> '';
CREATE INDEX account_without_limit_of_queue ON laelaps.account (queue, weight DESC, head_turn, head_task)
    WHERE open AND queue <> '' AND head_max IS NULL;

-- What came about for users, to be entered into their accounts before the next choice between them: tasks that run no more, and the first
-- task that became ready. Appended, so that submits and settlements wait for nobody.
CREATE TABLE laelaps.account_change (
    id        int8 NOT NULL GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_name text COLLATE "C" NOT NULL,
    queue     text COLLATE "C" NOT NULL DEFAULT '',
    stopped   int8 NOT NULL DEFAULT 0,
    turn      int8,
    task      int8,
    max_running int8
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);

-- Hosts, also those that are gone, so that a lost attempt can be traced to the plugin versions that its host served. A host that has left
-- claims nothing more; it has ended when it holds nothing more. The identity is what a watchdog knows it by. died_at: found dead, so that its
-- death counts once.
CREATE TABLE laelaps.host (
    id         int8 NOT NULL GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name       text NOT NULL,
    process_id int8 NOT NULL,
    started_at int8 NOT NULL,
    seen_at    int8 NOT NULL,
    identity   text COLLATE "C",
    -- Its queues and routes, as JSON.
    serves     text COLLATE "C",
    left_at    int8,
    ended_at   int8,
    died_at    int8
);

CREATE INDEX host_here ON laelaps.host (id) WHERE ended_at IS NULL;

-- How often a host has said that it is alive, if its fleet goes by that. A host whose number stands still for timeout_ms is dead to those who
-- watched it. A row of its own, since a claim holds its host's; gone when the host leaves.
CREATE TABLE laelaps.host_sign (
    host       int8 NOT NULL PRIMARY KEY,
    given      int8 NOT NULL,
    timeout_ms int8 NOT NULL
) WITH (fillfactor = 50);

CREATE TABLE laelaps.plugin_version (
    id     int4 NOT NULL GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    digest text COLLATE "C" NOT NULL UNIQUE,
    -- The plugin that it is a version of, as it was called last; '' while no host has said so.
    name   text COLLATE "C" NOT NULL DEFAULT ''
);

CREATE TABLE laelaps.host_plugin (
    host     int8 NOT NULL,
    plugin   int4 NOT NULL,
    noted_at int8 NOT NULL,
    PRIMARY KEY (host, plugin)
);

-- The plugin versions with running attempts on a host, or under admission there. A host that leaves in good order has none.
CREATE TABLE laelaps.host_running (
    host   int8 NOT NULL,
    plugin int4 NOT NULL,
    PRIMARY KEY (host, plugin)
);

-- Hosts that were found dead while one plugin version alone ran on them, until it is released.
CREATE TABLE laelaps.plugin_death (
    plugin int4 NOT NULL,
    host   int8 NOT NULL,
    at     int8 NOT NULL,
    PRIMARY KEY (plugin, host)
);

CREATE INDEX plugin_death_host ON laelaps.plugin_death (host);

-- Beside the task: what is written at its end or rarely.
CREATE TABLE laelaps.output (
    task   int8  NOT NULL PRIMARY KEY,
    output bytea NOT NULL
);

-- Every failed task is here, and those that had a failure before.
CREATE TABLE laelaps.failure (
    task    int8 NOT NULL PRIMARY KEY,
    code    text,
    message text
);

-- A follow-up that has not ended, so that those of one root can be counted.
CREATE TABLE laelaps.descendant (
    task int8 NOT NULL PRIMARY KEY,
    root int8 NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);

CREATE INDEX descendant_root ON laelaps.descendant (root);

CREATE TABLE laelaps.cancelled (
    task int8 NOT NULL PRIMARY KEY
);

CREATE TABLE laelaps.progress (
    task  int8 NOT NULL PRIMARY KEY,
    lease int8 NOT NULL,
    done  int8 NOT NULL,
    total int8,
    note  text NOT NULL
) WITH (fillfactor = 70);

-- Attempts that did not finish their task, at most twenty of each.
CREATE TABLE laelaps.attempt (
    task     int8 NOT NULL,
    lease    int8 NOT NULL,
    attempt  int4 NOT NULL,
    host     int8,
    plugin   int4,
    ended_at int8 NOT NULL,
    event    text NOT NULL,
    -- Of a lost one: it ran alone.
    alone    bool NOT NULL DEFAULT false,
    code     text,
    message  text,
    PRIMARY KEY (task, lease)
);

-- What came to its end together, to be removed together when its retention ends. A task that was given a new life since is left alone.
CREATE TABLE laelaps.retention (
    id    int8   NOT NULL GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    until int8   NOT NULL,
    tasks int8[] NOT NULL
);

CREATE INDEX retention_until ON laelaps.retention (until);

-- Counts that would cost too much to take, by type and queue: each row is a difference, and clean-up puts them together.
CREATE TABLE laelaps.tally (
    id        int8 NOT NULL GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    type      text COLLATE "C" NOT NULL,
    queue     text COLLATE "C" NOT NULL DEFAULT '',
    -- Waiting and running ones, and of these those in scheduled.
    live      int8 NOT NULL DEFAULT 0,
    scheduled int8 NOT NULL DEFAULT 0,
    finished  int8 NOT NULL DEFAULT 0,
    failed    int8 NOT NULL DEFAULT 0,
    cancelled int8 NOT NULL DEFAULT 0
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);

-- A moment as people read it; NULL beyond what a timestamp can tell.
CREATE FUNCTION laelaps.moment(ms int8) RETURNS timestamptz LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS
$$ SELECT CASE WHEN ms BETWEEN -62135596800000 AND 253402300800000 THEN to_timestamp(ms / 1000.0) END $$;

-- Data as people read it, whatever somebody did to it.
CREATE FUNCTION laelaps.words(data bytea) RETURNS text LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN CASE WHEN substring(data FROM 1 FOR 2) = '\x1f8b' THEN '(compressed)' ELSE convert_from(data, 'UTF8') END;
EXCEPTION WHEN data_exception THEN
    RETURN '(damaged)';
END $$;

-- For people.
CREATE VIEW laelaps.tasks AS
    SELECT task.id, task.key, task.type, coalesce(nullif(task.queue, ''), 'default') AS queue, task.state, nullif(task.user_name, '') AS user_name, task.attempts,
        laelaps.moment(task.created_at) AS created_at, laelaps.moment(task.run_at) AS run_at,
        CASE WHEN task.state = 'running' THEN host.name || ', process ' || host.process_id END AS host,
        laelaps.moment(task.until) AS until, laelaps.moment(task.finished_at) AS finished_at,
        laelaps.moment(task.retained_until) AS retained_until, failure.code AS error_code, failure.message AS error_message,
        laelaps.words(coalesce(task.data, task_data.data)) AS data
    FROM laelaps.task LEFT JOIN laelaps.task_data ON task_data.task = task.id LEFT JOIN laelaps.host ON host.id = task.host
        LEFT JOIN laelaps.failure ON failure.task = task.id;

-- Whether a text is data as every other way of submitting takes it: a JSON object of at most 16 MiB. The server checks the grammar, but lets
-- halves of surrogate pairs pass, which no text can hold.
CREATE FUNCTION laelaps.is_data(data text) RETURNS bool LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    plain text;
BEGIN
    IF octet_length(data) > 16777216 OR json_typeof(data::json) <> 'object' THEN
        RETURN false;
    END IF;
    IF data !~ '\\u[dD][89a-fA-F]' THEN
        RETURN true;
    END IF;
    -- Without escaped backslashes and whole pairs the only halves left are lone ones.
    plain := regexp_replace(replace(data, '\\', '__'), '\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}', '__', 'g');
    RETURN plain !~ '\\u[dD][89a-fA-F]';
EXCEPTION WHEN data_exception OR statement_too_complex THEN
    RETURN false;
END $$;

-- The listening connections that wait for a notice. See host/queue/src/postgres/listen.rs.
CREATE UNLOGGED TABLE laelaps.waiting (
    pid int4 NOT NULL PRIMARY KEY
);

-- Wake hosts when this transaction commits, if any of them waits: a notice takes a lock of the whole server while its transaction commits. To be called
-- by who has stored something: only then does this transaction have a number, by which hosts know that it was under way.
CREATE FUNCTION laelaps.wake() RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- Other transactions may see who waited some time ago.
    IF current_setting('transaction_isolation') <> 'read committed' OR EXISTS (SELECT FROM laelaps.waiting) THEN
        PERFORM pg_notify('laelaps', '');
    END IF;
END $$;

-- What a producer says of a task beside its key, type and data, from a JSON object: the same members as everywhere, see docs/tasks.md.
CREATE FUNCTION laelaps.submit_options(
    options text, OUT queue text, OUT user_name text, OUT run_at int8, OUT priority int4, OUT max_running int8, OUT max_attempts int8
) LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    whole CONSTANT text := '^(0|-?[1-9][0-9]{0,9})$';
    dated CONSTANT text := '^[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]{1,9})?)?(Z|[+-][0-9]{2}:[0-9]{2}))?$';
    option record;
    seen text[] := '{}';
    said text;
    wrong text;
BEGIN
    queue := '';
    user_name := '';
    priority := 0;
    IF octet_length(options) > 65536 OR NOT laelaps.is_data(options) THEN
        RAISE 'options: a JSON object, at most 65536 bytes' USING ERRCODE = 'invalid_parameter_value';
    ELSIF replace(options, '\\', '') ~ '\\u0000' THEN
        RAISE 'options: no text holds a \u0000' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    FOR option IN SELECT key AS name, value, json_typeof(value) AS kind FROM json_each(options::json) LOOP
        IF option.name NOT IN ('user', 'queue', 'run_at', 'priority', 'max_running', 'max_attempts', 'gzip') THEN
            RAISE 'options: no option is called "%"; there are user, queue, run_at, priority, max_running, max_attempts and gzip', option.name
                USING ERRCODE = 'invalid_parameter_value';
        ELSIF option.name = ANY (seen) THEN
            RAISE 'options: "%" is there twice', option.name USING ERRCODE = 'invalid_parameter_value';
        END IF;
        seen := seen || option.name;
        CONTINUE WHEN option.kind = 'null';
        said := option.value #>> '{}';
        wrong := CASE option.name
            WHEN 'user' THEN CASE WHEN option.kind <> 'string' OR octet_length(said) > 255 OR said COLLATE "C" ~ '[\u0001-\u001f\u007f-\u009f]'
                THEN 'at most 255 bytes of text, without control characters' END
            WHEN 'queue' THEN CASE WHEN option.kind <> 'string' OR said COLLATE "C" !~ '^[A-Za-z0-9_.:/-]{1,64}$'
                THEN '1 to 64 letters, digits and _ - . : /' END
            WHEN 'run_at' THEN CASE WHEN option.kind <> 'number' AND (option.kind <> 'string' OR said !~ dated)
                THEN 'seconds since 1970, a time with its offset such as 2026-12-24T18:00:00Z, or a date, up to the year 9999' END
            WHEN 'gzip' THEN CASE WHEN option.kind <> 'boolean' OR said <> 'false'
                THEN 'false; what is submitted in SQL is not compressed' END
            WHEN 'priority' THEN CASE WHEN option.kind <> 'number' OR said !~ whole OR said::int8 NOT BETWEEN -100 AND 100
                THEN 'a whole number from -100 to 100' END
            WHEN 'max_running' THEN CASE WHEN option.kind <> 'number' OR said !~ whole OR said::int8 NOT BETWEEN 0 AND 4294967295
                THEN 'a whole number from 0 to 4294967295' END
            WHEN 'max_attempts' THEN CASE WHEN option.kind <> 'number' OR said !~ whole OR said::int8 NOT BETWEEN 1 AND 4294967295
                THEN 'a whole number from 1 to 4294967295' END
        END;
        IF wrong IS NULL AND option.name = 'run_at' THEN
            BEGIN
                run_at := floor(1000 * CASE option.kind WHEN 'number' THEN greatest(said::float8, -1)::numeric
                    ELSE extract(epoch FROM (said || CASE WHEN length(said) = 10 THEN 'T00:00:00Z' ELSE '' END)::timestamptz) END);
            EXCEPTION WHEN data_exception THEN
                run_at := 253402300800000;
            END;
            IF run_at > 253402300799999 THEN
                wrong := 'seconds since 1970, a time with its offset such as 2026-12-24T18:00:00Z, or a date, up to the year 9999';
            END IF;
        END IF;
        IF wrong IS NOT NULL THEN
            RAISE '%: %', option.name, wrong USING ERRCODE = 'invalid_parameter_value';
        END IF;
        CASE option.name
            WHEN 'user' THEN user_name := said;
            WHEN 'queue' THEN queue := CASE said WHEN 'default' THEN '' ELSE said END;
            WHEN 'priority' THEN priority := said;
            WHEN 'max_running' THEN max_running := said;
            WHEN 'max_attempts' THEN max_attempts := said;
            ELSE NULL;
        END CASE;
    END LOOP;
    IF max_running IS NOT NULL AND user_name = '' THEN
        RAISE 'max_running: it limits the tasks of a user, and there is none' USING ERRCODE = 'invalid_parameter_value';
    END IF;
END $$;

-- For producers in any language, in their own transactions:
--     SELECT laelaps.submit('report-7', 'report', '{"month": 7}')
--     SELECT laelaps.submit('report-7', 'report', '{"month": 7}', '{"user": "ann", "priority": -10}')
-- True if the task is new; a key that the queue has already is left alone, unless its task has ended and its retention too. Who may use the schema may submit:
--     GRANT USAGE ON SCHEMA laelaps TO producer
-- Hosts are woken when the transaction commits, unless `wake` is false.
CREATE FUNCTION laelaps.submit(
    key text, type text, data text DEFAULT '{}', options text DEFAULT NULL, wake bool DEFAULT true
) RETURNS bool LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    names CONSTANT text := '[\u0001-\u001f\u007f-\u009f]';
    plain CONSTANT bytea := convert_to(coalesce(submit.data, '{}'), 'UTF8');
    now CONSTANT int8 := extract(epoch FROM clock_timestamp()) * 1000;
    account text := '';
    line text := '';
    urgency int4 := 0;
    at_once int8;
    attempts_max int8;
    moment int8 := now;
    place int8;
    number int8;
    gone int8;
BEGIN
    IF submit.key IS NULL OR octet_length(submit.key) NOT BETWEEN 1 AND 255 OR submit.key COLLATE "C" ~ names THEN
        RAISE 'key: 1 to 255 bytes of text, without control characters' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF submit.type IS NULL OR octet_length(submit.type) NOT BETWEEN 1 AND 255 OR submit.type COLLATE "C" ~ names THEN
        RAISE 'type: 1 to 255 bytes of text, without control characters' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF NOT laelaps.is_data(coalesce(submit.data, '{}')) THEN
        RAISE 'data: a JSON object, at most 16777216 bytes' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF submit.options IS NOT NULL THEN
        SELECT said.user_name, said.queue, said.priority, said.max_running, said.max_attempts, greatest(now, said.run_at)
            INTO account, line, urgency, at_once, attempts_max, moment FROM laelaps.submit_options(submit.options) AS said;
    END IF;

    FOR round IN 1 .. 2 LOOP
        INSERT INTO laelaps.task (created_at, run_at, bytes, priority, max_running, max_attempts, key, type, user_name, queue, data)
            VALUES (now, moment, octet_length(plain), urgency, at_once, attempts_max, submit.key, submit.type, account, line,
                CASE WHEN octet_length(plain) <= 256 THEN plain END)
            ON CONFLICT (key) DO NOTHING RETURNING id, turn INTO number, place;
        EXIT WHEN number IS NOT NULL;
        -- A task that clean-up has not come to yet does not keep its key.
        WITH over AS (
            DELETE FROM laelaps.task WHERE task.key = submit.key AND state IN ('finished', 'failed', 'cancelled') AND retained_until <= now
            RETURNING id, task.type, task.queue, state)
        , counted AS (
            INSERT INTO laelaps.tally (type, queue, finished, failed, cancelled)
            SELECT type, queue, -(state = 'finished')::int, -(state = 'failed')::int, -(state = 'cancelled')::int FROM over)
        SELECT id INTO gone FROM over;
        IF gone IS NULL THEN
            RETURN false;
        END IF;
        DELETE FROM laelaps.task_data WHERE task = gone;
        DELETE FROM laelaps.output WHERE task = gone;
        DELETE FROM laelaps.failure WHERE task = gone;
        DELETE FROM laelaps.cancelled WHERE task = gone;
        DELETE FROM laelaps.progress WHERE task = gone;
        DELETE FROM laelaps.attempt WHERE task = gone;
        DELETE FROM laelaps.descendant WHERE task = gone;
    END LOOP;
    IF number IS NULL THEN
        RETURN false;
    END IF;
    IF octet_length(plain) > 256 THEN
        INSERT INTO laelaps.task_data (task, data) VALUES (number, plain);
    END IF;
    IF moment > now THEN
        INSERT INTO laelaps.scheduled (run_at, task) VALUES (moment, number);
    ELSE
        INSERT INTO laelaps.ready (turn, task, bytes, max_running, user_name, queue)
            VALUES (place, number, octet_length(plain), at_once, account, line);
        IF account <> '' THEN
            INSERT INTO laelaps.account_change (user_name, queue, turn, task, max_running) VALUES (account, line, place, number, at_once);
        END IF;
    END IF;
    INSERT INTO laelaps.tally (type, queue, live, scheduled) VALUES (submit.type, line, 1, CASE WHEN moment > now THEN 1 ELSE 0 END);
    IF wake THEN
        PERFORM laelaps.wake();
    END IF;
    RETURN true;
END $$;

-- The same for data and options of the other two types.
CREATE FUNCTION laelaps.submit(key text, type text, data json, options text DEFAULT NULL, wake bool DEFAULT true)
RETURNS bool LANGUAGE sql AS $$ SELECT laelaps.submit(key, type, data::text, options, wake) $$;

CREATE FUNCTION laelaps.submit(key text, type text, data jsonb, options text DEFAULT NULL, wake bool DEFAULT true)
RETURNS bool LANGUAGE sql AS $$ SELECT laelaps.submit(key, type, data::text, options, wake) $$;

CREATE FUNCTION laelaps.submit(key text, type text, data text, options json, wake bool DEFAULT true)
RETURNS bool LANGUAGE sql AS $$ SELECT laelaps.submit(key, type, data, options::text, wake) $$;

CREATE FUNCTION laelaps.submit(key text, type text, data json, options json, wake bool DEFAULT true)
RETURNS bool LANGUAGE sql AS $$ SELECT laelaps.submit(key, type, data::text, options::text, wake) $$;

CREATE FUNCTION laelaps.submit(key text, type text, data jsonb, options json, wake bool DEFAULT true)
RETURNS bool LANGUAGE sql AS $$ SELECT laelaps.submit(key, type, data::text, options::text, wake) $$;

CREATE FUNCTION laelaps.submit(key text, type text, data text, options jsonb, wake bool DEFAULT true)
RETURNS bool LANGUAGE sql AS $$ SELECT laelaps.submit(key, type, data, options::text, wake) $$;

CREATE FUNCTION laelaps.submit(key text, type text, data json, options jsonb, wake bool DEFAULT true)
RETURNS bool LANGUAGE sql AS $$ SELECT laelaps.submit(key, type, data::text, options::text, wake) $$;

CREATE FUNCTION laelaps.submit(key text, type text, data jsonb, options jsonb, wake bool DEFAULT true)
RETURNS bool LANGUAGE sql AS $$ SELECT laelaps.submit(key, type, data::text, options::text, wake) $$;
