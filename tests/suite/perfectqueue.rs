//! A host on PerfectQueue's own table, beside producers and workers in Ruby, which plain SQL plays here.

mod on_mariadb {
    use laelaps_queue::State;
    use laelaps_test_databases::mariadb;
    use laelaps_tests::{Host, PATIENCE, Site, eventually};
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
        let mut section = json!({
            "type": "rdb_compat", "url": url.replace("mysql://", "mysql2://"), "table": "tasks", "application_key": "of its own",
            "routes": [{ "type": "echo", "plugin": "zoo" }, { "type": "fail", "plugin": "zoo" }],
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
        let (site, mut ruby) = site(json!({ "retention_time": 600 })).await;
        let told = site.laelaps(["-c", "laelaps.yml", "check"]).await.success();
        assert!(told.stdout.contains("clock          this machine and the server agree within 2 s"), "{}", told.stdout);
        assert!(told.stderr.contains("application_key: no such key; ignored"), "{}", told.stderr);
        submit(&mut ruby, "stays", "only-ruby-knows-it", json!({})).await;
        submit(&mut ruby, "goes", "echo", json!({ "n": 1 })).await;
        let host: Host = site.start().await;
        let left = wait_until_finished(&mut ruby, "goes").await;
        assert!((500..=600).contains(&left), "it is kept for another {left} s");
        let sql = "SELECT timeout <= UNIX_TIMESTAMP() AND owner = 0 AND created_at IS NOT NULL FROM tasks WHERE id = 'stays'";
        let untouched: i64 = sqlx::query_scalar(sql).fetch_one(&mut ruby).await.unwrap();
        assert_eq!(untouched, 1, "what has no route here is left to the Ruby workers as it was");
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
