//! On MariaDB, by its sequence engine.

use sqlx::{Connection as _, Executor as _, MySqlConnection};

use super::{CHUNK, DATA, ENDED_TOGETHER};

/// As the name of the sequence says.
const _: () = assert!(CHUNK == 100_000);

const NOW: &str = "SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000";

/// Whose numbers follow each other: an INSERT of many takes them all at once (innodb_autoinc_lock_mode = 1, the default).
const WAITING: &str = "INSERT INTO laelaps_task (`key`, type, queue, user, created_at, run_at, lease)
    SELECT CONCAT('task-', n), IF(queues = 1, 'bench', CONCAT('bench-', n MOD queues)), IF(queues = 1, '', CONCAT('queue-', n MOD queues)),
        IF(users = 0, '', CONCAT('user-', n DIV queues MOD users)), now, now, -1
    FROM (SELECT ? + seq AS n, ? AS users, ? AS queues, ? AS now FROM seq_0_to_99999 WHERE seq < ?) AS given ORDER BY n";
const DATA_OF: &str =
    "INSERT INTO laelaps_task_data (task, part, bytes, data) SELECT id, 0, LENGTH(?), ? FROM laelaps_task WHERE id >= ?";
const READY: &str =
    "INSERT INTO laelaps_ready (queue, turn, task) SELECT queue, turn, id FROM laelaps_task WHERE id >= ? AND user = ''";
const READY_OF_USER: &str = "INSERT INTO laelaps_ready_of_user (queue, user, turn, task) SELECT queue, user, turn, id FROM laelaps_task WHERE id >= ? AND user <> ''";
const ACCOUNT: &str = "INSERT INTO laelaps_account (queue, user, head_turn, head_task, picked)
    SELECT queue, user, MIN(turn), MIN(id), (SELECT pick FROM laelaps_counter WHERE id = 1) FROM laelaps_task WHERE id >= ? AND user <> '' GROUP BY queue, user
    ON DUPLICATE KEY UPDATE head_turn = COALESCE(laelaps_account.head_turn, VALUES(head_turn)),
        head_task = COALESCE(laelaps_account.head_task, VALUES(head_task))";
const TALLY: &str = "INSERT INTO laelaps_tally (what, queue, name, tasks)
    SELECT 'type', queue, type, COUNT(*) FROM laelaps_task WHERE id >= ? GROUP BY queue, type";

pub(super) async fn waiting(url: &str, first: i64, last: i64, users: i64, queues: i64) {
    let mut connection = begin(url).await;
    let now: i64 = sqlx::query_scalar(NOW).fetch_one(&mut connection).await.expect("the server serves");
    let count = last - first + 1;
    let insert = sqlx::query(WAITING).bind(first).bind(users).bind(queues).bind(now).bind(count);
    let begun = insert.execute(&mut connection).await.expect("the tables are there").last_insert_id();
    add_data(&mut connection, begun).await;
    for statement in [READY, READY_OF_USER, ACCOUNT, TALLY] {
        sqlx::query(statement).bind(begun).execute(&mut connection).await.expect("the tables are there");
    }
    end(connection).await;
}

const FINISHED: &str = "INSERT INTO laelaps_task
        (`key`, type, state, attempts, event, lease, host, created_at, run_at, finished_at, retained_until)
    SELECT CONCAT('ended-', ? + seq), 'bench', 'finished', 1, 'finish', ? + seq, 1, 1, 1, 1, 1 FROM seq_0_to_99999 WHERE seq < ? ORDER BY seq";
const RETENTION: &str = "INSERT INTO laelaps_retention (until, tasks)
    SELECT 1, CONCAT('[', GROUP_CONCAT(id ORDER BY id SEPARATOR ','), ']') FROM laelaps_task WHERE id >= ? GROUP BY id DIV ? ORDER BY id DIV ?";
const ENDED: &str = "INSERT INTO laelaps_tally (what, name, tasks) VALUES ('ended', 'finished', ?)";

pub(super) async fn finished(url: &str, first: i64, last: i64) {
    let mut connection = begin(url).await;
    let count = last - first + 1;
    let insert = sqlx::query(FINISHED).bind(first).bind(first).bind(count).execute(&mut connection).await;
    let begun = insert.expect("the tables are there").last_insert_id();
    add_data(&mut connection, begun).await;
    let retention = sqlx::query(RETENTION).bind(begun).bind(ENDED_TOGETHER).bind(ENDED_TOGETHER);
    retention.execute(&mut connection).await.expect("the tables are there");
    sqlx::query(ENDED).bind(count).execute(&mut connection).await.expect("the tables are there");
    end(connection).await;
}

async fn begin(url: &str) -> MySqlConnection {
    let mut connection = MySqlConnection::connect(url).await.expect("the server serves");
    let settings =
        "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED; SET SESSION group_concat_max_len = 1000000; START TRANSACTION";
    connection.execute(sqlx::raw_sql(settings)).await.expect("the server serves");
    connection
}

async fn add_data(connection: &mut MySqlConnection, begun: u64) {
    let query = sqlx::query(DATA_OF).bind(DATA).bind(DATA).bind(begun);
    query.execute(connection).await.expect("the tables are there");
}

async fn end(mut connection: MySqlConnection) {
    connection.execute(sqlx::raw_sql("COMMIT")).await.expect("the disk has room");
    connection.close().await.expect("nothing is under way");
}
