//! A host on PerfectQueue's own table, beside producers and workers in Ruby, which plain SQL plays here.

mod on_mariadb {
    use laelaps_queue::State;
    use laelaps_test_databases::mariadb;
    use laelaps_tests::{Host, PATIENCE, Site, eventually, guest};
    use serde_json::{Value, json};
    use sqlx::{Connection as _, MySqlConnection};

    /// What PerfectQueue takes from the time at which a finished task is removed.
    const DELETE_OFFSET: i64 = 1_000_000_000;

    /// A table as PerfectQueue makes it, and a site with a configuration like those of its workers.
    async fn site(changes: Value) -> (Site, MySqlConnection) {
        let url = mariadb::shared().await.create_database().await;
        let mut ruby = MySqlConnection::connect(&url).await.unwrap();
        for sql in [
            "CREATE TABLE tasks (id VARCHAR(255) NOT NULL, timeout INT NOT NULL, data LONGBLOB NOT NULL, created_at INT, resource VARCHAR(255),
                max_running INT, owner BIGINT(21) UNSIGNED NOT NULL DEFAULT 0, PRIMARY KEY (id))",
            "CREATE INDEX index_tasks_on_timeout ON tasks (timeout)",
        ] {
            sqlx::query(sql).execute(&mut ruby).await.unwrap();
        }
        let site = Site::new().await;
        site.plug_guest("zoo");
        let routes = ["echo", "fail", "silent"].map(|task_type| site.route(json!({ "type": task_type })));
        let mut section = json!({
            "type": "rdb_compat", "url": url.replace("mysql://", "mysql2://"), "table": "tasks", "application_key": "of its own",
            "routes": routes,
        });
        section.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        site.configure(section);
        (site, ruby)
    }

    /// Submits as the Ruby client does.
    async fn submit(ruby: &mut MySqlConnection, key: &str, task_type: &str, data: Value) {
        let mut data = data;
        data["type"] = json!(task_type);
        let sql = "INSERT INTO tasks (id, timeout, data, created_at, resource, max_running)
            VALUES (?, UNIX_TIMESTAMP(), ?, UNIX_TIMESTAMP(), NULL, NULL)";
        sqlx::query(sql).bind(key).bind(data.to_string().into_bytes()).execute(ruby).await.unwrap();
    }

    /// Time left to its removal, if it is finished.
    async fn finished(ruby: &mut MySqlConnection, key: &str) -> Option<i64> {
        let sql = "SELECT created_at, timeout + ? - UNIX_TIMESTAMP() FROM tasks WHERE id = ?";
        let row: (Option<i64>, i64) = sqlx::query_as(sql).bind(DELETE_OFFSET).bind(key).fetch_one(ruby).await.unwrap();
        row.0.is_none().then_some(row.1)
    }

    async fn wait_until_finished(ruby: &mut MySqlConnection, key: &str) -> i64 {
        eventually(PATIENCE, &format!("{key} is finished, as Ruby sees it"), async || {
            finished(ruby, key).await.ok_or_else(|| "not yet".to_owned())
        })
        .await
    }

    #[tokio::test]
    async fn a_host_runs_what_ruby_submits_and_leaves_what_it_has_no_route_for() {
        let (site, mut ruby) = site(json!({ "retention_time": 86_400 })).await;
        let told = site.laelaps(["-c", "laelaps.yml", "check"]).await.success();
        assert!(told.stdout.contains("clock          this machine and the server agree within 2 s"), "{}", told.stdout);
        assert!(told.stderr.contains("application_key: no such key; ignored"), "{}", told.stderr);
        submit(&mut ruby, "stays", "only-ruby-knows-it", json!({})).await;
        submit(&mut ruby, "goes", "echo", json!({ "n": 1 })).await;
        let host: Host = site.start().await;
        let left = wait_until_finished(&mut ruby, "goes").await;
        assert!((82_800..=86_400).contains(&left), "it is kept for another {left} s");
        let sql = "SELECT timeout <= UNIX_TIMESTAMP() AND owner = 0 AND created_at IS NOT NULL FROM tasks WHERE id = 'stays'";
        let untouched: i64 = sqlx::query_scalar(sql).fetch_one(&mut ruby).await.unwrap();
        assert_eq!(untouched, 1, "what has no route here is left to the Ruby workers as it was");
        host.stop().await;
    }

    #[tokio::test]
    async fn a_route_whose_plugin_is_not_loaded_takes_nothing_from_ruby_workers_until_it_is() {
        let routes = json!([{ "type": "echo", "plugin": "zoo" }, { "type": "silent", "plugin": "later" }]);
        let (site, mut ruby) = site(json!({ "retention_time": 86_400, "routes": routes })).await;
        submit(&mut ruby, "waits", "silent", json!({})).await;
        submit(&mut ruby, "goes", "echo", json!({ "n": 1 })).await;
        let host: Host = site.start().await;
        wait_until_finished(&mut ruby, "goes").await;
        let sql = "SELECT timeout <= UNIX_TIMESTAMP() AND owner = 0 AND created_at IS NOT NULL FROM tasks WHERE id = 'waits'";
        let untouched: i64 = sqlx::query_scalar(sql).fetch_one(&mut ruby).await.unwrap();
        assert_eq!(untouched, 1, "what has no plugin here is left to the Ruby workers as it was");
        site.plug("later", &guest("zoo"));
        wait_until_finished(&mut ruby, "waits").await;
        host.stop().await;
    }

    #[tokio::test]
    async fn check_says_what_the_table_lacks_and_init_adds_it() {
        let (site, mut ruby) = site(json!({})).await;
        // As PerfectQueue made it before 0.9.
        for sql in ["ALTER TABLE tasks DROP COLUMN owner", "DROP INDEX index_tasks_on_timeout ON tasks"] {
            sqlx::query(sql).execute(&mut ruby).await.unwrap();
        }
        let told = site.laelaps(["-c", "laelaps.yml", "check"]).await;
        assert_eq!(told.code, Some(4), "{told:?}");
        for part in
            ["tasks has no column owner", "init adds it", "tasks has no index on timeout", "hint: `laelaps init` makes what"]
        {
            assert!(told.stderr.contains(part), "{part}: {}", told.stderr);
        }
        let _ = site.laelaps(["-c", "laelaps.yml", "init"]).await.success();
        let _ = site.laelaps(["-c", "laelaps.yml", "check"]).await.success();
    }

    #[tokio::test]
    async fn check_compares_the_rows_when_asked_and_names_what_a_user_may_not_do() {
        let (site, mut ruby) = site(json!({})).await;
        submit(&mut ruby, "a", "echo", json!({})).await;
        let told = site.laelaps(["-c", "laelaps.yml", "check", "--data"]).await.success();
        assert!(told.stdout.contains("data           every table agrees with every other"), "{}", told.stdout);
        sqlx::query("UPDATE tasks SET owner = (1 << 62) + 1").execute(&mut ruby).await.unwrap();
        let told = site.laelaps(["-c", "laelaps.yml", "check", "--data"]).await;
        assert_eq!(told.code, Some(4), "{}", told.stderr);
        assert!(told.stdout.contains("a settlement's mark stands on a task that has ended: task "), "{}", told.stdout);
        sqlx::raw_sql(
            "CREATE TRIGGER refuse BEFORE UPDATE ON tasks FOR EACH ROW SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'no'",
        )
        .execute(&mut ruby)
        .await
        .unwrap();
        let told = site.laelaps(["-c", "laelaps.yml", "check"]).await;
        assert_eq!(told.code, Some(4), "{}", told.stderr);
        for part in ["a host could not work: a task cannot be stored, claimed and settled: no", "docs/perfectqueue.md"] {
            assert!(told.stderr.contains(part), "{part}: {}", told.stderr);
        }
    }

    #[tokio::test]
    async fn stats_says_which_types_are_left_to_other_workers() {
        let (site, mut ruby) = site(json!({})).await;
        submit(&mut ruby, "ours", "echo", json!({})).await;
        submit(&mut ruby, "theirs", "only-ruby-knows-it", json!({})).await;
        let told = site.laelaps(["-c", "laelaps.yml", "stats"]).await.success().stdout;
        let line = |task_type: &str| told.lines().find(|line| line.starts_with(task_type)).unwrap_or_default().trim_end();
        assert!(line("echo").ends_with(" zoo"), "{told}");
        assert!(line("only-ruby-knows-it").ends_with("left to other workers"), "{told}");
        let told = site.laelaps(["-c", "laelaps.yml", "stats", "--json"]).await.success().stdout;
        let told: Value = serde_json::from_str(&told).unwrap();
        assert_eq!(told["unserved"], Value::Null, "what Ruby's workers serve nobody knows");
    }

    /// A row as Ruby wrote it: time, data, and whether it has ended.
    async fn row(ruby: &mut MySqlConnection, key: &str) -> (i64, Vec<u8>, bool) {
        let sql = "SELECT CAST(timeout AS SIGNED), data, created_at IS NULL FROM tasks WHERE id = ?";
        sqlx::query_as(sql).bind(key).fetch_one(ruby).await.unwrap()
    }

    #[tokio::test]
    async fn what_ruby_writes_to_a_row_of_ours_wins_and_stops_our_handler() {
        // A heartbeat of a worker that had the task before; its finish; its update_data.
        const WRITES: [(&str, &str); 3] = [
            ("revived", "UPDATE tasks SET timeout = UNIX_TIMESTAMP() + 777 WHERE id = ? AND created_at IS NOT NULL"),
            (
                "finished",
                "UPDATE tasks SET timeout = UNIX_TIMESTAMP() - 1000000000 + 777, created_at = NULL, resource = NULL
                WHERE id = ? AND created_at IS NOT NULL",
            ),
            (
                "updated",
                "UPDATE tasks SET timeout = UNIX_TIMESTAMP() + 777, data = '{\"by\":\"ruby\"}' WHERE id = ? AND created_at IS NOT NULL",
            ),
        ];
        let (site, mut ruby) = site(json!({ "processors": 3, "task_heartbeat_interval": 0.2 })).await;
        for (key, _) in WRITES {
            submit(&mut ruby, key, "silent", json!({ "mark": "/marks/held", "gate": "/marks/gate" })).await;
        }
        let host = site.start().await;
        eventually(PATIENCE, "all three run", async || {
            let begun = site.marks("held").len();
            if begun == 3 { Ok(()) } else { Err(begun.to_string()) }
        })
        .await;
        let mut written = Vec::new();
        for (key, sql) in WRITES {
            assert_eq!(sqlx::query(sql).bind(key).execute(&mut ruby).await.unwrap().rows_affected(), 1, "{key}");
            written.push(row(&mut ruby, key).await);
        }
        // By the next heartbeat our handlers are stopped, though nobody opens the gate, and what they leave is not stored.
        host.logged_times("the lease had ended before the outcome was stored", 3, PATIENCE).await;
        for ((key, _), was) in WRITES.iter().zip(&written) {
            assert_eq!(row(&mut ruby, key).await, *was, "{key} is as Ruby wrote it");
        }
        assert_eq!(site.marks("held").len(), 3, "nothing begins again while Ruby has it");
        host.stop().await;
    }

    #[tokio::test]
    async fn outcomes_are_kept_beside_the_table_if_that_is_allowed() {
        let (site, mut ruby) = site(json!({ "side_table": true, "max_attempts": 2, "retry_wait": 0 })).await;
        let _ = site.laelaps(["-c", "laelaps.yml", "init"]).await.success();
        submit(&mut ruby, "good", "echo", json!({ "n": 1 })).await;
        submit(&mut ruby, "bad", "fail", json!({})).await;
        let host = site.start().await;
        wait_until_finished(&mut ruby, "good").await;
        wait_until_finished(&mut ruby, "bad").await;
        let show = async |key: &str| -> Value {
            let told = site.laelaps(["-c", "laelaps.yml", "show", key, "--json"]).await.success();
            serde_json::from_str(&told.stdout).unwrap()
        };
        let (good, bad) = (show("good").await, show("bad").await);
        assert_eq!((good["state"].as_str(), good["attempts"].as_u64()), (Some(State::Finished.as_str()), Some(1)), "{good}");
        assert_eq!((bad["state"].as_str(), bad["attempts"].as_u64()), (Some(State::Failed.as_str()), Some(2)), "{bad}");
        assert_eq!(bad["error_code"], "on-purpose", "{bad}");
        host.stop().await;
    }
}
