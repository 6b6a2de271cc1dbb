//! Two builds in one fleet: this one, and one whose schema goes on (`later-build` of host/daemon/src/fault.rs). `tests/soak upgrade` runs it at
//! full length.

mod with_faults {
    use std::collections::HashSet;

    use laelaps_queue::{NewTask, Queue, State};
    use laelaps_test_databases::later_step;
    use laelaps_tests::{
        Answer, Host, LONG, PATIENCE, Site, eventually, measured, on_every_native_database, scaled, submit, task,
        wait_for_finished, wait_for_state, wait_for_stats,
    };
    use serde_json::json;
    use tokio::sync::watch;

    /// What makes a program play the later build.
    const LATER: &str = "later-build=later.json";
    /// Tasks that wait or run at any time while the builds change over.
    const BACKLOG: u64 = 60;
    /// Tasks that have to finish before the next thing happens.
    const STRETCH: u64 = 60;

    /// Let the later build know the steps up to `version`, each of which admits programs from `oldest_program` on.
    fn goes_on_to(site: &Site, version: i64, oldest_program: i64) {
        let steps: Vec<_> = (2..=version).map(|version| (version, oldest_program, later_step(site.url(), version))).collect();
        std::fs::write(site.path("later.json"), serde_json::to_string(&steps).unwrap()).unwrap();
    }

    async fn later_host(site: &Site) -> Host {
        site.start_with_fault(LATER).await
    }

    async fn later(site: &Site, arguments: &[&str]) -> Answer {
        site.laelaps_with_fault(LATER, [&["-c", "laelaps.yml"], arguments].concat()).await
    }

    /// Submit tasks so that some always wait, until told to end; how many they were.
    async fn produce(queue: Queue, mut ends: watch::Receiver<bool>) -> usize {
        let mut count = 0;
        loop {
            let batch: Vec<NewTask> = (0..20)
                .map(|number| task(format!("task-{}", count + number), "compute", json!({ "ms": 1, "mark": "/marks/ran" })))
                .collect();
            submit(&queue, &batch).await;
            count += batch.len();
            let fewer = wait_for_stats(&queue, "the backlog shrinks", LONG, |stats| stats.finished + BACKLOG > count as u64);
            tokio::select! {
                _ = fewer => {}
                _ = ends.wait_for(|ends| *ends) => return count,
            }
        }
    }

    /// Whoever runs now finishes some tasks more.
    async fn gets_on(queue: &Queue, who: &str) {
        let before = queue.stats().await.unwrap().finished;
        wait_for_stats(queue, &format!("{who} works"), LONG, |stats| stats.finished >= before + STRETCH).await;
    }

    /// Upgrades under load, and back: the schema is moved on while this build works, hosts of the later build join and this one's leave; then this build
    /// joins the later schema, and the other leaves. The host that is left.
    async fn builds_take_turns(site: &Site, queue: &Queue, rounds: i64) -> Host {
        let mut this = site.start().await;
        gets_on(queue, "this build").await;
        for round in 1..=rounds {
            let version = round + 1;
            goes_on_to(site, version, 1);
            let made = later(site, &["init"]).await.success();
            assert_eq!(made.stdout, format!("the queue is ready: schema {version}, brought up to date from {round}\n"));
            gets_on(queue, "this build, on the later schema,").await;
            let next = later_host(site).await;
            gets_on(queue, "a fleet of both").await;
            this.stop().await;
            gets_on(queue, "the later build alone").await;
            this = site.start().await;
            gets_on(queue, "a fleet of both again").await;
            next.stop().await;
            gets_on(queue, "this build, which joined the later schema,").await;
        }
        this
    }

    on_every_native_database! {
        async fn two_builds_share_a_database_through_upgrades_and_back() {
            let rounds = i64::try_from(scaled(10).max(2)).unwrap();
            let site = Site::new().await;
            site.plug_guest("zoo");
            site.configure(json!({ "processors": 2, "task_prefetch": 4 }));
            let queue = site.queue().await;
            let (end, ends) = watch::channel(false);
            // A producer of this build, whose connections see every step.
            let producer = produce(site.queue().await, ends);
            let builds = async {
                let this = builds_take_turns(&site, &queue, rounds).await;
                end.send(true).unwrap();
                this
            };
            let (count, this) = Box::pin(async { tokio::join!(producer, builds) }).await;
            let _ = later(&site, &["submit", "from-later", "compute", r#"{"ms": 1, "mark": "/marks/ran"}"#]).await.success();
            wait_for_finished(&queue, count + 1, LONG).await;
            let ran = site.marks("ran");
            let tasks: HashSet<&str> = ran.iter().filter_map(|mark| mark.split(' ').next()).collect();
            assert_eq!((tasks.len(), ran.len()), (count + 1, count + 1), "each task ran, and no task twice");
            let checked = site.laelaps(["-c", "laelaps.yml", "check", "--data"]).await.success().stdout;
            let told = format!("schema {}, made by Laelaps {}, admits this program, which knows schema 1", rounds + 1, env!("CARGO_PKG_VERSION"));
            assert!(checked.contains(&told) && checked.contains("every table agrees with every other"), "{checked}");
            this.stop().await;
            measured("tasks that two builds shared", format!("{count}, in {rounds} upgrades and back, none lost"));
        }

        async fn a_running_host_that_a_schema_shuts_out_ends_by_itself() {
            let site = Site::new().await;
            site.plug_guest("zoo");
            let queue = site.queue().await;
            let mut this = site.start().await;
            submit(&queue, &[task("runs", "silent", json!({ "gate": "/marks/gate", "mark": "/marks/held" }))]).await;
            eventually(PATIENCE, "the task runs", async || {
                if site.marks("held").is_empty() { Err("not yet".to_owned()) } else { Ok(()) }
            })
            .await;
            goes_on_to(&site, 2, 2);
            let _ = later(&site, &["init"]).await.success();
            let line = this.logged("this host claims nothing more and ends once its attempts have", PATIENCE).await;
            assert!(line.contains("for programs that know schema 2 or a later one"), "{line}");
            assert!(line.contains("upgrade this program to the version that made the schema"), "{line}");
            submit(&queue, &[task("waits", "silent", json!({}))]).await;
            site.open_gate("gate");
            let status = this.exited(PATIENCE).await;
            assert_eq!(status.code(), Some(4), "the code of a database that cannot be used");
            this.logged("cannot work on the database", PATIENCE).await;
            assert_eq!(wait_for_state(&queue, "runs", State::Finished, PATIENCE).await.attempts, 1);
            assert_eq!(queue.get("waits").await.unwrap().unwrap().state, State::Waiting);

            let mut again = site.spawn_with(&[], &[]);
            assert_eq!(again.exited(PATIENCE).await.code(), Some(4));
            assert!(!again.was_notified("READY=1"));
            let next = later_host(&site).await;
            wait_for_state(&queue, "waits", State::Finished, LONG).await;
            next.stop().await;
        }
    }
}
