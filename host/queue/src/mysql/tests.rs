//! What only this database promises: how statements find their rows, and what a repeated operation finds of its first try.

mod apart;

use laelaps_test_databases::mariadb;
use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection};

use super::settle::Group;
use super::*;
use crate::{Attempt, ClaimedTask, Event, State};

async fn opened() -> MySql {
    let runtime = tokio::runtime::Handle::current();
    let making = tokio::task::spawn_blocking(move || runtime.block_on(async { mariadb::shared().await.create_database().await }));
    let mysql = MySql::open(&Config::new(making.await.unwrap())).await.unwrap();
    mysql.init().await.unwrap();
    mysql
}

async fn claimed(mysql: &MySql, host: HostId) -> ClaimedTask {
    let claim = Claim::new(host, 1, Duration::from_secs(300));
    mysql.claim(&claim).await.unwrap().tasks.remove(0)
}

fn settled(task: &ClaimedTask, event: Event) -> Settlement {
    Settlement::of(task.lease_ref, event, Attempt::of(task), &Policy::default(), 0.5, None, Vec::new())
}

/// Settle as who has tried it before and did not hear the answer.
async fn settled_again(mysql: &MySql, settlement: &Settlement) -> LeaseAnswer {
    let settlement = settlement.clone();
    let answers = mysql
        .run("settling", move |session| {
            let group = Group::new(std::slice::from_ref(&settlement), HashMap::new(), false);
            Box::pin(async move {
                session.repeated = true;
                group?.write(session, &HashSet::new()).await
            })
        })
        .await;
    answers.unwrap()[0]
}

#[tokio::test]
async fn a_settlement_whose_answer_was_lost_is_known_to_have_been_made() {
    let mysql = opened().await;
    let host = mysql.register_host(&HostDescription { name: "tester".to_owned(), process_id: 1, identity: None }).await.unwrap();
    mysql.submit(&[NewTask::new("a", "type", "{}")]).await.unwrap();
    let first = claimed(&mysql, host).await;
    let release = settled(&first, Event::Release { delay: None });
    assert_eq!(mysql.settle(std::slice::from_ref(&release)).await.unwrap(), [LeaseAnswer::Held]);
    assert_eq!(settled_again(&mysql, &release).await, LeaseAnswer::Held);
    assert_eq!(settled_again(&mysql, &settled(&first, Event::Stopped)).await, LeaseAnswer::Lost, "that is not what was settled");
    // Also once another attempt has followed.
    let second = claimed(&mysql, host).await;
    assert_eq!(settled_again(&mysql, &release).await, LeaseAnswer::Held);
    let finish = settled(&second, Event::Finish { output: None, retention: None });
    assert_eq!(settled_again(&mysql, &finish).await, LeaseAnswer::Held, "a first try that was taken back is made now");
    assert_eq!(settled_again(&mysql, &finish).await, LeaseAnswer::Held);
    assert_eq!(mysql.settle(&[finish]).await.unwrap(), [LeaseAnswer::Lost], "who does not ask again is told as ever");
    assert_eq!(mysql.attempts("a").await.unwrap().len(), 2, "nothing is written twice");
}

/// As after a look over much that is deleted. What this process submits with a smaller priority is claimed next all the same.
#[tokio::test]
async fn what_enters_behind_the_mark_is_claimed_next() {
    let mysql = opened().await;
    let host = mysql.register_host(&HostDescription { name: "tester".to_owned(), process_id: 1, identity: None }).await.unwrap();
    let of = |key: &str, user: Option<&str>, priority| NewTask {
        user: user.map(str::to_owned),
        priority,
        ..NewTask::new(key, "type", "{}")
    };
    for user in [None, Some("u")] {
        mysql.submit(&[of("a", user, 0), of("b", user, 0), of("c", user, 0)]).await.unwrap();
        let first = claimed(&mysql, host).await;
        assert_eq!(first.key, "a");
        let slow = fronts::Looked::of(true, Duration::from_secs(1), vec![(Vec::new(), Some((fair::turn(0, 1), 0)))]);
        let looks =
            |entered| mark::Looks { ready: Some(slow.clone()), of_users: Some(slow.clone()), entered, ..mark::Looks::default() };
        let entered = locked(&mysql.marks).starts(&None).entered;
        locked(&mysql.marks).looked(&looks(entered));
        // What ends makes nothing wait.
        mysql.settle(&[settled(&first, Event::Finish { output: None, retention: Some(Duration::ZERO) })]).await.unwrap();
        assert_eq!(locked(&mysql.marks).starts(&None).entered, entered);
        mysql.submit(&[of("urgent", user, -1)]).await.unwrap();
        assert_eq!(claimed(&mysql, host).await.key, "urgent");
        // Also where it entered while a look was under way.
        let entered = locked(&mysql.marks).starts(&None).entered;
        mysql.submit(&[of("more urgent", user, -2)]).await.unwrap();
        locked(&mysql.marks).looked(&looks(entered));
        assert_eq!(claimed(&mysql, host).await.key, "more urgent");
        for key in ["b", "c", "urgent", "more urgent"] {
            mysql.cancel(key, Duration::ZERO).await.unwrap();
        }
        mysql.clean_up(100).await.unwrap();
    }
}

#[tokio::test]
async fn a_submit_whose_answer_was_lost_is_known_to_have_been_made() {
    let mysql = opened().await;
    let mark = submit::new_mark();
    for repeated in [false, true] {
        let answers = mysql
            .run("submitting", move |session| {
                Box::pin(async move {
                    session.repeated = repeated;
                    let batch = Batch::new(&[NewTask::new("a", "type", "{}"), NewTask::new("b", "type", "{}")])?;
                    submit::submit(session, &[batch], mark).await
                })
            })
            .await;
        assert_eq!(answers.unwrap(), [[Submitted::Created; 2]]);
    }
    assert_eq!(mysql.stats().await.unwrap().types, [("type".to_owned(), 2)]);
}

/// Statements whose cost may grow with their batch, and with nothing else.
const LOOKED_UP: [(&str, &str); 41] = [
    ("look", outlook::LOOK),
    ("look at some", outlook::LOOK_AT_SOME),
    ("first", fronts::FIRST),
    ("first of users", fronts::FIRST_OF_USERS),
    ("first of queues", fronts::FIRST_OF_QUEUES),
    ("first of users of queues", fronts::FIRST_OF_USERS_OF_QUEUES),
    ("seen", fronts::SEEN),
    ("seen of users", fronts::SEEN_OF_USERS),
    ("heads", fronts::HEADS),
    ("heads of users", fronts::HEADS_OF_USERS),
    ("open accounts", between::OPEN_ACCOUNTS),
    ("open accounts of others", between::OPEN_OTHERS),
    ("open accounts without limit", between::OPEN_WITHOUT_LIMIT),
    ("open accounts of others without limit", between::OTHERS_WITHOUT_LIMIT),
    ("open queues", between::OPEN_QUEUES),
    ("open accounts of queues", between::OPEN_OF_QUEUES),
    ("aged accounts of queues", between::AGED_OF_QUEUES),
    ("open accounts of queues without limit", between::WITHOUT_LIMIT_OF_QUEUES),
    ("candidates of one", between::CANDIDATES_OF_ONE),
    ("candidates of several", between::CANDIDATES_OF_SEVERAL),
    ("suspect", suspects::SUSPECT),
    ("suspect of queues", suspects::SUSPECT_OF_QUEUES),
    ("free suspect", suspects::FREE),
    ("free suspect of queues", suspects::FREE_OF_QUEUES),
    ("wanted of a list", list::WANTED),
    ("set aside", list::ASIDE),
    ("of keys", list::OF_KEYS),
    ("due", due::DUE),
    ("apart of nobody", unserved::OF_NOBODY),
    ("apart of users", unserved::OF_USERS),
    ("lease", claim::LEASE),
    ("leased", claim::LEASED),
    ("held", settle::HELD),
    ("finish", settle::FINISH),
    ("renew", keep::RENEW),
    ("renewed", keep::RENEWED),
    ("held keys", read::HELD),
    ("unsettled", read::UNSETTLED),
    ("next turn", read::NEXT_TURN[0]),
    ("next turn of users", read::NEXT_TURN[1]),
    ("next turn of suspects", read::NEXT_TURN[2]),
];

/// Statements that lock rows of a table that producers write to as well, or other hosts: they find each row by its number, however few rows there
/// are, and never look at those of others.
const LOCKING: [(&str, &str); 25] = [
    ("ready", claim::READY),
    ("ready of users", claim::READY_OF_USER),
    ("still of users", claim::STILL_OF_USER),
    ("suspects out", claim::SUSPECT_OUT),
    ("lease", claim::LEASE),
    ("due tasks", due::DUE_TASKS),
    ("still due", due::STILL_DUE),
    ("out of scheduled", due::OUT_OF_SCHEDULED),
    ("still unserved", unserved::STILL_UNSERVED),
    ("out of unserved", unserved::OUT_OF_UNSERVED),
    ("into unserved", accounts::INTO_UNSERVED),
    ("out of unserved by hand", operate::OUT_OF_UNSERVED),
    ("held", settle::HELD),
    ("finish", settle::FINISH),
    ("settle", settle::SETTLE),
    ("renew", keep::RENEW),
    ("taken keys", submit::TAKEN),
    ("running", hosts::RUNNING),
    ("claims out", hosts::OUT),
    ("next look", hosts::NEXT),
    ("runs nothing", hosts::RUNS_NOTHING),
    ("lost", excuse::LOST),
    ("tasks to excuse", excuse::TASKS),
    ("excuse", excuse::EXCUSE),
    ("clear", excuse::CLEAR),
];

/// Tables with so many rows.
const SIZES: [usize; 3] = [0, 5, 100_000];

/// Fill every table that a locking statement looks at.
async fn fill(connection: &mut MySqlConnection, rows: usize) {
    const FILL: [&str; 11] = [
        "INSERT INTO laelaps_task (id, `key`, type, created_at, run_at, lease) SELECT seq, seq, 't', 1, seq, seq FROM",
        "INSERT INTO laelaps_ready (turn, task) SELECT seq, seq FROM",
        "INSERT INTO laelaps_ready_of_user (user, turn, task) SELECT seq DIV 100, seq, seq FROM",
        "INSERT INTO laelaps_scheduled (run_at, task) SELECT seq, seq FROM",
        "INSERT INTO laelaps_suspect (turn, task) SELECT seq, seq FROM",
        "INSERT INTO laelaps_unserved (queue, type, user, turn, task) SELECT '', 't', seq DIV 100, seq, seq FROM",
        "INSERT INTO laelaps_account (user, running) SELECT seq DIV 100, 1 FROM",
        "INSERT INTO laelaps_claim (host, look_at, tasks) SELECT seq DIV 100, seq, '[]' FROM",
        "INSERT INTO laelaps_attempt (task, lease, attempt, host, plugin, ended_at, event) SELECT seq, seq, 1, 1, 0, 1, 'lost' FROM",
        "INSERT INTO laelaps_task_data (task, part, data) SELECT seq, 0, '{}' FROM",
        "INSERT INTO laelaps_host_running (host, plugin) SELECT seq, seq FROM",
    ];
    if rows > 0 {
        for sql in FILL {
            let sql = format!("{} seq_1_to_{rows}", sql.replace("INSERT", "INSERT IGNORE"));
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *connection).await.unwrap();
        }
    }
    let analyze = "ANALYZE TABLE laelaps_task, laelaps_ready, laelaps_ready_of_user, laelaps_scheduled, laelaps_suspect,
        laelaps_unserved, laelaps_account, laelaps_claim, laelaps_attempt, laelaps_host_running, laelaps_task_data";
    sqlx::raw_sql(analyze).execute(connection).await.unwrap();
}

/// Tables that a statement reads as a whole, but for what was unfolded from its parameter, and what was made of it.
async fn whole_tables(connection: &mut MySqlConnection, name: &str, sql: &str) -> Vec<String> {
    let sql = format!(
        "EXPLAIN {}",
        sql.replace("JSON_TABLE(?", "JSON_TABLE('[[1,1]]'").replace("LIMIT ?", "LIMIT 1").replace('?', "'1'")
    );
    let plan = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await.unwrap_or_else(|error| panic!("{name}: {error}"));
    let read = plan.iter().map(|row| (row.get::<Option<String>, _>("table"), row.get::<Option<String>, _>("type")));
    let whole = read.filter(|(_, kind)| matches!(kind.as_deref(), Some("ALL" | "index")));
    whole.filter_map(|(table, _)| table).filter(|table| table != "s" && !table.starts_with('<')).collect()
}

#[tokio::test]
async fn no_statement_of_the_path_reads_more_than_its_batch() {
    for rows in SIZES {
        let mysql = opened().await;
        let mut connection = MySqlConnection::connect_with(&mysql.access.options).await.unwrap();
        fill(&mut connection, rows).await;
        for (name, sql) in LOCKING {
            let whole = whole_tables(&mut connection, name, sql).await;
            assert!(whole.is_empty(), "{name} locks rows of all {whole:?} with {rows} rows");
        }
        // Where there are few rows, reading all of them is no harm.
        for (name, sql) in LOOKED_UP.into_iter().filter(|_| rows > 1_000) {
            let whole = whole_tables(&mut connection, name, sql).await;
            assert!(whole.iter().all(|table| table == "laelaps_suspect"), "{name} reads all of {whole:?}");
        }
    }
}

/// Also those statements that are not listed here.
#[test]
fn every_join_says_by_which_index_it_finds_its_rows() {
    let sources = [
        include_str!("accounts.rs"),
        include_str!("before.rs"),
        include_str!("between.rs"),
        include_str!("choose.rs"),
        include_str!("claim.rs"),
        include_str!("deaths.rs"),
        include_str!("due.rs"),
        include_str!("excuse.rs"),
        include_str!("fronts.rs"),
        include_str!("hosts.rs"),
        include_str!("keep.rs"),
        include_str!("list.rs"),
        include_str!("mend.rs"),
        include_str!("operate.rs"),
        include_str!("read.rs"),
        include_str!("repair.rs"),
        include_str!("settle.rs"),
        include_str!("submit.rs"),
        include_str!("suspects.rs"),
        include_str!("unserved.rs"),
    ];
    for source in sources {
        for join in source.split("STRAIGHT_JOIN laelaps_").skip(1) {
            let says = join.split(" ON ").next().is_some_and(|before| before.contains("FORCE INDEX"));
            let only_reads = join.starts_with("host AS h ON h.identity");
            assert!(says || only_reads, "{}", &join[..join.len().min(60)]);
        }
    }
}

#[tokio::test]
async fn sessions_are_held_to_seconds_inside_a_transaction_and_to_minutes_in_all() {
    let mysql = opened().await;
    let mut connection = mysql.runner.pool.acquire().await.unwrap();
    const SET: &str = "SELECT CAST(@@idle_transaction_timeout AS SIGNED), CAST(@@innodb_lock_wait_timeout AS SIGNED)";
    let set: (i64, i64) = sqlx::query_as(SET).fetch_one(&mut *connection).await.unwrap();
    assert_eq!(set, (i64::from(connect::IDLE_TRANSACTION_SECONDS), i64::from(connect::LOCK_WAIT_SECONDS)));
    assert!(mysql.runner.pool.options().get_max_lifetime().is_some_and(|longest| longest <= Duration::from_secs(600)));
}

/// A session that stands still in the midst of a transaction, as of a host that is frozen, lets go of what it holds.
#[tokio::test]
async fn a_host_that_stands_still_in_a_transaction_lets_go() {
    let mysql = opened().await;
    mysql.submit(&[NewTask::new("a", "type", "{}")]).await.unwrap();
    let mut frozen = mysql.runner.pool.acquire().await.unwrap();
    sqlx::raw_sql("START TRANSACTION; SELECT id FROM laelaps_task FOR UPDATE").fetch_all(&mut *frozen).await.unwrap();
    mysql.cancel("a", Duration::ZERO).await.unwrap();
    let gone = sqlx::raw_sql("SELECT 1").fetch_all(&mut *frozen).await;
    assert!(gone.is_err(), "the server has ended the session");
    frozen.close_on_drop();
}

#[tokio::test]
async fn counts_of_many_types_are_folded() {
    let mysql = opened().await;
    let types = 4_000;
    for _ in 0..4 {
        let mut connection = MySqlConnection::connect_with(&mysql.access.options).await.unwrap();
        let sql = format!("INSERT INTO laelaps_tally (what, name, tasks) SELECT 'type', seq, 1 FROM seq_1_to_{types}");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
        mysql.reclaim(&Policy::default()).await.unwrap();
    }
    let mut connection = MySqlConnection::connect_with(&mysql.access.options).await.unwrap();
    let rows: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM laelaps_tally").fetch_one(&mut connection).await.unwrap();
    assert!(rows <= 2 * types, "{rows} rows for {types} types");
    assert_eq!(mysql.stats().await.unwrap().types[0].1, 4);
}

#[tokio::test]
async fn the_row_of_a_claim_goes_once_its_tasks_are_settled() {
    let mysql = opened().await;
    let host = mysql.register_host(&HostDescription { name: "tester".to_owned(), process_id: 1, identity: None }).await.unwrap();
    let tasks: Vec<NewTask> = (0..300).map(|number| NewTask::new(number.to_string(), "type", "{}")).collect();
    mysql.submit(&tasks).await.unwrap();
    let kept = claimed(&mysql, host).await;
    for _ in 1..300 {
        let task = claimed(&mysql, host).await;
        mysql.settle(&[settled(&task, Event::Finish { output: None, retention: None })]).await.unwrap();
    }
    mysql.reclaim(&Policy::default()).await.unwrap();
    let mut connection = MySqlConnection::connect_with(&mysql.access.options).await.unwrap();
    let left: Vec<i64> = sqlx::query_scalar("SELECT id FROM laelaps_claim").fetch_all(&mut connection).await.unwrap();
    assert_eq!(left, [kept.lease_ref.lease.0 / claim::LEASES_OF_CLAIM]);
}

/// After a promotion that lost a claim its number comes again; its leases do not.
#[tokio::test]
async fn a_claim_whose_number_comes_again_has_other_leases() {
    let mysql = opened().await;
    let host = mysql.register_host(&HostDescription { name: "tester".to_owned(), process_id: 1, identity: None }).await.unwrap();
    mysql.submit(&[NewTask::new("a", "type", "{}")]).await.unwrap();
    let mut leases = HashSet::new();
    let mut connection = MySqlConnection::connect_with(&mysql.access.options).await.unwrap();
    for _ in 0..4 {
        leases.insert(claimed(&mysql, host).await.lease_ref.lease.0);
        let back = "UPDATE laelaps_task SET state = 'waiting', until = 0; DELETE FROM laelaps_claim; ALTER TABLE laelaps_claim AUTO_INCREMENT = 1;
            INSERT INTO laelaps_ready (turn, task) SELECT turn, id FROM laelaps_task";
        sqlx::raw_sql(back).execute(&mut connection).await.unwrap();
    }
    assert_eq!(leases.iter().map(|lease| lease / claim::LEASES_OF_CLAIM).collect::<HashSet<_>>().len(), 1, "one number");
    assert!(leases.len() > 1, "{leases:?}");
}

#[tokio::test]
async fn updates_of_several_tasks_are_written_together() {
    let mysql = opened().await;
    let host = mysql.register_host(&HostDescription { name: "tester".to_owned(), process_id: 1, identity: None }).await.unwrap();
    mysql
        .submit(&[NewTask::new("a", "type", "{}"), NewTask::new("b", "type", "{}"), NewTask::new("c", "type", "{}")])
        .await
        .unwrap();
    let held = [claimed(&mysql, host).await, claimed(&mysql, host).await, claimed(&mysql, host).await];
    mysql.cancel("c", Duration::from_secs(60)).await.unwrap();
    let update = |task: &ClaimedTask, members: &str| Update { lease_ref: task.lease_ref, members: members.into() };
    let updates = [
        update(&held[0], r#"{"x":1}"#),
        update(&held[1], "no object"),
        update(&held[2], r#"{"x":1}"#),
        update(&held[0], r#"{"y":2}"#),
        update(&held[1], r#"{"x":3}"#),
    ];
    let answers = mysql.update_many(&updates).await.unwrap();
    assert!(matches!(answers[1], Err(Error::InvalidTask { .. })), "{answers:?}");
    let answers: Vec<Option<LeaseAnswer>> = answers.into_iter().map(Result::ok).collect();
    let held = Some(LeaseAnswer::Held);
    assert_eq!(answers, [held, None, Some(LeaseAnswer::Lost), held, held]);
    assert_eq!(mysql.get("a").await.unwrap().unwrap().data.as_deref(), Some(&br#"{"x":1,"y":2}"#[..]));
    assert_eq!(mysql.get("b").await.unwrap().unwrap().data.as_deref(), Some(&br#"{"x":3}"#[..]));
}

/// So many tasks of one state stand in the table, and three of each other.
const MANY: usize = 50_000;

/// Tasks of one state with these numbers, as far as a list looks at them.
async fn fill_state(connection: &mut MySqlConnection, state: State, name: &str, numbers: &str) {
    let is_ended = matches!(state, State::Finished | State::Failed | State::Cancelled);
    let (until, ended) = (if state == State::Running { 9 } else { 0 }, if is_ended { 9 } else { 0 });
    let place = match state {
        State::Waiting => {
            format!("INSERT INTO laelaps_ready_of_user (user, turn, task) SELECT '{name}', 1, seq FROM {numbers}")
        }
        State::Running => format!("INSERT INTO laelaps_claim (host, look_at, tasks) SELECT 1, 9, JSON_ARRAY(seq) FROM {numbers}"),
        State::Finished => "SELECT 1".to_owned(),
        State::Failed | State::Cancelled => {
            format!("INSERT INTO laelaps_set_aside (task, state) SELECT seq, '{}' FROM {numbers}", state.as_str())
        }
    };
    let tasks = format!(
        "INSERT INTO laelaps_task (id, `key`, type, user, state, created_at, run_at, until, finished_at, retained_until)
        SELECT seq, CONCAT('{name}', seq), '{name}', '{name}', '{}', 1, 1, {until}, {ended}, {ended} FROM {numbers}; {place}",
        state.as_str()
    );
    sqlx::raw_sql(AssertSqlSafe(tasks)).execute(connection).await.unwrap();
}

/// Rows that this session has read.
async fn rows_read(connection: &mut MySqlConnection) -> u64 {
    let rows = sqlx::raw_sql("SHOW SESSION STATUS LIKE 'Handler_read%'").fetch_all(connection).await.unwrap();
    rows.iter().map(|row| row.get::<String, _>(1).parse::<u64>().unwrap()).sum()
}

#[tokio::test]
async fn a_page_of_a_list_costs_what_a_page_costs_whatever_else_there_is() {
    for standing in State::ALL {
        let mysql = opened().await;
        let mut connection = MySqlConnection::connect_with(&mysql.access.options).await.unwrap();
        fill_state(&mut connection, standing, "many", &format!("seq_1_to_{MANY}")).await;
        let others = State::ALL.into_iter().filter(|state| *state != standing);
        for (place, state) in others.clone().enumerate() {
            let first = MANY + 1 + 3 * place;
            fill_state(&mut connection, state, "few", &format!("seq_{first}_to_{}", first + 2)).await;
        }
        let few = || Some("few".to_owned());
        let mut filters: Vec<(Filter, usize, u64)> = others
            .map(|state| {
                // What has failed stands among what was cancelled, in the order of numbers.
                let is_apart = state != State::Finished && !(standing as usize >= 3 && state as usize >= 3);
                (Filter { states: vec![state], ..Filter::default() }, 3, if is_apart { 1_500 } else { 25_000 })
            })
            .collect();
        filters.extend([
            (Filter { states: vec![standing], ..Filter::default() }, 20, 1_500),
            (Filter { task_type: few(), ..Filter::default() }, 12, 25_000),
            (Filter { user: few(), ..Filter::default() }, 12, 25_000),
            (Filter { key_prefix: few(), ..Filter::default() }, 12, 1_500),
        ]);
        for (filter, count, most) in filters {
            let mut filter = Filter { limit: 20, ..filter };
            let mut found = 0;
            while found < count {
                let before = rows_read(&mut connection).await;
                let mut session = Session::joining(&mut connection).await.unwrap();
                let page = list::page(&mut session, &filter).await.unwrap();
                let read = rows_read(&mut connection).await - before;
                assert!(read <= most, "{read} rows for {filter:?} among {MANY} that are {standing:?}");
                found += page.tasks.len();
                assert!(page.next.is_some() || found == count, "{found} of {count} for {filter:?} beside {standing:?}");
                filter.after = page.next;
            }
        }
    }
}

#[tokio::test]
async fn users_without_limit_are_found_behind_any_crowd_of_limited_ones() {
    let mysql = opened().await;
    let mut connection = MySqlConnection::connect_with(&mysql.access.options).await.unwrap();
    let crowd = |queue: &str| {
        format!(
            "INSERT INTO laelaps_account (queue, user, head_turn, head_task, head_max)
                SELECT '{queue}', CONCAT('limited', seq), 1, seq, 5 FROM seq_1_to_10000;
            INSERT INTO laelaps_account (queue, user, running, head_turn, head_task)
                SELECT '{queue}', CONCAT('free', seq), seq, 2, 20000 + seq FROM seq_1_to_3;
            INSERT INTO laelaps_account (queue, user, running) SELECT '{queue}', CONCAT('idle', seq), 1 FROM seq_1_to_1000"
        )
    };
    sqlx::raw_sql(AssertSqlSafe(crowd(""))).execute(&mut connection).await.unwrap();
    let nulls = "SELECT COUNT(*) FROM laelaps_account WHERE COALESCE(other_weight, other_turn, other_picked, other_free_weight, other_free_turn) IS NULL";
    assert_eq!(sqlx::query_scalar::<_, i64>(nulls).fetch_one(&mut connection).await.unwrap(), 11_004);
    sqlx::raw_sql(AssertSqlSafe(crowd("mail"))).execute(&mut connection).await.unwrap();
    let before = rows_read(&mut connection).await;
    let others = sqlx::query(between::OTHERS_WITHOUT_LIMIT).bind(10).fetch_all(&mut connection).await.unwrap();
    let users: Vec<Vec<u8>> = others.iter().map(|row| row.get(1)).collect();
    assert_eq!(users, [b"free1", b"free2", b"free3"]);
    let found = sqlx::query(between::OPEN_WITHOUT_LIMIT).bind("").bind(10).fetch_all(&mut connection).await.unwrap();
    let users: Vec<Vec<u8>> = found.iter().map(|row| row.get(1)).collect();
    assert_eq!(users, [b"free1", b"free2", b"free3"], "the one with the least running comes first");
    let read = rows_read(&mut connection).await - before;
    assert!(read < 100, "{read} rows");
    // What a claim changes of a limited user's account writes nothing into their index.
    let changed = "UPDATE laelaps_account SET running = running + 1, head_turn = 3 WHERE user = 'limited5'";
    sqlx::raw_sql(changed).execute(&mut connection).await.unwrap();
    let nulls = "SELECT COUNT(*) FROM laelaps_account WHERE free_weight IS NULL AND free_turn IS NULL";
    assert_eq!(sqlx::query_scalar::<_, i64>(nulls).fetch_one(&mut connection).await.unwrap(), 22_001);
}

/// So many queues have something waiting, besides the large one.
const QUEUES: usize = 1_000;

/// Rows that a choice of ten tasks reads, and which tasks those are, in their order. The host would lease them next; here they are left where they are.
async fn chosen(connection: &mut MySqlConnection, way: choose::Way, starts: &choose::Starts) -> (u64, Vec<(String, i64)>) {
    sqlx::raw_sql("START TRANSACTION").execute(&mut *connection).await.unwrap();
    let before = rows_read(connection).await;
    let mut session = Session::joining(connection).await.unwrap();
    let limits = choose::Limits { tasks: 10, limited: 10 };
    let choice = choose::choose(&mut session, way, limits, starts).await.unwrap();
    let read = rows_read(connection).await - before;
    sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await.unwrap();
    (read, choice.chosen.into_iter().map(|chosen| (chosen.queue, chosen.turn)).collect())
}

#[tokio::test]
async fn a_claim_costs_what_it_takes_whatever_waits_in_other_queues() {
    let mysql = opened().await;
    let mut connection = MySqlConnection::connect_with(&mysql.access.options).await.unwrap();
    let fill = format!(
        "INSERT INTO laelaps_ready (queue, turn, task) SELECT 'bulk', seq, seq FROM seq_1_to_{MANY};
        INSERT INTO laelaps_ready_of_user (queue, user, turn, task) SELECT 'bulk', CONCAT('u', seq), seq, 200000 + seq FROM seq_1_to_{MANY};
        INSERT INTO laelaps_account (queue, user, head_turn, head_task) SELECT 'bulk', CONCAT('u', seq), seq, 200000 + seq FROM seq_1_to_{MANY};
        INSERT INTO laelaps_ready (queue, turn, task) SELECT CONCAT('q', seq), 1000000 + seq, 100000 + seq FROM seq_1_to_{QUEUES};
        INSERT INTO laelaps_ready_of_user (queue, user, turn, task) SELECT CONCAT('q', seq), 'u', 1000000 + seq, 300000 + seq FROM seq_1_to_{QUEUES};
        INSERT INTO laelaps_account (queue, user, head_turn, head_task) SELECT CONCAT('q', seq), 'u', 1000000 + seq, 300000 + seq FROM seq_1_to_{QUEUES}"
    );
    sqlx::raw_sql(AssertSqlSafe(fill)).execute(&mut connection).await.unwrap();
    let ways = [choose::Way::WithoutUser, choose::Way::First, choose::Way::BetweenUsers];
    let some =
        |queues: &[&str]| -> mark::Asked { Some(Arc::from(queues.iter().map(|queue| (*queue).to_owned()).collect::<Vec<_>>())) };
    let mut names: Vec<String> = (1..=QUEUES).map(|number| format!("q{number}")).collect();
    names.sort_unstable();
    let all: mark::Asked = Some(Arc::from(names));
    // Each claim by its queues, how many rows it may read, and the queues that its tasks are of, of one table.
    let mut first: Vec<String> = (1..=10).map(|number| format!("q{number}")).collect();
    let bulk = vec!["bulk".to_owned()];
    for (asked, most, expected) in [
        (some(&["q500"]), 500, vec!["q500".to_owned()]),
        (some(&["q500", "q600"]), 800, vec!["q500".to_owned(), "q600".to_owned()]),
        (some(&["nothing", "q7"]), 800, vec!["q7".to_owned()]),
        (some(&["bulk"]), 500, bulk.clone()),
        (all, 20_000, std::mem::take(&mut first)),
        (None, 20_000, bulk),
    ] {
        for way in ways {
            let starts = choose::Starts { others: true, ..mark::Marks::default().starts(&asked) };
            let (read, chosen) = chosen(&mut connection, way, &starts).await;
            assert!(read <= most, "{read} rows for {way:?} of {:?} queues", starts.asked.map(|asked| asked.len()));
            let mut queues: Vec<String> = chosen.into_iter().map(|(queue, _)| queue).collect();
            queues.sort_unstable();
            queues.dedup();
            assert!(queues.iter().all(|queue| expected.contains(queue)), "{way:?}: {queues:?}");
        }
    }
    // Once it is known where the queues begin, ten of a thousand cost what ten cost.
    let fronts = (1..=QUEUES as i64).map(|number| (format!("q{number}").into_bytes(), (1_000_000 + number - 1, 0))).collect();
    let known = fronts::Start { is_head: false, fronts, learn: None };
    let starts = choose::Starts { ready: known.clone(), of_users: known, ..mark::Marks::default().starts(&None) };
    for way in [choose::Way::WithoutUser, choose::Way::First] {
        let (read, chosen) = chosen(&mut connection, way, &starts).await;
        assert!(read <= 600, "{read} rows for {way:?}");
        let turns: Vec<i64> = chosen.iter().map(|(_, turn)| *turn).collect();
        let of_one = if way == choose::Way::First { 5 } else { 10 };
        assert_eq!(turns.last(), Some(&(1_000_000 + of_one)), "{turns:?}");
    }
}
