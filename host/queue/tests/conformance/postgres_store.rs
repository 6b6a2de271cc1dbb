//! What producers, frozen hosts, failovers and lost answers do to a queue on PostgreSQL: nothing that holds up others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use laelaps_queue::{
    Beat, Claim, Config, Connections, Error, Event, HostDescription, HostId, LeaseAnswer, NewTask, Queue, State, Submitted,
    Update,
};
use laelaps_test_databases::{LONG as PATIENT, PATIENCE, eventually};
use sqlx::postgres::PgListener;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fixture::postgres::raw;
use crate::fixture::{Database, Fixture, LONG, finish, keys, patient, settled, task, task_of, with_follow_ups};

async fn fixture() -> Fixture {
    Fixture::new(Database::Postgres).await
}

fn asking(host: HostId, limit: u32) -> Claim {
    Claim::new(host, limit, LONG)
}

/// What a [`Proxy`] does to the next message of the client in which its words stand.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Act {
    Pass,
    /// The server gets it, and the client no answer: its connection is cut.
    Swallow,
    /// Nobody hears of the other any more, and both stay connected.
    Freeze,
    /// As swallow, once the server has had the message, at once.
    Cut,
}

/// Stands between a queue and the server.
struct Proxy {
    url: String,
    act: Arc<AtomicU8>,
}

impl Proxy {
    async fn before(url: &str, words: &'static [u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (before, database) = url.rsplit_once('/').unwrap();
        let (user, address) = before.rsplit_once('@').unwrap();
        let (address, act) = (address.to_owned(), Arc::new(AtomicU8::new(Act::Pass as u8)));
        let port = listener.local_addr().unwrap().port();
        let acting = Arc::clone(&act);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&address).await.unwrap();
                tokio::spawn(pass_on(client, server, Arc::clone(&acting), words));
            }
        });
        Self { url: format!("{user}@127.0.0.1:{port}/{database}"), act }
    }

    async fn queue(&self, fixture: &Fixture) -> Queue {
        let connections = Connections { listen: false, ..patient() };
        Queue::open(&Config { connections, url: self.url.clone(), ..fixture.config.clone() }).await.unwrap()
    }

    /// Do this to the next one.
    fn next(&self, act: Act) {
        self.act.store(act as u8, Ordering::Release);
    }

    fn has_acted(&self) -> bool {
        self.act.load(Ordering::Acquire) == Act::Pass as u8
    }
}

async fn pass_on(mut client: TcpStream, mut server: TcpStream, act: Arc<AtomicU8>, words: &[u8]) {
    let (mut asked, mut answered) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut swallows = false;
    loop {
        tokio::select! {
            read = client.read(&mut asked) => match read {
                Ok(bytes @ 1..) => {
                    let meant = words.is_empty() || asked[..bytes].windows(words.len()).any(|part| part == words);
                    let now = if meant { act.swap(Act::Pass as u8, Ordering::AcqRel) } else { Act::Pass as u8 };
                    if now == Act::Freeze as u8 {
                        std::future::pending::<()>().await;
                    }
                    swallows |= now == Act::Swallow as u8;
                    if server.write_all(&asked[..bytes]).await.is_err() || now == Act::Cut as u8 {
                        return;
                    }
                }
                _ => return,
            },
            read = server.read(&mut answered) => match read {
                Ok(1..) if swallows => return,
                Ok(bytes @ 1..) => if client.write_all(&answered[..bytes]).await.is_err() { return },
                _ => return,
            },
        }
    }
}

async fn register(queue: &Queue, identity: Option<&str>) -> HostId {
    let identity = identity.map(str::to_owned);
    queue.backend().register_host(&HostDescription { name: "far".to_owned(), process_id: 1, identity }).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_that_holds_the_key_of_a_follow_up_holds_up_nothing_else() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    fixture.submit_some("a", 3).await;
    let claimed = fixture.claim(host, 3).await;
    let mut producer = raw(&fixture.config).await;
    let mut transaction = producer.begin().await.unwrap();
    sqlx::query("SELECT laelaps.submit('held key', 'type')").execute(&mut *transaction).await.unwrap();
    let parent = with_follow_ups(vec![task("held key"), task("free key")], settled(&claimed[0], finish()));
    let beat = Beat { lease_ref: claimed[0].lease_ref, alive_time: LONG, progress: None };
    for _ in 0..2 {
        let busy = fixture.backend().settle(std::slice::from_ref(&parent)).await.unwrap_err();
        assert!(matches!(busy, Error::Busy { .. }) && busy.is_retryable() && !busy.is_about_the_request(), "{busy:?}");
        assert_eq!(fixture.backend().heartbeat(std::slice::from_ref(&beat)).await.unwrap(), [LeaseAnswer::Held]);
    }
    assert!(!fixture.queue.exists("free key").await.unwrap(), "nothing of it was done");
    assert_eq!(fixture.backend().settle(&[settled(&claimed[1], finish())]).await.unwrap(), [LeaseAnswer::Held]);
    let other = with_follow_ups(vec![task("other key")], settled(&claimed[2], finish()));
    assert_eq!(fixture.backend().settle(&[other]).await.unwrap(), [LeaseAnswer::Held]);
    transaction.rollback().await.unwrap();
    assert_eq!(fixture.backend().settle(&[parent]).await.unwrap(), [LeaseAnswer::Held]);
    assert!(fixture.queue.exists("held key").await.unwrap() && fixture.queue.exists("free key").await.unwrap());
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_task_of_a_dead_host_holds_up_no_other_of_it() {
    let fixture = fixture().await;
    let host = fixture.host_as("s1").await;
    fixture.submit_some("a", 3).await;
    let short = fixture.claim_for(host, 1, Duration::from_millis(1)).await.remove(0);
    assert_eq!(fixture.claim(host, 9).await.len(), 2);
    let mut stopped = raw(&fixture.config).await;
    sqlx::raw_sql("BEGIN; SELECT FROM task WHERE key IN ('a0', 'a1') FOR UPDATE").execute(&mut stopped).await.unwrap();
    fixture.passes(short.until).await;
    let policy = &fixture.config.policy;
    assert!(fixture.backend().reclaim(policy).await.unwrap().tasks.is_empty());
    let handed = fixture.backend().hand_on(&["s1".to_owned()], policy).await.unwrap();
    assert_eq!(handed.tasks.iter().map(|lost| lost.key.as_str()).collect::<Vec<_>>(), ["a2"]);
    assert!(handed.dead_hosts.is_empty(), "it still holds something");
    sqlx::raw_sql("ROLLBACK").execute(&mut stopped).await.unwrap();
    let later = fixture.backend().reclaim(policy).await.unwrap();
    assert_eq!((later.tasks.len(), later.dead_hosts.len()), (2, 1));
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_freezes_inside_a_transaction_lets_go_within_seconds() {
    let fixture = fixture().await;
    let proxy = Proxy::before(&fixture.config.url, b"WITH holds").await;
    let queue = proxy.queue(&fixture).await;
    let host = register(&queue, Some("s1")).await;
    fixture.submit(&[task("a")]).await;
    let claimed = queue.backend().claim(&asking(host, 1)).await.unwrap().tasks.remove(0);
    proxy.next(Act::Freeze);
    let frozen = queue.clone();
    let updating = tokio::spawn(async move { frozen.backend().update_data(claimed.lease_ref, b"{\"x\":1}").await });
    eventually(PATIENCE, "the host freezes", async || if proxy.has_acted() { Ok(()) } else { Err("not yet".to_owned()) }).await;
    // The server ends its transaction; without a limit of our own that takes as long as a statement may.
    eventually(PATIENCE, "what it had comes back", async || {
        let taken = fixture.backend().hand_on(&["s1".to_owned()], &fixture.config.policy).await.unwrap();
        let later = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
        if taken.tasks.len() + later.tasks.len() == 1 { Ok(()) } else { Err("it is locked".to_owned()) }
    })
    .await;
    updating.abort();
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_to_what_is_not_the_primary_any_more_are_given_up() {
    let fixture = fixture().await;
    let mut admin = raw(&fixture.config).await;
    let name: String = sqlx::query_scalar("SELECT current_database()::text").fetch_one(&mut admin).await.unwrap();
    let set = |word: &str| AssertSqlSafe(format!("ALTER DATABASE {name} SET default_transaction_read_only = {word}"));
    sqlx::raw_sql(set("on")).execute(&mut admin).await.unwrap();
    let demoted = fixture.another().await;
    assert_eq!(demoted.stats().await.unwrap().ready, 0, "its connection can read");
    sqlx::raw_sql(set("off")).execute(&mut admin).await.unwrap();
    assert_eq!(demoted.submit(task("a")).await.unwrap(), Submitted::Created, "the next connection leads to the new primary");
    demoted.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_submit_whose_answer_was_lost_is_told_as_done_and_wakes() {
    let fixture = fixture().await;
    let proxy = Proxy::before(&fixture.config.url, b"lost answer").await;
    let queue = proxy.queue(&fixture).await;
    queue.submit_many(&[task("warm"), NewTask::new("taken", "other", "{}")]).await.unwrap();
    let mut heard = PgListener::connect(&fixture.direct_url().await).await.unwrap();
    heard.listen("laelaps").await.unwrap();
    proxy.next(Act::Swallow);
    let answers =
        queue.submit_many(&[task("lost answer"), task("taken"), task_of("u", "b", Some(1)), task("lost answer")]).await.unwrap();
    assert!(proxy.has_acted(), "an answer was lost");
    use Submitted::{AlreadyExists, Created};
    assert_eq!(answers, [Created, AlreadyExists, Created, AlreadyExists]);
    tokio::time::timeout(PATIENCE, heard.recv()).await.expect("hosts are woken").unwrap();
    queue.close().await;
    fixture.audit().await;
}

async fn blocked(watcher: &mut PgConnection, expected: i64) {
    const BLOCKED: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually(PATIENCE, "somebody is stopped", async || {
        let count: i64 = sqlx::query_scalar(BLOCKED).fetch_one(&mut *watcher).await.unwrap();
        if count == expected { Ok(()) } else { Err(format!("{count} are")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_ends_after_it_was_repeated_takes_nothing() {
    let fixture = fixture().await;
    // A claim says where it takes tasks, and what it looks at before does not.
    let proxy = Proxy::before(&fixture.config.url, b"somewhere").await;
    let there = |key: &str| NewTask { queue: Some("somewhere".to_owned()), ..task(key) };
    let asking = |host| Claim { queues: Some(["somewhere".to_owned()].into()), ..asking(host, 1) };
    let queue = proxy.queue(&fixture).await;
    let host = register(&queue, None).await;
    fixture.submit(&[there("warm")]).await;
    queue.backend().claim(&asking(host)).await.unwrap();
    fixture.submit(&[there("a")]).await;
    let (mut stopper, mut watcher) = (raw(&fixture.config).await, raw(&fixture.config).await);
    sqlx::raw_sql("BEGIN; SELECT FROM task WHERE key = 'a' FOR UPDATE").execute(&mut stopper).await.unwrap();
    // Its first try is stopped on the server when its connection is lost, and goes on there.
    proxy.next(Act::Cut);
    let repeated = queue.backend().claim(&asking(host)).await.unwrap();
    assert!(repeated.tasks.is_empty(), "somebody holds it");
    blocked(&mut watcher, 1).await;
    sqlx::raw_sql("ROLLBACK").execute(&mut stopper).await.unwrap();
    eventually(PATIENT, "the task can be claimed", async || {
        let claimed = queue.backend().claim(&asking(host)).await.unwrap().tasks;
        if keys(&claimed) == ["a"] { Ok(()) } else { Err(format!("{:?} {:?}", keys(&claimed), fixture.state("a").await)) }
    })
    .await;
    queue.close().await;
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_free_after_its_retention_though_nobody_cleaned_up() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    fixture.submit(&[task("a"), task("b"), task("c"), task("kept"), task("parent")]).await;
    let claimed = fixture.claim(host, 9).await;
    let over = Event::Finish { output: Some(b"out".to_vec()), retention: Some(Duration::ZERO) };
    for done in &claimed[..3] {
        fixture.backend().settle(&[settled(done, over.clone())]).await.unwrap();
    }
    fixture.backend().settle(&[settled(&claimed[3], finish())]).await.unwrap();
    fixture.passes(fixture.get("c").await.finished_at.unwrap()).await;
    let large = |key: &str| NewTask::new(key, "again", format!("{{\"x\":\"{}\"}}", "x".repeat(1_000)));
    let answers = fixture.queue.submit_many(&[large("a"), task("kept"), task("new")]).await.unwrap();
    assert_eq!(answers, [Submitted::Created, Submitted::AlreadyExists, Submitted::Created]);
    let again = fixture.get("a").await;
    assert_eq!((again.state, again.task_type.as_str(), again.output), (State::Waiting, "again", None));
    let mut producer = raw(&fixture.config).await;
    let created: bool = sqlx::query_scalar("SELECT laelaps.submit('b', 'again')").fetch_one(&mut producer).await.unwrap();
    assert!(created);
    let parent = with_follow_ups(vec![task("c")], settled(&claimed[4], finish()));
    fixture.backend().settle(&[parent]).await.unwrap();
    assert_eq!(fixture.state("c").await, State::Waiting);
    fixture.audit().await;
    fixture.queue.clean_up().await.unwrap();
    assert_eq!(fixture.claim(host, 9).await.len(), 4);
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_in_takes_the_same_documents() {
    let fixture = fixture().await;
    let mut producer = raw(&fixture.config).await;
    let deep = |levels: usize| format!("{{\"a\":{}1{}}}", "[".repeat(levels), "]".repeat(levels));
    let mut documents: Vec<String> = [
        "{}",
        " {} ",
        "\t{\"a\":1}\r\n",
        "{\"a\":1.}",
        "{\"a\":.5}",
        "{\"a\":01}",
        "{\"a\":-0}",
        "{\"a\":1e400}",
        "{\"a\":+1}",
        "{\"a\":NaN}",
        "{\"a\":1,}",
        "{,}",
        "{\"a\"}",
        "{\"a\":}",
        "{a:1}",
        "{'a':1}",
        "{} {}",
        "{}x",
        "[]",
        "1",
        "null",
        "\"{}\"",
        "",
        " ",
        "{\"a\":\"\\ud800\"}",
        "{\"\\ud800\":1}",
        "{\"\\udc00\\ud800\":1}",
        "{\"\\ud83d\\ude00\":1}",
        "{\"a\":{\"\\udfff\":1}}",
        "{\"\\u0000\":\"\\u0000\"}",
        "{\"\\\\ud800\":1}",
        "{\"a\":\"\\x41\"}",
        "{\"a\":\"\\u12g4\"}",
        "{\"a\":\"\u{1}\"}",
        "{\"a\":\"\n\"}",
        "{\"a\":\"\u{7f}\u{85}\"}",
        "{\"\":0}",
        "{\"a\":1,\"a\":2}",
        "\u{feff}{}",
        "{}\u{a0}",
        "{\"a\":\"\u{1f600}\"}",
        "{\"a\":tru}",
        "{\"a\":true,\"b\":false,\"c\":null}",
        "{\"a\":1E+5,\"b\":1e-5,\"c\":1e}",
        "{\"a\":0x10}",
        "{\"a\":/**/1}",
        "{\"a\":\"b}",
        "{\"a\":[1,]}",
        "{\"a\":[,1]}",
        "{\"a\":123456789012345678901234567890.5}",
    ]
    .map(str::to_owned)
    .to_vec();
    documents.extend([deep(100), deep(500)]);
    for (number, document) in documents.iter().enumerate() {
        // Without data it would be an empty object.
        let taken = !document.is_empty() && NewTask::new("k", "type", document.clone()).check().is_ok();
        let sql = format!("SELECT laelaps.submit('k{number}', 'type', $1)");
        let by_text = sqlx::query(AssertSqlSafe(sql)).bind(document).execute(&mut producer).await;
        assert_eq!(by_text.is_ok(), taken, "{document}: {by_text:?}");
        // What the server itself takes for JSON is not refused by us, unless it is no object, or has a name that is no text.
        let sql = format!("SELECT laelaps.submit('j{number}', 'type', $1::text::json)");
        let by_json = sqlx::query(AssertSqlSafe(sql)).bind(document).execute(&mut producer).await;
        assert_eq!(by_json.is_ok(), taken, "{document}: {by_json:?}");
        let sql = format!("SELECT laelaps.submit('b{number}', 'type', $1::text::jsonb)");
        let by_jsonb = sqlx::query(AssertSqlSafe(sql)).bind(document).execute(&mut producer).await;
        assert!(taken || by_jsonb.is_err(), "{document}: {by_jsonb:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_needs_exactly_the_documented_grants() {
    let fixture = fixture().await;
    let mut admin = raw(&fixture.config).await;
    let role = format!("worker_{}", fastrand::u64(..));
    sqlx::raw_sql(AssertSqlSafe(format!("CREATE ROLE {role} LOGIN"))).execute(&mut admin).await.unwrap();
    let documented = include_str!("../../../../docs/databases.md");
    let grants = documented.lines().filter(|line| line.starts_with("GRANT ") && line.ends_with(" TO worker;"));
    let grants: Vec<String> = grants.map(|grant| grant.replace(" TO worker;", &format!(" TO {role}"))).collect();
    assert_eq!(grants.len(), 3, "{grants:?}");
    let url = fixture.config.url.replace("postgres@", &format!("{role}@"));
    let queue = Queue::open(&Config { url, ..fixture.config.clone() }).await.unwrap();
    for missing in 0..=grants.len() {
        // Each is needed.
        sqlx::raw_sql(AssertSqlSafe(format!("REVOKE ALL ON ALL TABLES IN SCHEMA laelaps FROM {role}")))
            .execute(&mut admin)
            .await
            .unwrap();
        sqlx::raw_sql(AssertSqlSafe(format!("REVOKE ALL ON ALL SEQUENCES IN SCHEMA laelaps FROM {role}")))
            .execute(&mut admin)
            .await
            .unwrap();
        sqlx::raw_sql(AssertSqlSafe(format!("REVOKE ALL ON SCHEMA laelaps FROM {role}"))).execute(&mut admin).await.unwrap();
        for (_, grant) in grants.iter().enumerate().filter(|(place, _)| *place != missing) {
            sqlx::raw_sql(AssertSqlSafe(grant.clone())).execute(&mut admin).await.unwrap();
        }
        let worked = whole_day(&queue, &fixture, missing).await;
        assert_eq!(worked.is_ok(), missing == grants.len(), "{worked:?} without {:?}", grants.get(missing));
    }
    queue.close().await;
    fixture.audit().await;
}

/// What hosts and operators do in a day.
async fn whole_day(queue: &Queue, fixture: &Fixture, day: usize) -> laelaps_queue::Result<()> {
    let backend = queue.backend();
    let name = |key: &str| format!("{key}{day}");
    let tasks =
        [task(&name("a")), task_of("u", &name("b"), Some(1)), NewTask { held: true, ..task(&name("held")) }, task(&name("c"))];
    queue.submit_many(&tasks).await?;
    let host =
        backend.register_host(&HostDescription { name: "day".to_owned(), process_id: 1, identity: Some(name("s")) }).await?;
    let version = laelaps_queue::PluginVersion { name: "p".to_owned(), digest: name("d") };
    backend.note_plugins(host, std::slice::from_ref(&version.digest)).await?;
    backend.note_running(host, &[version]).await?;
    let claimed = backend.claim(&asking(host, 9)).await?.tasks;
    let beats: Vec<Beat> =
        claimed.iter().map(|task| Beat { lease_ref: task.lease_ref, alive_time: LONG, progress: None }).collect();
    backend.heartbeat(&beats).await?;
    for task in &claimed {
        backend.update_data(task.lease_ref, b"{\"x\":1}").await?;
    }
    if let [first, second, ..] = claimed.as_slice() {
        let output = Event::Finish { output: Some(b"out".to_vec()), retention: Some(Duration::ZERO) };
        let parent = with_follow_ups(vec![task(&name("child"))], settled(first, output));
        backend.settle(&[parent, settled(second, Event::Retry { delay: None })]).await?;
    }
    backend.release_held(&name("held")).await?;
    queue.cancel(&name("held")).await?;
    queue.retry(&name("held")).await?;
    let lost = backend.hand_on(&[name("s")], &fixture.config.policy).await?;
    let leases: Vec<_> = lost.tasks.iter().map(|lost| lost.lease_ref).collect();
    backend.excuse(host, &leases).await?;
    backend.reclaim(&fixture.config.policy).await?;
    backend.quarantined().await?;
    backend.release_plugin("nothing").await?;
    queue.clean_up().await?;
    queue.stats().await?;
    backend.hosts().await?;
    backend.audit().await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_of_many_tasks_is_updated_together_and_each_refusal_is_its_own() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    fixture.submit_some("a", 4).await;
    let claimed = fixture.claim(host, 9).await;
    fixture.queue.cancel("a2").await.unwrap();
    let update =
        |number: usize, members: &str| Update { lease_ref: claimed[number].lease_ref, members: members.as_bytes().to_vec() };
    let large = format!("{{\"large\":\"{}\"}}", "x".repeat(400));
    let updates = [
        update(0, "{\"x\":1}"),
        update(1, "[]"),
        update(2, "{}"),
        update(3, &large),
        update(0, "{\"y\":2,\"n\":null}"),
        update(1, "{\"z\":3}"),
    ];
    let answers = fixture.backend().update_many(&updates).await.unwrap();
    let words: Vec<String> = answers
        .iter()
        .map(|answer| match answer {
            Ok(answer) => format!("{answer:?}"),
            Err(error) => format!("{}", error.is_about_the_request()),
        })
        .collect();
    assert_eq!(words, ["Held", "true", "Lost", "Held", "Held", "Held"]);
    let data = async |key: &str| String::from_utf8(fixture.get(key).await.data.unwrap()).unwrap();
    assert_eq!(data("a0").await, "{\"n\":null,\"x\":1,\"y\":2}");
    assert_eq!(data("a1").await, "{\"n\":1,\"z\":3}");
    assert_eq!(data("a3").await.len(), large.len() + "\"n\":1,".len());
    fixture.audit().await;
    let many: Vec<Update> = (0..300).map(|number| update(number % 2, &format!("{{\"k\":{number}}}"))).collect();
    assert!(fixture.backend().update_many(&many).await.unwrap().iter().all(|answer| matches!(answer, Ok(LeaseAnswer::Held))));
    assert_eq!(data("a1").await, "{\"n\":1,\"z\":3,\"k\":299}");
    const TRANSACTIONS: &str = "SELECT count(DISTINCT xmin::text) FROM task WHERE key IN ('a0', 'a1')";
    let transactions: i64 = sqlx::query_scalar(TRANSACTIONS).fetch_one(&mut raw(&fixture.config).await).await.unwrap();
    assert_eq!(transactions, 1, "both were written in one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn auxiliary_tables_are_put_together_however_much_they_hold() {
    let fixture = fixture().await;
    fixture
        .meddle(
            "INSERT INTO tally (type, live) SELECT 'type' || n % 30, CASE WHEN n % 60 < 30 THEN 1 ELSE -1 END FROM generate_series(0, 119999) AS n;
            INSERT INTO account_change (user_name) SELECT 'u' || n % 7 FROM generate_series(1, 5000) AS n",
        )
        .await;
    fixture.backend().clean_up(100).await.unwrap();
    let mut watcher = raw(&fixture.config).await;
    eventually(PATIENT, "both are nearly empty", async || {
        const ROWS: &str = "SELECT (SELECT count(*) FROM tally), (SELECT count(*) FROM account_change)";
        let rows: (i64, i64) = sqlx::query_as(ROWS).fetch_one(&mut watcher).await.unwrap();
        if rows.0 < 200 && rows.1 == 0 { Ok(()) } else { Err(format!("{rows:?}")) }
    })
    .await;
    // Nor do they wait for a clean-up while there is much to do.
    fixture.meddle("INSERT INTO tally (type, live) SELECT 'gone', 0 FROM generate_series(1, 9000) AS n").await;
    let mut submits = tokio::task::JoinSet::new();
    for one in 0..30 {
        let queue = fixture.queue.clone();
        submits.spawn(async move {
            for number in 0..75 {
                queue.submit(task(&format!("t{one}/{number}"))).await.unwrap();
            }
        });
    }
    submits.join_all().await;
    eventually(PATIENT, "counts are few", async || {
        let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM tally").fetch_one(&mut watcher).await.unwrap();
        if rows < 3_000 { Ok(()) } else { Err(rows.to_string()) }
    })
    .await;
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_lease_repeats_after_a_promotion_that_lost_commits() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    fixture.submit_some("a", 40).await;
    let leases = async || fixture.claim(host, 20).await.iter().map(|task| task.lease_ref.lease.0).collect::<Vec<i64>>();
    let before = leases().await;
    assert!(before.windows(2).all(|pair| pair[0] >> 20 < pair[1] >> 20), "{before:?}");
    // The sequence of the new primary has not come as far.
    fixture.meddle("SELECT setval('lease_number', 1, false)").await;
    let after = leases().await;
    assert_eq!(after.len(), 20);
    assert!(after.iter().all(|lease| !before.contains(lease)), "{before:?} {after:?}");
}
